"""Members in a plain loop: ranks of `Gossip` that are killed at every point, and come back (control/members.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loops import (
    AS_A_DONOR,
    AT_A_CONSENSUS,
    EVERY,
    IN_A_STEP,
    Loops,
    Stay,
    Theta,
    check,
    ended,
    has_joined,
    replayed_asynchronously,
)
from torch import nn
from torch.distributed import HashStore

from lightning_gossip import Gossip
from lightning_gossip.control.stop import RunStopped

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def after(steps: int) -> Any:
    return lambda loops: max(stay.steps for stay in loops.stays) >= steps


def test_without_a_loss_it_equals_the_replay_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = Loops(monkeypatch, 4, {}, after(40)).go()
    stays = check(loops)
    assert [sorted(stay.mixed) for stay in stays] == [list(range(1, stays[0].steps + 1))] * 4
    assert {stay.members for stay in stays} == {(0, 1, 2, 3)}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("point", [*IN_A_STEP, *AT_A_CONSENSUS])
def test_the_others_go_on_without_one_that_dies(monkeypatch: pytest.MonkeyPatch, point: str, rank: int) -> None:
    step = 2 * EVERY + (5 if point in IN_A_STEP else 0)
    loops = Loops(monkeypatch, 4, {rank: [(step, point)]}, after(8 * EVERY)).go()
    stays = check(loops)
    assert sorted(stay.rank for stay in stays) == sorted({0, 1, 2, 3} - {rank})
    assert {stay.members for stay in stays} == {tuple(k for k in range(4) if k != rank)}
    assert stays[0].seen[EVERY][0] == (0, 1, 2, 3)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "links"])
@pytest.mark.parametrize("rank", [0, 2])
def test_one_comes_back_as_its_donor_is(monkeypatch: pytest.MonkeyPatch, rank: int, shared_memory: bool) -> None:
    loops = Loops(
        monkeypatch,
        4,
        {rank: [(5, "posted"), None]},
        lambda loops: has_joined(loops, rank),
        shared_memory=shared_memory,
    ).go()
    stays = check(loops)
    assert_given_as_served(loops)
    [back] = [stay for stay in stays if stay.rank == rank]
    assert back.given is not None
    assert back.given["from"] == (1 if rank == 0 else 0)
    others = [k for k in range(4) if k != rank]
    assert {stay.members for stay in stays} == {(*others, rank)}, "who joined comes last"


def assert_given_as_served(loops: Loops) -> None:
    """Whoever joined began as its donor was, bit for bit, optimizer and clock included."""
    joined = [stay for stay in loops.stays if stay.given is not None]
    assert joined
    for stay in joined:
        served = [state for (seat, _), state in loops.given if seat == stay.rank]
        assert any(
            all(torch.equal(state["module"][name], value) for name, value in stay.given["module"].items())
            and torch.equal(momentum(state["state"]), momentum(stay.given))
            and state["exchange"]["step"] == stay.given["step"]
            for state in served
            if stay.given is not None
        )


def momentum(state: Any) -> torch.Tensor:
    buffer: torch.Tensor = state["optimizer"]["state"][0]["momentum_buffer"]
    return buffer


@pytest.mark.parametrize("point", AS_A_DONOR)
def test_the_donor_dies_and_another_serves(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    lives: dict[int, Any] = {2: [(5, "posted"), None], 0: [(1, point)]}
    loops = Loops(monkeypatch, 4, lives, lambda loops: has_joined(loops, 2)).go()
    stays = check(loops)
    assert_given_as_served(loops)
    assert sorted(stay.rank for stay in stays) == [1, 2, 3]
    assert [stay.given["from"] for stay in stays if stay.given is not None] == [1]


def test_all_but_one_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    lives: dict[int, Any] = {k: [(5 + k, "posted"), None] for k in range(3)}
    loops = Loops(monkeypatch, 4, lives, lambda loops: all(has_joined(loops, k) for k in range(3))).go()
    assert sorted(stay.rank for stay in check(loops)) == [0, 1, 2, 3]


@pytest.mark.parametrize("point", AT_A_CONSENSUS)
def test_one_dies_at_a_consensus_and_comes_back(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    loops = Loops(monkeypatch, 3, {1: [(2 * EVERY, point), None]}, lambda loops: has_joined(loops, 1)).go()
    assert len(check(loops)) == 3
    assert_given_as_served(loops)


def test_who_finds_itself_declared_lost_joins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(loops: Loops) -> bool:
        first = next(stay for stay in loops.stays if stay.rank == 0)
        if first.steps >= 2 * EVERY:
            first.gossip._run.control.declare_lost(2, "a test said so") if len(loops.stays) == 3 else None
        return has_joined(loops, 2)

    loops = Loops(monkeypatch, 3, {2: [None, None]}, ends).go()
    assert len(ended(loops)) == 3
    assert [type(stay.error).__name__ for stay in loops.stays if stay.error is not None] == ["SeatLost"]
    assert_given_as_served(loops)


def test_fewer_than_min_replicas_end_all_with_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lives: dict[int, Any] = {1: [(15, "posted")], 3: [(25, "before posting")]}
    loops = Loops(monkeypatch, 4, lives, lambda loops: False, min_replicas=3).go()
    errors = [stay.error for stay in loops.stays if stay.rank in (0, 2)]
    assert [type(error) for error in errors] == [RunStopped, RunStopped]
    [text] = {str(error) for error in errors}
    assert "2 of 4 replicas are left, fewer than `min_replicas=3`" in text
    assert "rank 1 lost" in text
    assert "rank 3 lost" in text


@pytest.mark.one_in(3)
@pytest.mark.parametrize("point", ["posted", "before its word", "within the collective"])
def test_the_others_go_on_at_their_own_pace(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    loops = Loops(monkeypatch, 4, {1: [(2 * EVERY, point)]}, after(8 * EVERY), asynchronous=True, peers="uniform").go()
    stays = ended(loops)
    theta = replayed_asynchronously(loops)
    assert [stay.members for stay in stays] == [(0, 2, 3)] * 3
    for stay in stays:
        assert stay.ends_with is not None
        np.testing.assert_allclose(stay.ends_with, theta[stay.rank], rtol=0, atol=1e-12)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("variant", ["elastic", "pull", "push"])
def test_asynchronous_ranks_die_and_come_back(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    lives: dict[int, Any] = {0: [(15, "posted"), None], 2: [(2 * EVERY, "within the collective"), None]}
    loops = Loops(
        monkeypatch,
        4,
        lives,
        lambda loops: has_joined(loops, 0) and has_joined(loops, 2),
        asynchronous=True,
        peers="uniform",
        variant=variant,
    ).go()
    assert len(ended(loops)) == 4
    assert_given_as_served(loops)


class Epochs(Loops):
    """Loops over epochs, which end for all at a consensus; who joins begins with its donor's epoch."""

    def _train(self, stay: Stay) -> None:
        model = Theta(stay.rank)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        epoch = 0
        where: dict[str, Any] = {"store": self.store, "rank": stay.rank, "world_size": self.size}
        gossip = Gossip(model, **where, **self.options, state=lambda: {"epoch": epoch})
        stay.gossip, stay.given = gossip, gossip.given
        epoch = (gossip.given or {"epoch": 0})["epoch"]
        while not (epoch and self._decide(epoch)):
            for _ in range(EVERY):
                with gossip.step():
                    stay.dies("posted", gossip.steps)
                    model.theta.grad = model.theta.detach() - stay.rank
                    optimizer.step()
                stay.mixed[gossip.steps] = ()
            with gossip.consensus():
                stay.seen[epoch] = gossip.members, model.theta.detach().numpy().copy()
            epoch += 1
        gossip.adopt_consensus()
        gossip.close()
        stay.ends_with, stay.steps = model.theta.detach().numpy().copy(), gossip.steps


def test_a_loop_over_epochs_waits_for_one_that_begins_within_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = Epochs(monkeypatch, 3, {1: [(2 * EVERY + 3, "posted"), None]}, lambda loops: has_joined(loops, 1)).go()
    stays = ended(loops)
    assert len(stays) == 3
    for epoch in range(max(max(stay.seen) for stay in stays) + 1):
        seen = [stay.seen[epoch] for stay in stays if epoch in stay.seen]
        assert all(members == seen[0][0] and np.array_equal(model, seen[0][1]) for members, model in seen)
    first, *others = [stay.ends_with for stay in stays if stay.ends_with is not None]
    assert all(np.array_equal(first, other) for other in others)
    assert len({stay.steps for stay in stays}) == 1


SEEDS = 6
"""Of the random walk; twenty times as many by ``--long``."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "seed", [pytest.param(k, marks=[pytest.mark.long] if k >= SEEDS else []) for k in range(20 * SEEDS)]
)
def test_a_random_walk(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Deaths at any point, of donors and of those that have just joined; one rank at least is never killed."""
    rng = np.random.default_rng([7, seed])
    size = int(rng.integers(2, 6))
    lives: dict[int, Any] = {}
    for rank in rng.permutation(size)[: int(rng.integers(1, size))].tolist():
        points = [*IN_A_STEP, *AT_A_CONSENSUS, *AS_A_DONOR]
        dooms = [(int(rng.integers(1, 60)), str(rng.choice(points)))]
        dooms += [(0, str(rng.choice([*IN_A_STEP, *AT_A_CONSENSUS]))) for _ in range(int(rng.integers(0, 3)))]
        lives[rank] = [*dooms, None] if rng.random() < 0.8 else dooms
    period = int(rng.integers(1, 4))
    scheme = {
        "peers": str(rng.choice(["matching", "uniform", "ring"])),
        "period": period,
        "shared_memory": bool(rng.random() < 0.5),
        "seed": seed,
    }
    check(Loops(monkeypatch, size, lives, everybody_is_settled, **scheme).go())


def everybody_is_settled(loops: Loops) -> bool:
    last = {stay.rank: stay for stay in loops.stays}
    if max(stay.steps for stay in loops.stays) < 150:
        return False
    return all(
        len([other for other in loops.stays if other.rank == rank]) == len(loops.lives.get(rank, (None,)))
        if stay.died_at
        else stay.steps >= stay.began_after + EVERY >= EVERY
        for rank, stay in last.items()
    )


def test_one_that_comes_when_training_is_over_ends_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loops = Loops(monkeypatch, 2, {1: [(5, "posted")]}, after(2 * EVERY)).go()
    assert len(check(loops)) == 1
    loops.here.process = "threads|1|1"
    with pytest.raises(SystemExit) as ending:
        Gossip(nn.Linear(2, 2), min_replicas=1, store=loops.store, rank=1, world_size=2)
    assert ending.value.code == 0
    assert "rank 1: the training is over: it ended at step" in capsys.readouterr().err


def test_a_joiner_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[BaseException] = []
    loops = Loops(monkeypatch, 3, {2: [(5, "posted"), None]}, lambda loops: bool(refused))
    train = loops._train

    def training(stay: Any) -> None:
        try:
            if len([s for s in loops.stays if s.rank == 2]) == 2 and stay.rank == 2:
                Gossip(
                    nn.Linear(2, 2), "pull", min_replicas=1, store=loops.store, rank=2, world_size=3, probability=0.5
                )
            train(stay)
        except RuntimeError as error:
            refused.append(error)
            raise

    vars(loops)["_train"] = training
    loops.go()
    [error] = refused
    assert "rank 2 can not join: it differs from those that train. the rule is ('pull',) here" in str(error)
    assert "`probability` is 0.5 here but 1.0 there" in str(error)
    assert "parameter 'theta' is missing here" in str(error)
    assert sorted(stay.rank for stay in loops.stays if stay.ends_with is not None) == [0, 1]


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(143)])
def test_one_that_ends_by_an_error_leaves_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    loops = Loops(monkeypatch, 3, {}, after(4 * EVERY))
    loops.raises = {1: (15, error)}
    loops.go()
    [failed] = [stay for stay in loops.stays if stay.error is not None]
    assert failed.error is error
    assert [stay.members for stay in loops.stays if stay.ends_with is not None] == [(0, 2)] * 2
    told = [str(change) for change in loops.stays[0].gossip._run.control.changes]
    assert told == [f"rank 1 left at step 15 ({type(error).__name__}: {error})"]


def test_ctrl_c_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = Loops(monkeypatch, 3, {}, lambda loops: False)
    loops.raises = {1: (15, KeyboardInterrupt())}
    loops.go()
    assert [type(stay.error) for stay in loops.stays] == [KeyboardInterrupt] * 3


def test_a_state_that_does_not_travel_is_refused_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = Loops(monkeypatch, 2, {}, lambda loops: False)
    loops.also = {"loop": loops.go}
    loops.go()
    texts = {str(stay.error) for stay in loops.stays}
    assert [type(stay.error) for stay in loops.stays] == [ValueError] * 2
    assert all("`state` must return tensors, numbers, strings" in text for text in texts)


def test_other_models_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = Loops(monkeypatch, 2, {}, lambda loops: False)
    loops.model = lambda rank: Theta(rank) if rank == 0 else Theta(rank).float()
    loops.go()
    assert all("the ranks have different models: parameter 'theta' is" in str(stay.error) for stay in loops.stays)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"min_replicas": 0}, "`min_replicas` must be an integer of at least 1, got 0"),
        ({"min_replicas": 4}, "`min_replicas` must be an integer from 1 to 3 \\(the number of ranks\\), got 4"),
        ({"min_replicas": None}, "`store` needs `min_replicas`"),
        ({"rank": 3}, "`rank` must be an integer from 0 to 2 \\(with `store`\\), got 3"),
        ({"rank": None}, "`rank` must be"),
        ({"world_size": None}, "`world_size` must be an integer of at least 1 \\(with `store`\\), got None"),
        ({"store": None}, "`rank` and `world_size` go with `store`, got 0 and 3 without one"),
        ({"lost_after": 3}, "`lost_after` must be a positive datetime.timedelta, got 3"),
        ({"process_group": object()}, "give `store` or `process_group`, not both"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"min_replicas": 2, "store": HashStore(), "rank": 0, "world_size": 3} | arguments
    with pytest.raises(ValueError, match=told):
        Gossip(nn.Linear(2, 2), **given)
