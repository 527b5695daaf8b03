"""The update rules of design §3 against an independent numpy replay, and what must hold of the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from ranks import Rank, run_ranks
from torch import nn

from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.schedule import Schedule

STEPS, RANKS, SIZE = 50, 5, 6

Optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-weight-decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}
RULES: dict[str, MixingRule] = {"elastic": ElasticMixing(0.3), "pull": PullMixing(), "push": PushMixing()}


@pytest.fixture(params=[True, False], ids=["shared memory", "links"], autouse=True)
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SHARED_MEMORY", request.param)


class NumpyOptimizer:
    """The optimizers again, from their papers, in numpy: returns what a step adds to the parameters."""

    def __init__(self, name: str) -> None:
        self.name, self.t = name, 0
        self.m = self.v = np.zeros(SIZE)

    def __call__(self, theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self.t += 1
        if self.name == "sgd":
            return -0.1 * gradient
        if self.name == "sgd-weight-decay":
            return -0.1 * (gradient + 0.05 * theta)
        if self.name == "nesterov":
            self.m = gradient if self.t == 1 else 0.9 * self.m + gradient
            return -0.05 * (gradient + 0.9 * self.m)
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        scaled = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        return -0.05 * scaled - (0.05 * 0.1 * theta if self.name == "adamw" else 0)


def initial(rank: int) -> np.ndarray:
    return np.random.default_rng(rank).normal(size=SIZE)


def gradient(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
    """Of a noisy quadratic that differs from rank to rank."""
    return theta - rank + np.random.default_rng([rank, step]).normal(size=SIZE)


def replay(
    rule: str, optimizer: str, choices: dict[int, np.ndarray], delay: int, rounding: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Design §3, word by word, all ranks in one loop."""
    theta = [initial(rank) for rank in range(RANKS)]
    optimizers = [NumpyOptimizer(optimizer) for _ in range(RANKS)]
    due: dict[int, list[np.ndarray]] = {}
    for t in range(1, STEPS + 1):
        s = [rounding(x) for x in theta]
        u = [optimizers[i](theta[i], gradient(theta[i], i, t)) for i in range(RANKS)]
        moves = [np.zeros(SIZE) for _ in range(RANKS)]
        for i in range(RANKS):
            chosen = choices[t][i]
            choosers = [k for k in range(RANKS) if choices[t][k] == i]
            if rule == "elastic":
                partners, weight = sorted(set(choosers) | ({chosen} if chosen >= 0 else set())), 0.3
            elif rule == "pull":
                partners, weight = ([chosen] if chosen >= 0 else []), 0.5
            else:
                partners, weight = choosers, 1 / (len(choosers) + 1)
            for k in partners:
                moves[i] = moves[i] + (s[i] - s[k])
            moves[i] = weight * moves[i]
        due[t + delay] = moves
        theta = [theta[i] + u[i] - (due[t][i] if t in due else 0) for i in range(RANKS)]
    return np.stack(theta)


def train(optimizer: str, rule: MixingRule, schedule: Callable[[], Schedule], **kwargs: Any) -> np.ndarray:
    """The same run through the package, one thread a rank."""

    def body(rank: Rank) -> np.ndarray:
        parameter = nn.Parameter(torch.tensor(initial(rank.rank)))
        optim = Optimizers[optimizer]([parameter])
        exchange = rank.exchange(schedule(), rule, {"theta": parameter}, **kwargs)
        for t in range(1, STEPS + 1):
            exchange.begin()
            parameter.grad = torch.tensor(gradient(parameter.detach().numpy(), rank.rank, t))
            optim.step()
            exchange.end()
            assert exchange.step == t
        return parameter.detach().numpy().copy()

    return np.stack(run_ranks(RANKS, body))


def choices_of(schedule: Schedule) -> dict[int, np.ndarray]:
    return {t: schedule.choices(t, RANKS).copy() for t in range(1, STEPS + 1)}


def exactly(x: np.ndarray) -> np.ndarray:
    return x


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even at 8 bits of significand, in integer arithmetic on float64."""
    bits = x.astype(np.float64).view(np.uint64)
    half, odd = np.uint64(1 << 44), (bits >> np.uint64(45)) & np.uint64(1)
    return (((bits + half - np.uint64(1) + odd) >> np.uint64(45)) << np.uint64(45)).view(np.float64)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("optimizer", Optimizers)
@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_their_replay(rule: str, optimizer: str) -> None:
    def schedule() -> Schedule:
        return Schedule("uniform", probability=0.7, seed=3)

    choices = choices_of(schedule())
    assert any(np.bincount(c[c >= 0], minlength=RANKS).max() >= 2 for c in choices.values()), "no rank chosen twice"
    expected = replay(rule, optimizer, choices, 0, exactly)
    np.testing.assert_allclose(train(optimizer, RULES[rule], schedule), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd-weight-decay", "adamw"])
@pytest.mark.parametrize("rule", RULES)
def test_delayed_rules_equal_their_replay(rule: str, optimizer: str) -> None:
    def schedule() -> Schedule:
        return Schedule("uniform", probability=0.7, period=4, seed=3)

    expected = replay(rule, optimizer, choices_of(schedule()), 3, exactly)
    np.testing.assert_allclose(train(optimizer, RULES[rule], schedule, delay=3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_16_bit_wire_equals_its_replay(rule: str) -> None:
    def schedule() -> Schedule:
        return Schedule("uniform", probability=0.7, seed=3)

    expected = replay(rule, "nesterov", choices_of(schedule()), 0, bfloat16)
    actual = train("nesterov", RULES[rule], schedule, wire_dtype=torch.bfloat16)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
    assert np.abs(expected - replay(rule, "nesterov", choices_of(schedule()), 0, exactly)).max() > 1e-4


def drift(
    rank: Rank, rule: MixingRule, peers: str, steps: int, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> list[np.ndarray]:
    """Replicas that only gossip; returns this rank's parameters before the first and after every step."""
    generator = np.random.default_rng(rank.rank)
    parameter = nn.Parameter(torch.tensor(generator.normal(size=2000), dtype=dtype))
    exchange = rank.exchange(Schedule(peers, seed=1), rule, {"theta": parameter}, **kwargs)
    history = [parameter.detach().numpy().copy()]
    for _ in range(steps):
        exchange.begin()
        exchange.end()
        history.append(parameter.detach().numpy().copy())
    return history


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rule", "peers"), [(ElasticMixing(0.3), "uniform"), (ElasticMixing(0.5), "matching"), (PullMixing(), "matching")]
)
def test_the_mean_is_preserved(rule: MixingRule, peers: str, wire_dtype: torch.dtype | None) -> None:
    histories = np.stack(run_ranks(4, lambda rank: drift(rank, rule, peers, 30, wire_dtype=wire_dtype)))
    means = histories.astype(np.float64).mean(axis=0)
    assert np.abs(means - means[0]).max() < 1e-6, "30 roundings of float32 at most"
    assert np.abs(histories[:, -1] - histories[:, 0]).max() > 0.5, "replicas did move"


def test_two_replicas_meet_at_one_half() -> None:
    first, second = run_ranks(2, lambda rank: drift(rank, ElasticMixing(0.5), "matching", 1))
    np.testing.assert_allclose(first[1], second[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(first[1], (first[0] + second[0]) / 2, rtol=0, atol=1e-6)


def test_consensus_distance_falls_at_the_rate_of_theory() -> None:
    """Matching of n ranks, α = ½: E‖·‖² of the disagreement shrinks by 1 − n/(2(n−1)) a round, each pair averaging.

    A pair's difference d_i − d_k vanishes; over a random perfect matching, E[Σ‖d_i‖²] falls by ½·E‖d_i − d_k‖²·n/2
    with E‖d_i − d_k‖² = 2·Σ‖d‖²/(n − 1).
    """
    n, steps = 6, 60
    rate = 1 - n / (2 * (n - 1))
    histories = np.stack(run_ranks(n, lambda rank: drift(rank, ElasticMixing(0.5), "matching", steps, torch.float64)))
    squared = ((histories - histories.mean(axis=0)) ** 2).sum(axis=(0, 2))
    measured = [squared[t + 1] / squared[t] for t in range(steps) if squared[t] > 1e-20 * squared[0]]
    # mean of the ratio over independent matchings; its standard deviation is below 0.25
    assert len(measured) > 30
    assert abs(np.mean(measured) - rate) < 4 * 0.25 / len(measured) ** 0.5


def test_several_dtypes_travel_together_and_only_trainable_parameters() -> None:
    def body(rank: Rank) -> dict[str, torch.Tensor]:
        value = float(rank.rank)
        parameters = {
            "double": nn.Parameter(torch.full((3, 2), value, dtype=torch.float64)),
            "single": nn.Parameter(torch.full((5,), value)),
            "half": nn.Parameter(torch.full((2, 2), value, dtype=torch.bfloat16)),
            "frozen": nn.Parameter(torch.full((4,), value), requires_grad=False),
            "complex": nn.Parameter(torch.full((2,), value * 1j)),
            "scalar": nn.Parameter(torch.tensor(value)),
            "transposed": nn.Parameter(torch.full((2, 3), value).t()),
            "empty": nn.Parameter(torch.empty(0)),
        }
        exchange = rank.exchange(Schedule("matching"), ElasticMixing(0.5), parameters)
        exchange.begin()
        exchange.end()
        assert exchange.stats.exchanges == 1
        # segments begin on cache lines: 48 B of float64, (5 + 1 + 6) × 4 B, 8 B of bfloat16, 16 B of complex64
        assert exchange.stats.bytes_sent == 4 * 64
        return {name: parameter.detach() for name, parameter in parameters.items()}

    for rank, result in enumerate(run_ranks(2, body)):
        for name, tensor in result.items():
            expected = rank if name == "frozen" else 0.5j if name == "complex" else 0.5
            assert (tensor == expected).all(), name


def test_a_parameter_that_unfreezes_begins_to_travel_and_no_gradient_at_all_is_fine() -> None:
    def body(rank: Rank) -> list[float]:
        parameter = nn.Parameter(torch.full((2,), float(rank.rank)), requires_grad=False)
        exchange = rank.exchange(Schedule("matching"), ElasticMixing(0.5), {"theta": parameter})
        values = []
        for step in range(2):
            parameter.requires_grad_(step == 1)
            exchange.begin()
            exchange.end()
            values.append(parameter.detach()[0].item())
        return values

    assert run_ranks(2, body) == [[0.0, 0.5], [1.0, 0.5]]


def test_a_16_bit_wire_halves_the_bytes() -> None:
    def body(rank: Rank, wire_dtype: torch.dtype | None) -> int:
        parameters = {"theta": nn.Parameter(torch.zeros(1024))}
        exchange = rank.exchange(Schedule("matching"), ElasticMixing(0.5), parameters, wire_dtype=wire_dtype)
        exchange.begin()
        exchange.end()
        return exchange.stats.bytes_sent

    assert run_ranks(2, lambda rank: body(rank, None)) == [4096, 4096]
    assert run_ranks(2, lambda rank: body(rank, torch.bfloat16)) == [2048, 2048]
    assert run_ranks(2, lambda rank: body(rank, torch.float16)) == [2048, 2048]


def test_delay_is_bounded_by_the_period() -> None:
    def body(rank: Rank) -> str:
        with pytest.raises(ValueError, match=r"`delay` must be an integer from 0 to 3 .*period - 1.*, got 4") as error:
            rank.exchange(Schedule(period=4), ElasticMixing(0.5), {}, delay=4)
        return str(error.value)

    run_ranks(1, body)


def test_what_was_in_flight_is_not_taken_for_another_dtype() -> None:
    """bfloat16 and float16 take the same bytes, as do parameters of one and wires of the other."""

    def body(rank: Rank) -> None:
        def exchange(wire_dtype: torch.dtype | None, dtype: torch.dtype = torch.float32) -> Exchange:
            parameters = {"theta": nn.Parameter(torch.full((32,), float(rank.rank), dtype=dtype))}
            return rank.exchange(Schedule(period=2), ElasticMixing(0.5), parameters, delay=1, wire_dtype=wire_dtype)

        before = exchange(torch.bfloat16)
        for _ in range(2):
            before.begin()
            before.end()
        state = before.state_dict()
        for other in (exchange(torch.float16), exchange(None, torch.bfloat16), exchange(None)):
            with pytest.raises(ValueError, match=r"an exchange of 64 bytes was .*`wire_dtype`, `precision`"):
                other.load_state_dict(state)
        same = exchange(torch.bfloat16)
        same.load_state_dict(state)
        assert same.in_flight
        del state["in_flight"]["layout"]  # as it was saved at first: the size decides
        exchange(torch.float16).load_state_dict(state)
        with pytest.raises(ValueError, match="`wire_dtype`, `precision`"):
            exchange(None).load_state_dict(state)

    run_ranks(2, body)


def test_a_single_rank_exchanges_nothing() -> None:
    def body(rank: Rank) -> int:
        exchange = rank.exchange(Schedule(), ElasticMixing(0.5), {"theta": nn.Parameter(torch.ones(1))})
        for _ in range(3):
            exchange.begin()
            assert not exchange.in_flight
            exchange.end()
        return exchange.stats.bytes_sent

    assert run_ranks(1, body) == [0]
