"""Elastic gossip with an outer step against its replay, and what must hold of the mean (design §12)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ranks as ranks_module
import torch
from outer_replay import OPTIMIZERS, replay_gossip, to_bfloat16
from ranks import Rank, run_ranks
from torch import nn

from benchmarks.shared.outer_replay import exactly
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.all_reduce import LinkAllReduce

RANKS, SIZE, STEPS = 5, 6, 60


@pytest.fixture(params=[True, False], ids=["shared memory", "links"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "SHARED_MEMORY", request.param)


def initial(rank: int) -> np.ndarray:
    return np.random.default_rng(rank).normal(size=SIZE)


def gradient(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
    """Of a noisy quadratic that differs from rank to rank; linear, and as steep on all."""
    return theta - rank + np.random.default_rng([rank, step]).normal(size=theta.shape)


class Replica:
    """One rank's parameter, inner optimizer and exchange."""

    def __init__(self, rank: Rank, optimizer: str, outer: OuterStep | None, schedule: Schedule, **kwargs: Any) -> None:
        self.rank = rank.rank
        self.parameter = nn.Parameter(torch.tensor(kwargs.pop("start", initial(rank.rank))))
        self.optimizer = OPTIMIZERS[optimizer]([self.parameter])
        alpha = kwargs.pop("alpha", 0.3)
        self.exchange: Any = rank.exchange(
            schedule, ElasticMixing(alpha), {"theta": self.parameter}, outer=outer, **kwargs
        )

    def step(self) -> None:
        self.exchange.begin()
        theta = self.parameter.detach().numpy()
        self.parameter.grad = torch.tensor(gradient(theta, self.rank, self.exchange.step))
        self.optimizer.step()
        self.exchange.end()

    def train(self, steps: int = STEPS) -> np.ndarray:
        for _ in range(steps):
            self.step()
        return self.parameter.detach().numpy().copy()


def train(optimizer: str, outer: OuterStep | None, schedule: Callable[[], Schedule], **kwargs: Any) -> np.ndarray:
    return np.stack(run_ranks(RANKS, lambda rank: Replica(rank, optimizer, outer, schedule(), **kwargs).train()))


def expected(
    optimizer: str, outer: OuterStep, schedule: Schedule, delay: int = 0, rounding: Any = exactly
) -> np.ndarray:
    choices = {t: schedule.choices(t, RANKS).copy() for t in range(1, STEPS + 1) if schedule.is_round(t)}
    return replay_gossip(
        [initial(rank) for rank in range(RANKS)],
        choices,
        STEPS,
        optimizer,
        gradient,
        alpha=0.3,
        lr=outer.lr,
        momentum=outer.momentum,
        delay=delay,
        rounding=rounding,
    )[0]


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gossip_with_an_outer_step_equals_its_replay(optimizer: str, delay: int) -> None:
    """Uniform choices: none, one or several partners in a round."""

    def schedule() -> Schedule:
        return Schedule("uniform", probability=0.7, period=4, seed=3)

    outer = OuterStep(0.7, 0.9)
    actual = train(optimizer, outer, schedule, delay=delay)
    np.testing.assert_allclose(actual, expected(optimizer, outer, schedule(), delay), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("lr", "momentum"), [(0.5, 0.0), (1.0, 0.5), (1.0, 0.0)])
def test_other_rates_and_momenta_equal_their_replay(lr: float, momentum: float) -> None:
    def schedule() -> Schedule:
        return Schedule("matching", period=3)

    outer = OuterStep(lr, momentum)
    actual = train("adamw", outer, schedule)
    np.testing.assert_allclose(actual, expected("adamw", outer, schedule()), rtol=0, atol=1e-12)
    if outer.is_plain:
        np.testing.assert_allclose(actual, train("adamw", None, schedule), rtol=0, atol=1e-12)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_16_bit_wire_equals_its_replay(delay: int) -> None:
    def schedule() -> Schedule:
        return Schedule("uniform", probability=0.7, period=4, seed=3)

    outer = OuterStep(0.7, 0.9)
    actual = train("adamw", outer, schedule, wire_dtype=torch.bfloat16, delay=delay)
    rounded = expected("adamw", outer, schedule(), delay, to_bfloat16)
    np.testing.assert_allclose(actual, rounded, rtol=0, atol=1e-12)
    assert np.abs(rounded - expected("adamw", outer, schedule(), delay)).max() > 1e-4


@pytest.mark.one_in(2)
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize(
    ("peers", "ranks", "probability"),
    [("matching", 5, 0.5), ("uniform", 5, 1.0), ("weighted", 5, 0.7), ("ring", 5, 1.0), ("exponential", 4, 0.5)],
)
@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_mean_makes_diloco_s_step_on_the_mean_drift(
    peers: str, ranks: int, probability: float, delay: int, gamma: float
) -> None:
    """Gradients are linear and equally steep, so the mean replica trains as one replica on the mean gradient does."""
    outer = OuterStep(0.7, gamma)

    def body(rank: Rank) -> np.ndarray:
        schedule = Schedule(peers, probability, period=4, seed=1)
        return Replica(rank, "nesterov", outer, schedule, delay=delay, alpha=0.5).train()

    actual = np.stack(run_ranks(ranks, body))
    [mean], _, _ = replay_gossip(
        [np.mean([initial(rank) for rank in range(ranks)], axis=0)],
        {t: np.array([-1]) for t in range(4, STEPS + 1, 4)},
        STEPS,
        "nesterov",
        lambda theta, _, step: np.mean([gradient(theta, rank, step) for rank in range(ranks)], axis=0),
        alpha=0.5,
        lr=0.7,
        momentum=gamma,
        delay=delay,
    )
    np.testing.assert_allclose(actual.mean(axis=0), mean, rtol=0, atol=1e-12)
    assert np.abs(actual - mean).max() > 1e-2, "the replicas differ"


@pytest.mark.parametrize("delay", [0, 3])
def test_two_ranks_that_meet_in_every_round_train_as_under_diloco(delay: int) -> None:
    outer = OuterStep(0.7, 0.9)
    start = initial(0)

    def gossip(rank: Rank) -> np.ndarray:
        schedule = Schedule("matching", period=4)
        return Replica(rank, "adamw", outer, schedule, alpha=0.5, delay=delay, start=start).train()

    def all_reduced(rank: Rank) -> np.ndarray:
        replica = Replica(rank, "adamw", None, Schedule(period=4), start=start)
        reducer = LinkAllReduce(rank.links, rank.control)
        parameters = {"theta": replica.parameter}
        replica.exchange = Rounds(rank.rank, 2, 4, outer, reducer, lambda: parameters, delay=delay)
        return replica.train()

    np.testing.assert_allclose(run_ranks(2, gossip), run_ranks(2, all_reduced), rtol=0, atol=1e-12)


def test_one_replica_makes_the_outer_step_and_sends_nothing() -> None:
    def body(rank: Rank) -> tuple[np.ndarray, int]:
        replica = Replica(rank, "sgd", OuterStep(0.7, 0.9), Schedule(period=4))
        return replica.train(), replica.exchange.stats.bytes_sent

    [(theta, sent)] = run_ranks(1, body)
    rounds = {t: np.array([-1]) for t in range(4, STEPS + 1, 4)}
    replay = replay_gossip([initial(0)], rounds, STEPS, "sgd", gradient, alpha=0.5, lr=0.7, momentum=0.9, delay=0)
    np.testing.assert_allclose(theta, replay[0][0], rtol=0, atol=1e-12)
    assert sent == 0


def test_a_parameter_that_unfreezes_begins_where_it_is() -> None:
    def body(rank: Rank) -> list[float]:
        moving, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.full((2,), 5.0), requires_grad=False)
        parameters = {"moving": moving, "late": late}
        exchange = rank.exchange(Schedule(period=2), ElasticMixing(0.5), parameters, outer=OuterStep(0.5, 0.9))
        for step in range(1, 5):
            late.requires_grad_(step > 3)
            exchange.begin()
            with torch.no_grad():
                for parameter in (moving, late):
                    parameter.add_(float(parameter.requires_grad))
            exchange.end()
        return [moving[0].item(), late[0].item()]

    # late: no drift before its first round, at which it begins; moving: η (Δ + γ v) for 1, then for what came since
    moving, late = run_ranks(2, body)[0]
    assert late == 6.0
    first = 0.5 * (1 + 0.9)
    drift = 1 + 1
    assert moving == pytest.approx(first + 0.5 * (drift + 0.9 * (0.9 + drift)) + 1)


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("saved_at", [16, 17, 18, 19])
def test_a_resume_continues_in_mid_round_and_in_mid_flight(saved_at: int, wire_dtype: torch.dtype | None) -> None:
    """Rounds of a period of 4, in flight for 2 steps; some ranks are without a partner, and in flight all the same."""

    def body(rank: Rank) -> bool:
        def replica() -> Replica:
            schedule = Schedule("uniform", probability=0.6, period=4, seed=5)
            return Replica(rank, "sgd", OuterStep(0.7, 0.9), schedule, delay=2, wire_dtype=wire_dtype)

        unbroken = replica()
        unbroken.train(saved_at)
        theta = unbroken.parameter.detach().clone()
        torch.save(unbroken.exchange.state_dict(), file := io.BytesIO())
        unbroken.train(20)
        file.seek(0)
        rank.links.reset(1)
        resumed = replica()
        with torch.no_grad():
            resumed.parameter.copy_(theta)
        resumed.exchange.load_state_dict(torch.load(file, weights_only=True))
        in_flight = resumed.exchange.in_flight
        resumed.train(20)
        assert torch.equal(unbroken.parameter, resumed.parameter)
        return in_flight

    assert run_ranks(RANKS, body) == [saved_at in (16, 17)] * RANKS


def test_what_is_in_flight_is_not_taken_over_with_another_outer_step() -> None:
    def body(rank: Rank) -> None:
        def exchange(outer: OuterStep | None) -> Exchange:
            parameters = {"theta": nn.Parameter(torch.ones(3))}
            return rank.exchange(Schedule(period=2), ElasticMixing(0.5), parameters, delay=1, outer=outer)

        for before, after in ((None, OuterStep(0.7, 0.9)), (OuterStep(0.7, 0.9), None)):
            first = exchange(before)
            for _ in range(2):
                first.begin()
                first.end()
            with pytest.raises(ValueError, match="`outer_lr` and `outer_momentum` have to be as they were"):
                exchange(after).load_state_dict(first.state_dict())
            rank.links.reset(1 if before is None else 2)

    run_ranks(2, body)
