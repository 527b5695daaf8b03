"""Whom a rank asks in its own rounds, and in which of them it asks."""

from __future__ import annotations

from collections import Counter

import pytest

from lightning_gossip.rules.asking import OwnRounds, another, first, neighbours
from lightning_gossip.rules.schedule import Schedule

ALL = tuple(range(8))


@pytest.mark.parametrize("peers", ["matching", "uniform", "weighted", "ring", "exponential"])
def test_the_first_is_whom_the_schedule_draws_at_the_rank_s_own_step(peers: str) -> None:
    schedule = Schedule(peers, probability=0.8, seed=3)
    for step in range(1, 30):
        drawn = [first(schedule, step, rank, ALL, 8) for rank in ALL]
        assert drawn == schedule.choices(step, 8).tolist()


@pytest.mark.parametrize(
    ("peers", "near"), [("ring", {1, 3}), ("exponential", {0, 3, 6}), ("uniform", {0, 1, 3, 4, 5, 6, 7})]
)
def test_another_is_a_neighbour_that_was_not_asked_yet(peers: str, near: set[int]) -> None:
    schedule = Schedule(peers, seed=1)
    assert set(neighbours(schedule, 2, 8)) == near
    asked = {another(schedule, step, 2, ALL, (), (), 8) for step in range(1, 200)}
    assert asked == near
    for step in range(1, 50):
        tried = {another(schedule, step, 2, ALL, (), (), 8)}
        second = another(schedule, step, 2, ALL, tried, (), 8)
        assert second in near - tried
        assert another(schedule, step, 2, ALL, {*tried, second, 99}, (), 8) == -1, "three are asked at most"
    assert another(schedule, 1, 2, ALL, (), near, 8) == -1, "nobody is left"


def test_nearer_ranks_are_likelier() -> None:
    schedule = Schedule("weighted", seed=5)
    counts = Counter(another(schedule, step, 0, ALL, (), (), 8) for step in range(1, 2000))
    assert max(counts.values()) > 2 * min(counts.values())
    assert 0 not in counts


def test_among_those_that_are_left() -> None:
    schedule = Schedule("uniform", seed=3)
    members = (0, 2, 5)
    for step in range(1, 50):
        assert first(schedule, step, 2, members, 8) in {0, 5}
        assert another(schedule, step, 2, members, (), (), 8) in {0, 5}
        assert another(schedule, step, 2, members, {0}, (), 8) == 5


class Fixed:
    def choices(self, step: int, world_size: int) -> list[int]:
        return [1, 0, *[-1] * (world_size - 2)]


@pytest.mark.parametrize("peers", ["matching", "uniform", "weighted", "ring"])
def test_who_is_lost_and_has_not_seen_it_asks_nobody(peers: str) -> None:
    schedule = Schedule(peers, seed=1)
    assert first(schedule, 5, 2, (0, 1, 3, 4, 5), 8) == -1
    assert another(schedule, 5, 2, (0, 1, 3, 4, 5), (0,), (), 8) == -1


def test_an_object_of_the_user_s_is_asked_once_a_round() -> None:
    schedule = Schedule(Fixed())
    assert first(schedule, 1, 0, ALL, 8) == 1
    assert first(schedule, 1, 5, ALL, 8) == -1
    assert another(schedule, 1, 0, ALL, {1}, (), 8) == -1
    assert neighbours(schedule, 0, 8) == []


def test_who_had_its_round_early_does_not_ask_and_who_had_none_was_alone() -> None:
    rounds = OwnRounds(in_pairs=True)
    assert rounds.begin(0, under_way=False) == (True, False)
    assert rounds.begin(0, under_way=False) == (True, True), "nothing came of it"
    assert rounds.begin(2, under_way=False) == (False, False), "it was asked too"
    assert rounds.begin(2, under_way=False) == (True, False), "that was its round"
    assert rounds.begin(2, under_way=True) == (False, False), "it is in one"
    assert rounds.begin(3, under_way=False) == (True, False)
    alone = OwnRounds(in_pairs=False)
    assert alone.begin(0, under_way=False) == (True, False)
    assert alone.begin(2, under_way=False) == (True, False), "who is asked has nothing of it"
