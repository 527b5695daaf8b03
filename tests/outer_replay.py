"""Design §12, word by word, all ranks in one loop: what the package's outer steps are compared with.

The outer optimizer of DiLoCo is torch's own; elastic gossip is numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

Model = dict[str, np.ndarray]
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


def exactly(x: np.ndarray) -> np.ndarray:
    return x


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even at 8 bits of significand, in integer arithmetic on float64."""
    bits = np.ascontiguousarray(x, dtype=np.float64).view(np.uint64)
    half, odd = np.uint64(1 << 44), (bits >> np.uint64(45)) & np.uint64(1)
    return (((bits + half - np.uint64(1) + odd) >> np.uint64(45)) << np.uint64(45)).view(np.float64)


def replay_all_reduce(
    initial: Model,
    ranks: int,
    steps: int,
    optimizer: str,
    gradient: Gradient,
    *,
    period: int,
    lr: float,
    momentum: float,
    delay: int,
    parts: Mapping[str, int],
    fragments: int,
    rounding: Callable[[np.ndarray], np.ndarray] = exactly,
) -> tuple[list[Model], Model]:
    """LocalSGD and DiLoCo; returns each replica at the end, and the common start then.

    Args:
        parts: which part of the model a parameter belongs to.
    """
    theta = [{name: value.copy() for name, value in initial.items()} for _ in range(ranks)]
    inner = [{name: InnerOptimizer(optimizer) for name in initial} for _ in range(ranks)]
    common = {name: nn.Parameter(torch.tensor(value)) for name, value in initial.items()}
    outer = {
        name: torch.optim.SGD([value], lr=lr, momentum=momentum, nesterov=momentum > 0)
        for name, value in common.items()
    }
    due: dict[int, list[tuple[str, np.ndarray, list[np.ndarray]]]] = {}
    for t in range(1, steps + 1):
        for name in initial:
            if t % period == parts[name] * period // fragments:
                at_snapshot = [theta[i][name].copy() for i in range(ranks)]
                start = common[name].detach().numpy()
                mean = rounding(np.asarray(sum(rounding(start - x) for x in at_snapshot)) / ranks)
                due.setdefault(t + delay, []).append((name, mean, at_snapshot))
        for i in range(ranks):
            for name in initial:
                theta[i][name] = theta[i][name] + inner[i][name](theta[i][name], gradient(theta[i][name], i, t))
        for name, mean, at_snapshot in due.pop(t, []):
            common[name].grad = torch.tensor(mean)
            outer[name].step()
            for i in range(ranks):
                theta[i][name] = theta[i][name] + (common[name].detach().numpy() - at_snapshot[i])
    return theta, {name: value.detach().numpy() for name, value in common.items()}


def replay_gossip(
    initial: list[np.ndarray],
    choices: Mapping[int, np.ndarray],
    steps: int,
    optimizer: str,
    gradient: Gradient,
    *,
    alpha: float,
    lr: float,
    momentum: float,
    delay: int,
    rounding: Callable[[np.ndarray], np.ndarray] = exactly,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Elastic gossip with an outer step; returns θ, a and v of every replica at the end, each shape (ranks, size).

    Args:
        choices: by the step of a round: whom each rank chose, -1 for none.
    """
    ranks = len(initial)
    inner = [InnerOptimizer(optimizer) for _ in range(ranks)]
    theta, a, v = np.stack(initial), np.stack(initial), np.zeros((ranks, len(initial[0])))
    due: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for t in range(1, steps + 1):
        if t in choices:
            drift = theta - a
            v = momentum * v + drift
            y = a + lr * (drift + momentum * v)
            sent = rounding(y)
            c = np.zeros_like(y)
            for i in range(ranks):
                partners = {k for k in range(ranks) if choices[t][k] == i or choices[t][i] == k}
                for k in sorted(partners):
                    c[i] -= alpha * (sent[i] - sent[k])
            due[t + delay] = (y - theta, y, c)
        theta = theta + np.stack([inner[i](theta[i], gradient(theta[i], i, t)) for i in range(ranks)])
        if t in due:
            jump, y, c = due.pop(t)
            theta = theta + jump + c
            a = y + c
            v = v + (1 - momentum) * c / lr
    return theta, a, v
