"""The update rules of design §3 against an independent numpy replay, and what must hold of the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn

from lightning_gossip.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.schedule import Schedule

STEPS, RANKS, SIZE = 50, 5, 6

Optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-weight-decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}
RULES: dict[str, MixingRule] = {"elastic": ElasticMixing(0.3), "pull": PullMixing(), "push": PushMixing()}


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
