"""The outer step: what becomes of a round's drift, few exchanges and more progress.

A replica trains for a round on its own, from a start a to θ. **DiLoCo** (Douillard et al. 2023, arXiv:2311.08105,
Algorithm 1) takes what all replicas drifted, on the mean, for a gradient, and makes a step of SGD with Nesterov
momentum with it; with η = 1 and γ = 0 it is **LocalSGD** (Stich 2019, arXiv:1805.09767):

    Δ = mean over replicas of (a − θ_i);   v ← γ v + Δ;   a ← a − η (Δ + γ v)

Under **elastic gossip** every replica takes that step by itself, then mixes its result with its partners', and tells
the momentum a part of what mixing moved:

    Δ_i = θ_i − a_i;   v_i ← γ v_i + Δ_i;   y_i = a_i + η (Δ_i + γ v_i)                              propose
    c_i = −α Σ_k (y_i − y_k);   θ_i ← y_i + c_i;   a_i ← y_i + c_i;   v_i ← v_i + (1 − γ) c_i / η    absorb

Mixing sums to zero over the replicas, so their mean makes DiLoCo's step on the mean drift, whoever mixes with whom. Why
1 − γ: what one mixing gives to the momentum moves the replica over all its future by (γ² + γ³ + …)(1 − γ) c_i = γ² c_i,
less than was mixed, so that it can not overshoot, whatever comes next. With all of c_i / η, replicas run apart without
bound.

Everything here is element by element: tensors of any shape, which a caller may cut as it likes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gossip.arguments import check_number


@dataclass(frozen=True, slots=True)
class OuterStep:
    """SGD with Nesterov momentum on what a round drifted.

    Args:
        lr: η, above 0: 1 takes the drift over as it is.
        momentum: γ, at least 0 and below 1.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    lr: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_number("outer_lr", self.lr, low=0, open_low=True)
        check_number("outer_momentum", self.momentum, low=0, high=1, open_high=True)

    @property
    def is_plain(self) -> bool:
        """Whether the step takes the drift over as it is, and nothing more."""
        return self.lr == 1 and self.momentum == 0

    @torch.no_grad()
    def descend(self, start: Tensor, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        """Make DiLoCo's step: v ← γ v + Δ, a ← a − η (Δ + γ v), as ``torch.optim.SGD(nesterov=True)`` makes it.

        Args:
            start: a, changed in place.
            velocity: v, changed in place; None without momentum, as it is in :meth:`propose` and :meth:`absorb`.
            gradient: Δ, the mean over replicas of a − θ_i.

        Returns:
            By what a moved, a tensor of its own.
        """
        direction = self._look_ahead(velocity, gradient)
        start.add_(direction, alpha=-self.lr)
        return direction.mul_(-self.lr)

    @torch.no_grad()
    def propose(self, theta: Tensor, start: Tensor, velocity: Tensor | None) -> Tensor:
        """Return y = a + η (Δ + γ v), a tensor of its own, where v ← γ v + Δ in place and Δ = θ − a."""
        return self._look_ahead(velocity, theta - start).mul_(self.lr).add_(start)

    @torch.no_grad()
    def absorb(self, mixed: Tensor, theta: Tensor, start: Tensor, velocity: Tensor | None) -> None:
        """Let mixing move a replica by ``mixed``, c: θ ← θ + c, a ← a + c, v ← v + (1 − γ) c / η, in place."""
        theta.add_(mixed)
        start.add_(mixed)
        if velocity is not None:
            velocity.add_(mixed, alpha=(1 - self.momentum) / self.lr)

    def _look_ahead(self, velocity: Tensor | None, drift: Tensor) -> Tensor:
        """Return Δ + γ v, a tensor of its own, where v ← γ v + Δ in place."""
        if velocity is None:
            return drift.clone()
        velocity.mul_(self.momentum).add_(drift)
        return drift.add(velocity, alpha=self.momentum)
