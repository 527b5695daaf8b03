"""LocalSGD and DiLoCo against a replay whose outer optimizer is torch's own (design §12)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from outer_replay import OPTIMIZERS, replay_all_reduce, to_bfloat16
from ranks import Rank, run_ranks
from torch import Tensor, nn

from benchmarks.shared.outer_replay import exactly
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.fragments import strided
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.transport.all_reduce import LinkAllReduce

RANKS, PERIOD, STEPS = 4, 8, 83  # ten rounds, and some steps of the next
SHAPES = {"a.weight": (7, 3), "a.bias": (7,), "b.weight": (5, 7), "c.weight": (1,), "d.weight": (40,), "d.bias": (3, 2)}
SCHEMES = {"LocalSGD": OuterStep(1.0, 0.0), "DiLoCo": OuterStep(0.7, 0.9)}


def initial() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape) for name, shape in SHAPES.items()}


def gradient(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
    """Of a noisy quadratic that differs from rank to rank."""
    return theta - rank + np.random.default_rng([rank, step, theta.size]).normal(size=theta.shape)


class Training:
    """A rank's replica of :func:`initial`, its inner optimizer and its rounds."""

    def __init__(self, rank: Rank, outer: OuterStep, optimizer: str = "adamw", **kwargs: Any) -> None:
        self.rank = rank
        self.model = {name: nn.Parameter(torch.tensor(value)) for name, value in initial().items()}
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.values()))
        reducer = LinkAllReduce(rank.links, rank.control)
        self.rounds = Rounds(
            rank.rank, rank.world_size, kwargs.pop("period", PERIOD), outer, reducer, lambda: self.model, **kwargs
        )
        rank.clock = lambda: self.rounds.step

    def step(self) -> None:
        self.rounds.begin()
        for p in self.model.values():
            p.grad = torch.tensor(gradient(p.detach().numpy(), self.rank.rank, self.rounds.step))
        self.optimizer.step()
        self.rounds.end()

    def state_dict(self) -> dict[str, Any]:
        model = {name: p.detach() for name, p in self.model.items()}
        return {"model": model, "optimizer": self.optimizer.state_dict(), "rounds": self.rounds.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self.model.items():
                p.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rounds.load_state_dict(state["rounds"])

    @property
    def starts(self) -> dict[str, Tensor]:
        return {name: start.clone() for name, start in self.rounds.starts.items()}


def train(outer: OuterStep, optimizer: str = "adamw", ranks: int = RANKS, **kwargs: Any) -> list[Any]:
    """Return each rank's replica and start at the end."""

    def body(rank: Rank) -> Any:
        training = Training(rank, outer, optimizer, **kwargs)
        for _ in range(STEPS):
            training.step()
        replica = {name: p.detach().numpy().copy() for name, p in training.model.items()}
        training.rounds.close()
        return replica, training.starts

    return run_ranks(ranks, body)


def expected(
    outer: OuterStep, optimizer: str, ranks: int = RANKS, delay: int = 0, fragments: int = 1, rounding: Any = exactly
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    dealt = strided({name: int(np.prod(shape)) for name, shape in SHAPES.items()}, fragments)
    parts = {name: part for part, names in enumerate(dealt) for name in names}
    assert set(parts.values()) == set(range(fragments))
    return replay_all_reduce(
        initial(),
        ranks,
        STEPS,
        optimizer,
        gradient,
        period=PERIOD,
        lr=outer.lr,
        momentum=outer.momentum,
        delay=delay,
        parts=parts,
        fragments=fragments,
        rounding=rounding,
    )


def assert_equal_replay(results: list[Any], replay: Any) -> None:
    replicas, common = replay
    for (replica, starts), theirs in zip(results, replicas, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(replica[name], theirs[name], rtol=0, atol=1e-12)
            np.testing.assert_allclose(starts[name], common[name], rtol=0, atol=1e-12)
            assert torch.equal(starts[name], results[0][1][name]), "the start is not common"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("fragments", [1, 4])
@pytest.mark.parametrize("delay", [0, 3, 7])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounds_equal_a_replay_with_torchs_own_outer_optimizer(scheme: str, delay: int, fragments: int) -> None:
    outer = SCHEMES[scheme]
    results = train(outer, delay=delay, fragments=fragments)
    assert_equal_replay(results, expected(outer, "adamw", delay=delay, fragments=fragments))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_inner_optimizer_works(optimizer: str) -> None:
    outer = SCHEMES["DiLoCo"]
    assert_equal_replay(train(outer, optimizer), expected(outer, optimizer))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_number_of_ranks_works(ranks: int) -> None:
    """One replica too makes the outer step; of seven some own no byte of the smallest part."""
    outer = SCHEMES["DiLoCo"]
    assert_equal_replay(
        train(outer, ranks=ranks, fragments=4, delay=2), expected(outer, "adamw", ranks, delay=2, fragments=4)
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("delay", [0, 5])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_starts_are_common_to_the_bit_on_a_16_bit_wire_too(scheme: str, delay: int) -> None:
    outer = SCHEMES[scheme]
    results = train(outer, delay=delay, fragments=4, wire_dtype=torch.bfloat16)
    rounded = expected(outer, "adamw", delay=delay, fragments=4, rounding=to_bfloat16)
    assert_equal_replay(results, rounded)
    unrounded = expected(outer, "adamw", delay=delay, fragments=4)[1]
    assert max(np.abs(rounded[1][name] - unrounded[name]).max() for name in SHAPES) > 1e-5, "nothing was rounded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_are_common_to_the_bit_in_narrow_dtypes(dtype: torch.dtype) -> None:
    def body(rank: Rank) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rank.rank)
        parameter = nn.Parameter(torch.linspace(-3, 3, 200001).to(dtype))  # more than a chunk
        rounds = Rounds(
            rank.rank, 4, 2, OuterStep(0.7, 0.9), LinkAllReduce(rank.links, rank.control), lambda: {"p": parameter}
        )
        for _ in range(9):
            rounds.begin()
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.01)
            rounds.end()
        return {"start": rounds.starts["p"].clone(), "replica": parameter.detach()}

    results = run_ranks(4, body)
    for result in results:
        assert torch.equal(result["start"], results[0]["start"])
        # all have made one step since, on top of the start
        assert (result["replica"].double() - result["start"].double()).abs().max() < 0.3
    assert not torch.equal(results[0]["replica"], results[1]["replica"])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("saved_at", [16, 17, 19, 20, 23, 24])
@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_a_resume_continues_in_mid_round_and_in_mid_flight(saved_at: int, wire_dtype: torch.dtype | None) -> None:
    """Parts of a round are in flight at any of these steps: delay 5 of a period of 8, four parts 2 steps apart."""

    def body(rank: Rank) -> Any:
        kwargs: dict[str, Any] = {"delay": 5, "fragments": 4, "wire_dtype": wire_dtype}
        unbroken = Training(rank, SCHEMES["DiLoCo"], **kwargs)
        for _ in range(saved_at):
            unbroken.step()
        state = unbroken.state_dict()
        in_flight = len(state["rounds"]["in_flight"])
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
        for _ in range(40):
            unbroken.step()
        links_of_another_run(rank)
        resumed = Training(rank, SCHEMES["DiLoCo"], **kwargs)
        resumed.load_state_dict(state)
        assert resumed.rounds.step == saved_at
        for _ in range(40):
            resumed.step()
        for name, value in unbroken.model.items():
            assert torch.equal(value, resumed.model[name])
            assert torch.equal(unbroken.starts[name], resumed.starts[name])
        assert unbroken.rounds.stats.bytes_sent == resumed.rounds.stats.bytes_sent
        assert unbroken.rounds.stats.exchanges == resumed.rounds.stats.exchanges
        return in_flight

    assert set(run_ranks(RANKS, body)) <= {2, 3}


def links_of_another_run(rank: Rank) -> None:
    rank.links.reset(generation=1)
