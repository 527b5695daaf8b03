"""Every point of an all-reduce at which a rank can die: those that are left apply the round, or all drop it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from round_survivors import OF_AN_ALL_REDUCE, Run, check

from lightning_gossip.control.stop import RunStopped
from lightning_gossip.rules.outer import OuterStep

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEEDS = 25
"""Of the random walk."""

WHOLE = ("before its vote", "after its vote", "before the word", "after the word")
"""Points at which all have what they need."""


@pytest.mark.one_in(16)
@pytest.mark.parametrize("fragments", [1, 4])
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("ranks", [4, 5])
@pytest.mark.parametrize("point", OF_AN_ALL_REDUCE)
def test_a_death_in_a_round(point: str, ranks: int, delay: int, fragments: int) -> None:
    run = Run(ranks, {2: (8, point)}, delay=delay, fragments=fragments, meetings=(16,))
    lives = run.go()
    check(run, lives)
    everybody = tuple(range(ranks))
    assert lives[0].applied[4, 0] == everybody
    if "the word" not in point:  # else another may have been first
        assert lives[2].died_at, "it lives"
        if point in WHOLE:
            assert lives[0].applied.get((8, 0)) == everybody, "what all have is applied"
        elif point != "in its second half":
            # that of those that are left, where it dies before it has drawn that step
            assert lives[0].applied.get((8, 0)) != everybody, "what nobody has is dropped"
        left = tuple(rank for rank in everybody if rank != 2)
        assert lives[0].applied[20, 0] == left


@pytest.mark.one_in(3)
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize(
    "points",
    [
        ("between the halves", "between the halves"),
        ("in its second half", "before its vote"),
        ("after its vote", "before its vote"),
        ("before its turn", "before the word"),
    ],
)
def test_two_deaths_in_one_round(points: tuple[str, str], delay: int) -> None:
    run = Run(5, {0: (8, points[0]), 3: (8, points[1])}, delay=delay, fragments=2)
    check(run, run.go())


def test_the_last_one_goes_on_alone_and_makes_the_outer_step() -> None:
    dooms = {0: (4, "between the halves"), 2: (12, "before its vote"), 1: (20, "between the halves")}
    run = Run(4, dooms, meetings=(10, 18, 26), steps=33)
    lives = run.go()
    check(run, lives)
    members = {4: None, 12: (1, 2, 3), 16: None, 20: None, 28: (3,), 32: (3,)}
    assert {step: lives[3].applied.get((step, 0)) for step in members} == members


@pytest.mark.one_in(4)
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("early", [0, 2])
def test_when_a_rank_is_through_early_all_drop_the_rounds_that_are_left(early: int, delay: int) -> None:
    """And have one start after every meeting; one of the others dies meanwhile, or nobody does."""
    for dooms in ({}, {1: (8, "before its turn")}, {1: (12, "before posting")}):
        run = Run(4, dooms, delay=delay, meetings=(10, 21), early={early: 5}, steps=33)
        lives = run.go()
        check(run, lives)
        rounds = {step for step, _ in lives[3].applied}
        assert 4 in rounds
        assert 8 not in rounds, "one waits since step 5"
        assert {24, 28} <= rounds, "all go on after they have met"


def test_too_few_replicas_end_the_run() -> None:
    run = Run(4, {2: (8, "between the halves"), 1: (12, "before posting")}, min_replicas=3, steps=4000)
    for rank, life in enumerate(run.go()):
        if rank in (0, 3):
            assert isinstance(life.error, RunStopped)
            assert "2 of 4 replicas are left, fewer than `min_replicas=3`: " in str(life.error)


def test_votes_are_cleaned_up() -> None:
    run = Run(4, steps=400, period=2)
    check(run, run.go())
    assert run.store.num_keys() < 120, "keys of rounds stay in the store"


@pytest.mark.one_in(8)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_walk_keeps_starts_equal(seed: int) -> None:
    rng = np.random.default_rng([22, seed])
    world_size = int(rng.integers(2, 6))
    period = int(rng.integers(1, 6))
    doomed = rng.permutation(world_size)[: int(rng.integers(1, world_size))]
    at_once, when = rng.random() < 0.3, int(rng.integers(1, 24))
    fragments = int(rng.integers(1, min(period, 4) + 1))
    options: dict[str, Any] = {"early": {int(rng.integers(world_size)): 3}} if rng.random() < 0.3 else {}
    run = Run(
        world_size,
        {
            int(rank): (
                (when if at_once else int(rng.integers(1, 24))) // fragments * fragments,
                str(rng.choice(OF_AN_ALL_REDUCE)),
            )
            for rank in doomed
        },
        period=period,
        delay=int(rng.integers(period)),
        fragments=fragments,
        outer=OuterStep(0.7, 0.9) if rng.random() < 0.5 else OuterStep(),
        steps=26,
        meetings=(9, 18) if rng.random() < 0.7 else (),
        longest=5.0,  # that nobody hangs; how soon the next step comes, each point of death has a test above
        **options,
    )
    check(run, run.go())
