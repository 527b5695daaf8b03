"""Design §12, word by word, all ranks in one loop: what the package's outer steps are compared with.

The outer optimizer of DiLoCo is torch's own; elastic gossip is numpy alone. Neither knows how replicas train between::

    rounds.begin(t, theta)   # θ(t), by replica
    ...                      # θ(t) + u(t)
    rounds.end(t, theta)     # θ(t+1), in place
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import nn

Model = dict[str, np.ndarray]
Rounding = Callable[[np.ndarray], np.ndarray]
"""To the wire's dtype."""


def exactly(x: np.ndarray) -> np.ndarray:
    """Round nothing."""
    return x


class AllReduced:
    """LocalSGD and DiLoCo.

    Args:
        initial: where all replicas begin.
        ranks: number of replicas.
        period, lr, momentum, delay, fragments: of the scheme.
        parts: which part of the model a parameter belongs to.
        rounding: of what travels.

    Attributes:
        common: the replicas' common start.
    """

    def __init__(
        self,
        initial: Model,
        ranks: int,
        *,
        period: int,
        lr: float,
        momentum: float,
        delay: int,
        parts: Mapping[str, int],
        fragments: int,
        rounding: Rounding = exactly,
    ) -> None:
        self.ranks, self.period, self.delay = ranks, period, delay
        self.parts, self.fragments, self.rounding = parts, fragments, rounding
        self._common = {name: nn.Parameter(torch.tensor(value)) for name, value in initial.items()}
        self._outer = {
            name: torch.optim.SGD([value], lr=lr, momentum=momentum, nesterov=momentum > 0)
            for name, value in self._common.items()
        }
        self._due: dict[int, list[tuple[str, np.ndarray, list[np.ndarray]]]] = {}

    @property
    def common(self) -> Model:
        return {name: value.detach().numpy() for name, value in self._common.items()}

    def begin(self, t: int, theta: Sequence[Model]) -> None:
        """Take the snapshots of step ``t`` (counted from 1)."""
        for name, value in self._common.items():
            if t % self.period == self.parts[name] * self.period // self.fragments:
                at_snapshot = [theta[i][name].copy() for i in range(self.ranks)]
                start = value.detach().numpy()
                mean = self.rounding(reduce(np.add, (self.rounding(start - x) for x in at_snapshot)) / self.ranks)
                self._due.setdefault(t + self.delay, []).append((name, mean, at_snapshot))

    def end(self, t: int, theta: Sequence[Model]) -> None:
        """Apply what is due at the end of step ``t``."""
        for name, mean, at_snapshot in self._due.pop(t, []):
            self._common[name].grad = torch.tensor(mean)
            self._outer[name].step()
            for i in range(self.ranks):
                theta[i][name] = theta[i][name] + (self._common[name].detach().numpy() - at_snapshot[i])

    def settle(self, theta: Sequence[Model]) -> None:
        """Apply what is left at the end of training."""
        for t in sorted(self._due):
            self.end(t, theta)


class Gossip:
    """Elastic gossip with an outer step.

    Args:
        initial: where each replica begins, 1-D.
        choices: by the step of a round: whom each rank chose, -1 for none.
        alpha, lr, momentum, delay: of the scheme.
        rounding: of what travels.

    Attributes:
        a, v: where each replica stood after its last round, and its momentum; shape (ranks, size).
    """

    def __init__(
        self,
        initial: Sequence[np.ndarray],
        choices: Mapping[int, np.ndarray],
        *,
        alpha: float,
        lr: float,
        momentum: float,
        delay: int,
        rounding: Rounding = exactly,
    ) -> None:
        self.choices, self.alpha, self.lr, self.momentum = choices, alpha, lr, momentum
        self.delay, self.rounding = delay, rounding
        self.a = np.stack(initial)
        self.v = np.zeros_like(self.a)
        self._due: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def begin(self, t: int, theta: np.ndarray) -> None:
        """Make the outer step of ``t`` (counted from 1), if it has a round, from the snapshots; shape (ranks, size)."""
        if t not in self.choices:
            return
        ranks, choices = range(len(theta)), self.choices[t]
        drift = theta - self.a
        self.v = self.momentum * self.v + drift
        y = self.a + self.lr * (drift + self.momentum * self.v)
        sent = self.rounding(y)
        c = np.zeros_like(y)
        for i in ranks:
            partners = {k for k in ranks if choices[k] == i or choices[i] == k}
            for k in sorted(partners):
                c[i] -= self.alpha * (sent[i] - sent[k])
        self._due[t + self.delay] = (y - theta, y, c)

    def end(self, t: int, theta: np.ndarray) -> None:
        """Apply what is due at the end of step ``t``."""
        if t in self._due:
            jump, y, c = self._due.pop(t)
            theta += jump + c
            self.a = y + c
            self.v = self.v + (1 - self.momentum) * c / self.lr

    def settle(self, theta: np.ndarray) -> None:
        """Apply what is left at the end of training."""
        for t in sorted(self._due):
            self.end(t, theta)
