"""Ranks that come back under LocalSGD and DiLoCo join with the common start, whoever dies (control/taking_in.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from joiners import let_all_come_soon
from round_joiners import OF_A_DONOR, OF_A_JOINER, Returns, check
from round_survivors import OF_AN_ALL_REDUCE

from lightning_gossip.control import votes
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.transport import all_reduce, halves, voted_all_reduce

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEEDS = 10
"""Of the random walk; eighty times as many by ``--long``."""

WAYS = [(1, 0, 1), (4, 0, 1), (4, 3, 1), (4, 3, 4), (3, 1, 2)]
"""Period, delay and fragments."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    let_all_come_soon(monkeypatch, votes, all_reduce, halves, voted_all_reduce)


def of_four(dooms: dict[int, tuple[int, str]], returns: dict[int, list[Any]], **options: Any) -> Returns:
    kept: dict[str, Any] = {"steps": 240, "meetings": (90, 180), "longest": 2.0}
    return Returns(4, dooms, returns=returns, **kept | options)


def joined(run: Returns) -> list[tuple[int, int]]:
    """Return who joined, as which incarnation, and lived to the end."""
    return sorted((s.rank, s.incarnation) for s in run.stays if s.donor is not None and s.ended)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("period", "delay", "fragments"), WAYS)
def test_one_comes_back_with_the_common_start(period: int, delay: int, fragments: int, rank: int) -> None:
    run = of_four({rank: (8, "between the halves")}, {rank: [None]}, period=period, delay=delay, fragments=fragments)
    run.go()
    check(run)
    assert joined(run) == [(rank, 1)]
    [stay] = [s for s in run.stays if s.donor is not None]
    assert stay.donor == (1 if rank == 0 else 0, 0)
    late = [members for (step, _), members in stay.life.applied.items() if step > 200]
    assert late
    assert set(late) == {(0, 1, 2, 3)}, "rounds are of all four again"


@pytest.mark.long
def test_no_round_is_dropped_over_one_that_takes_its_time_to_load() -> None:
    run = of_four({2: (8, "between the halves")}, {2: [None]}, loading=0.3)
    run.go()
    check(run)
    [stay] = [s for s in run.stays if s.donor is not None]
    others = [s for s in run.stays if s.incarnation == 0 and s.ended]
    for other in others:
        after = [step for step, _ in other.life.applied if step > stay.began_after]
        assert after == list(range(stay.began_after // 4 * 4 + 4, 241, 4))
        assert other.life.applied[after[0], 0] == (0, 1, 2, 3)


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("period", "delay", "fragments"), [(4, 0, 1), (4, 3, 4)])
@pytest.mark.parametrize("point", OF_A_DONOR)
def test_the_donor_dies_while_it_donates_and_another_serves(
    point: str, period: int, delay: int, fragments: int
) -> None:
    run = of_four(
        {2: (8, "between the halves"), 0: (1, point)}, {2: [None]}, period=period, delay=delay, fragments=fragments
    )
    run.go()
    check(run)
    [(rank, _)] = joined(run)
    assert rank == 2
    assert [s.donor for s in run.stays if s.rank == 2 and s.ended] == [(1, 0)]


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("period", "delay", "fragments"), [(4, 0, 1), (4, 3, 4)])
@pytest.mark.parametrize("point", OF_A_JOINER)
def test_a_joiner_dies_and_the_next_one_takes_its_seat(point: str, period: int, delay: int, fragments: int) -> None:
    run = of_four(
        {2: (8, "between the halves")}, {2: [(1, point), None]}, period=period, delay=delay, fragments=fragments
    )
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [2]
    assert len([s for s in run.stays if s.rank == 2]) == 3


@pytest.mark.one_in(12)
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("point", OF_AN_ALL_REDUCE)
def test_a_joiner_dies_in_its_first_rounds_and_the_next_one_takes_its_seat(point: str, delay: int) -> None:
    run = of_four({2: (8, "after its vote")}, {2: [(1, point), None]}, delay=delay, fragments=2)
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [2]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "points", [("after taking in", "taken in"), ("after its word", "asked"), ("while serving", "loaded")]
)
def test_donor_and_joiner_die_at_once_and_both_come_back(points: tuple[str, str]) -> None:
    run = of_four({2: (8, "between the halves"), 0: (1, points[0])}, {2: [(1, points[1]), None], 0: [None]}, delay=2)
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [0, 2]


def test_two_join_at_once() -> None:
    run = of_four({1: (8, "between the halves"), 3: (8, "between the halves")}, {1: [None], 3: [None]}, delay=3)
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [1, 3]


@pytest.mark.long
def test_all_but_one_come_back() -> None:
    run = of_four({k: (8 + 4 * k, "between the halves") for k in range(3)}, {k: [None] for k in range(3)}, delay=3)
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [0, 1, 2]


@pytest.mark.long
def test_one_is_taken_in_between_meetings_that_follow_one_another() -> None:
    """And where a donor can not serve at the step that all have agreed on, at another."""
    run = of_four({1: (8, "between the halves")}, {1: [None]}, meetings=tuple(range(12, 240, 6)), busy=3)
    run.go()
    check(run)
    assert joined(run) == [(1, 1)]


def test_one_that_comes_when_training_is_over_is_told_so() -> None:
    run = of_four({2: (236, "between the halves")}, {2: [None]}, pace=0.0)
    run.go()
    check(run)
    assert [s.over or s.donor is not None for s in run.stays if s.rank == 2 and s.incarnation] == [True]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SEEDS, 80 * SEEDS))
def test_a_longer_random_walk_keeps_starts_equal(seed: int) -> None:
    test_a_random_walk_keeps_starts_equal(seed)


@pytest.mark.one_in(16)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_walk_keeps_starts_equal(seed: int) -> None:
    rng = np.random.default_rng([20, seed])
    world_size = int(rng.integers(2, 6))
    period = int(rng.integers(1, 5))
    doomed = [int(rank) for rank in rng.permutation(world_size)[: int(rng.integers(1, world_size))]]
    dooms: dict[int, tuple[int, str]] = {}
    returns: dict[int, list[tuple[int, str] | None]] = {}
    for rank in doomed:
        dooms[rank] = int(rng.integers(1, 80)), str(rng.choice((*OF_AN_ALL_REDUCE, *OF_A_DONOR)))
        again = [
            (1, str(rng.choice(OF_A_JOINER)))
            if rng.random() < 0.5
            else (int(rng.integers(1, 30)), str(rng.choice(OF_AN_ALL_REDUCE)))
            for _ in range(int(rng.integers(0, 3)))
        ]
        returns[rank] = [*again, None]
    run = Returns(
        world_size,
        dooms,
        period=period,
        delay=int(rng.integers(period)),
        fragments=int(rng.integers(1, min(period, 4) + 1)),
        outer=OuterStep(0.7, 0.9) if rng.random() < 0.7 else OuterStep(),
        steps=200,
        meetings=tuple(range(int(rng.integers(10, 60)), 200, int(rng.integers(15, 90)))),
        longest=10.0,
        returns=returns,
        loading=float(rng.choice([0.0, 0.1])),
        busy=int(rng.integers(0, 4)) if rng.random() < 0.3 else 0,
    )
    run.go()
    check(run)
