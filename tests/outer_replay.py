"""The replay of outer steps (``benchmarks/shared/outer_replay.py``), around optimizers in numpy and any gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.shared.outer_replay import AllReduced, Gossip, Model

Gradient = Callable[[np.ndarray, int, int], np.ndarray]
"""Of a parameter's value, the rank and the step."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-weight-decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


class InnerOptimizer:
    """The optimizers again, from their papers, in numpy: returns what a step adds to a parameter."""

    def __init__(self, name: str) -> None:
        self.name, self.t = name, 0
        self.m: Any = 0.0
        self.v: Any = 0.0

    def __call__(self, theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self.t += 1
        if self.name in ("sgd", "sgd-weight-decay"):
            return -0.1 * (gradient + (0.05 * theta if self.name == "sgd-weight-decay" else 0))
        if self.name == "nesterov":
            self.m = 0.9 * self.m + gradient
            return -0.05 * (gradient + 0.9 * self.m)
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        scaled = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        return -0.05 * scaled - (0.05 * 0.1 * theta if self.name == "adamw" else 0)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even at 8 bits of significand, in integer arithmetic on float64."""
    bits = np.ascontiguousarray(x, dtype=np.float64).view(np.uint64)
    half, odd = np.uint64(1 << 44), (bits >> np.uint64(45)) & np.uint64(1)
    return (((bits + half - np.uint64(1) + odd) >> np.uint64(45)) << np.uint64(45)).view(np.float64)


def replay_all_reduce(
    initial: Model, ranks: int, steps: int, optimizer: str, gradient: Gradient, **scheme: Any
) -> tuple[list[Model], Model]:
    """Train by LocalSGD or DiLoCo; return each replica at the end, and the common start then.

    Args:
        scheme: see :class:`AllReduced`.
    """
    theta = [{name: value.copy() for name, value in initial.items()} for _ in range(ranks)]
    inner = [{name: InnerOptimizer(optimizer) for name in initial} for _ in range(ranks)]
    rounds = AllReduced(initial, ranks, **scheme)
    for t in range(1, steps + 1):
        rounds.begin(t, theta)
        for i in range(ranks):
            for name in initial:
                theta[i][name] = theta[i][name] + inner[i][name](theta[i][name], gradient(theta[i][name], i, t))
        rounds.end(t, theta)
    return theta, rounds.common


def replay_gossip(
    initial: list[np.ndarray],
    choices: Mapping[int, np.ndarray],
    steps: int,
    optimizer: str,
    gradient: Gradient,
    **scheme: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train by elastic gossip with an outer step; return θ, a and v of every replica, each shape (ranks, size).

    Args:
        choices, scheme: see :class:`Gossip`.
    """
    inner = [InnerOptimizer(optimizer) for _ in initial]
    theta = np.stack(initial)
    rounds = Gossip(initial, choices, **scheme)
    for t in range(1, steps + 1):
        rounds.begin(t, theta)
        theta = theta + np.stack([inner[i](theta[i], gradient(theta[i], i, t)) for i in range(len(initial))])
        rounds.end(t, theta)
    return theta, rounds.a, rounds.v
