"""Ranks that come back: killed as donors, as joiners, both, at a meeting; and a random walk (control/members.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from joiners import OF_A_DONOR, OF_A_JOINER, Returns, check, let_all_come_soon
from survivors import AT_A_MEETING, IN_A_STEP

from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport import link_transport

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEEDS = 16
"""Of the random walk; eighty times as many by ``--long``."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    let_all_come_soon(monkeypatch, link_transport)


def of_four(dooms: dict[int, tuple[int, str]], returns: dict[int, list[Any]], **options: Any) -> Returns:
    options = {"steps": 400, "meetings": (150, 300), "longest": 1.5, **options}
    return Returns(4, dooms, ElasticMixing(0.5), lambda: Schedule("matching", seed=3), returns=returns, **options)


def joined(run: Returns) -> list[tuple[int, int]]:
    """Return who joined, as which incarnation, and lived to the end."""
    return sorted((s.rank, s.incarnation) for s in run.stays if s.donor >= 0 and s.life.theta is not None)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "links"])
@pytest.mark.parametrize("rank", [0, 2])
def test_one_comes_back_and_is_drawn(rank: int, shared_memory: bool) -> None:
    run = of_four({rank: (5, "posted")}, {rank: [None]}, shared_memory=shared_memory)
    run.go()
    check(run)
    assert joined(run) == [(rank, 1)]
    [stay] = [s for s in run.stays if s.donor >= 0]
    assert stay.donor == (1 if rank == 0 else 0)
    last = [k for step, partners in stay.life.mixed.items() if step > 200 for k in partners]
    assert set(last) == {0, 1, 2, 3} - {rank}, "it exchanges with all others"
    assert run.stays[-1].life.drawn[399] == (0, 1, 2, 3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("point", OF_A_DONOR)
def test_the_donor_dies_while_it_donates_and_another_serves(point: str) -> None:
    run = of_four({2: (5, "posted"), 0: (1, point)}, {2: [None]})
    run.go()
    check(run)
    assert joined(run)[0][0] == 2
    assert [s.donor for s in run.stays if s.rank == 2] == [-1, 1]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("point", OF_A_JOINER)
def test_a_joiner_dies_and_the_next_one_takes_its_seat(point: str) -> None:
    run = of_four({2: (5, "posted")}, {2: [(0, point), None]})
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [2]
    assert len([s for s in run.stays if s.rank == 2]) == 3


@pytest.mark.one_in(2)
@pytest.mark.parametrize("points", [("after taking in", "taken in"), ("while serving", "loaded")])
def test_donor_and_joiner_die_at_once_and_both_come_back(points: tuple[str, str]) -> None:
    run = of_four({2: (5, "posted"), 0: (1, points[0])}, {2: [(0, points[1]), None], 0: [None]})
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [0, 2]


def test_two_join_at_once() -> None:
    run = of_four({1: (5, "posted"), 3: (5, "posted")}, {1: [None], 3: [None]})
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [1, 3]


def test_all_but_one_come_back() -> None:
    run = of_four({k: (5 + k, "posted") for k in range(3)}, {k: [None] for k in range(3)})
    run.go()
    check(run)
    assert [rank for rank, _ in joined(run)] == [0, 1, 2]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("point", AT_A_MEETING)
def test_one_dies_at_a_meeting_and_comes_back_during_the_meetings_that_follow(point: str) -> None:
    meetings = tuple(range(20, 400, 12))
    run = of_four({1: (32, point)}, {1: [None]}, meetings=meetings)
    run.go()
    check(run)
    assert joined(run) == [(1, 1)]


def test_one_that_comes_when_training_is_over_is_told_so() -> None:
    run = of_four({2: (395, "posted")}, {2: [None]}, pace=0.0)
    run.go()
    check(run)
    assert [s.over or s.donor >= 0 for s in run.stays if s.rank == 2 and s.incarnation] == [True]


RULES: tuple[MixingRule, ...] = (ElasticMixing(0.4), PullMixing(), PushMixing())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SEEDS, 80 * SEEDS))
def test_a_longer_random_walk_keeps_the_invariants(seed: int) -> None:
    test_a_random_walk_keeps_the_invariants(seed)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_walk_keeps_the_invariants(seed: int) -> None:
    rng = np.random.default_rng([20, seed])
    world_size = int(rng.integers(2, 6))
    doomed = [int(rank) for rank in rng.permutation(world_size)[: int(rng.integers(1, world_size))]]
    meetings = tuple(range(int(rng.integers(10, 60)), 300, int(rng.integers(15, 90))))
    points = (*IN_A_STEP, *AT_A_MEETING, *OF_A_DONOR)
    dooms, returns = {}, {}
    for rank in doomed:
        dooms[rank] = _doom(rng, meetings, points, 1, 150)
        returns[rank] = [
            (0, str(rng.choice(OF_A_JOINER))) if rng.random() < 0.5 else _doom(rng, meetings, IN_A_STEP, 1, 40)
            for _ in range(int(rng.integers(0, 3)))
        ] + [None]
    period = int(rng.integers(1, 4))
    run = Returns(
        world_size,
        dooms,
        RULES[int(rng.integers(3))],
        lambda: Schedule(str(peers), period=period, seed=seed),
        steps=300,
        delay=int(rng.integers(period)),
        shared_memory=bool(rng.random() < 0.5),
        meetings=meetings,
        longest=10.0,
        returns=returns,
    )
    peers = rng.choice(["matching", "uniform", "ring"])
    run.go()
    check(run)


def _doom(rng: Any, meetings: tuple[int, ...], points: tuple[str, ...], low: int, high: int) -> tuple[int, str]:
    point = str(rng.choice(points))
    return (int(rng.choice(meetings)) if point in AT_A_MEETING else int(rng.integers(low, high))), point
