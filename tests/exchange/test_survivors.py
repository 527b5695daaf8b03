"""Every point of a step and of a meeting at which a rank can die: what those do that are left (control/members.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from survivors import AT_A_MEETING, IN_A_STEP, Run, break_link, check

from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.schedule import Schedule

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEEDS = 60
"""Of the random walk; thirty times as many by ``--long``."""


def of_four(dooms: dict[int, tuple[int, str]], **options: Any) -> Run:
    return Run(4, dooms, ElasticMixing(0.5), lambda: Schedule("matching", seed=3), meetings=(7, 14), **options)


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "links"])
@pytest.mark.parametrize("point", IN_A_STEP)
def test_a_death_in_a_step(point: str, shared_memory: bool) -> None:
    run = of_four({2: (5, point)}, shared_memory=shared_memory)
    lives = run.go()
    check(run, lives)
    if point == "before applying":
        assert any(2 in life.mixed.get(5, ()) for life in lives), "what arrived whole is mixed"
    if point == "before posting":
        assert not any(2 in life.mixed.get(5, ()) for life in lives)


def test_a_death_after_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    dooms = {2: (5, "after its header")}
    break_link(monkeypatch, dooms)
    run = of_four(dooms, shared_memory=False)
    lives = run.go()
    assert lives[2].died_at == 5
    assert not any(2 in life.mixed.get(5, ()) for life in lives), "what did not arrive is not mixed"
    check(run, lives)


@pytest.mark.parametrize("point", AT_A_MEETING)
def test_a_death_at_a_meeting(point: str) -> None:
    run = of_four({1: (7, point)})
    lives = run.go()
    assert lives[1].died_at == 7
    check(run, lives)


def test_a_death_while_the_others_connect_to_it() -> None:
    """Nothing wakes gloo in its constructor: who waits there for one that has given up waits for a time limit."""
    run = of_four({1: (7, "joining the group")}, longest=4.0)
    check(run, run.go())


@pytest.mark.parametrize("points", [("posted", "posted"), ("before applying", "before posting")])
def test_two_deaths_at_once_in_a_step(points: tuple[str, str]) -> None:
    run = of_four({0: (5, points[0]), 3: (5, points[1])})
    check(run, run.go())


@pytest.mark.parametrize(
    "points", [("after its word", "within the collective"), ("within the collective", "within the collective")]
)
def test_two_deaths_at_once_at_a_meeting(points: tuple[str, str]) -> None:
    run = of_four({0: (7, points[0]), 1: (7, points[1])})
    check(run, run.go())


def test_the_last_one_goes_on_alone() -> None:
    run = of_four({rank: (3 + rank, "posted") for rank in range(3)})
    lives = run.go()
    check(run, lives)
    assert lives[3].steps == run.steps


def test_rounds_are_drawn_among_those_that_are_left() -> None:
    run = of_four({2: (5, "posted")}, steps=400)
    lives = run.go()
    check(run, lives)
    lists = [lives[0].drawn[step] for step in range(1, 401)]
    assert lists[4] == (0, 1, 2, 3)
    assert lists[6:7] == [(0, 1, 2, 3)] or lists[6:7] == [(0, 1, 3)]
    assert lists[-1] == (0, 1, 3), "it is drawn no more, at the latest from the meeting on"
    assert lists[8] == (0, 1, 3), "from the meeting after step 7 on"


def test_too_few_replicas_end_the_run_and_name_who_is_missing() -> None:
    run = of_four({2: (5, "posted"), 1: (9, "posted")}, min_replicas=3, steps=3000)
    lives = run.go()
    for rank in (0, 3):
        text = str(lives[rank].error)
        assert text.startswith("2 of 4 replicas are left, fewer than `min_replicas=3`: rank "), text
        assert "rank 2 lost at step" in text
        assert "rank 1 lost at step" in text


RULES: tuple[MixingRule, ...] = (ElasticMixing(0.4), PullMixing(), PushMixing())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SEEDS, 30 * SEEDS))
def test_a_longer_random_walk_keeps_the_invariants(seed: int) -> None:
    test_a_random_walk_keeps_the_invariants(seed)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_walk_keeps_the_invariants(seed: int) -> None:
    rng = np.random.default_rng([19, seed])
    world_size = int(rng.integers(2, 6))
    deaths = int(rng.integers(1, world_size))
    doomed = rng.permutation(world_size)[:deaths]
    at_once = rng.random() < 0.3
    step = int(rng.integers(1, 19))
    dooms = {}
    for rank in doomed:
        when = step if at_once else int(rng.integers(1, 19))
        if rng.random() < 0.3:
            dooms[int(rank)] = ((6, 12)[int(rng.integers(2))], str(rng.choice(AT_A_MEETING)))
        else:
            dooms[int(rank)] = (when, str(rng.choice(IN_A_STEP)))
    period = int(rng.integers(1, 4))
    peers = str(rng.choice(["matching", "uniform", "ring"]))
    run = Run(
        world_size,
        dooms,
        RULES[int(rng.integers(3))],
        lambda: Schedule(peers, period=period, seed=seed),
        steps=18,
        delay=int(rng.integers(period)),
        shared_memory=bool(rng.random() < 0.5),
        meetings=(6, 12),
        longest=5.0,  # that nobody hangs; how soon the next step comes, each point of death has a test above
    )
    check(run, run.go())
