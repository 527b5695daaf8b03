"""Elastic gossip with an outer step, between the exchange clock and its rule (design §12; ``rules/outer.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.exchange.flat import FlatBuffer
from lightning_gossip.exchange.outer_state import OuterState
from lightning_gossip.rules.mixing import is_finite, sum_of_differences
from lightning_gossip.rules.outer import OuterStep


class OuterGossip:
    """A replica's own outer steps, whose results are what it exchanges.

    From a proposal until it is applied, the starts of :class:`OuterState` hold how far the step itself moves the
    replica, y − θ(t): the start of the round that ends is not needed again, and y, that of the next, lies in the
    snapshot. Only where the wire rounds the snapshot, y has a buffer of its own, of about the size that the narrower
    wire saves.

    Args:
        step: what is done with a round's drift.
    """

    def __init__(self, step: OuterStep) -> None:
        self._state = OuterState(step)
        self._exact: FlatBuffer | None = None

    def follow(self, travelling: Mapping[str, Tensor]) -> None:
        """Begin a step: see :meth:`OuterState.follow`."""
        self._state.follow(travelling)

    @torch.no_grad()
    def propose(self, parameters: Mapping[str, Tensor], snapshot: FlatBuffer) -> FlatBuffer:
        """Make the outer step, and write its result to ``snapshot``, rounded to the wire.

        Args:
            parameters: those that travel, θ(t), by name.
            snapshot: what others will get.

        Returns:
            The result y, not rounded; ``snapshot`` itself where the wire does not round.
        """
        exact = self._exact_of(snapshot)
        for name, proposal in exact.views.items():
            for start, velocity, theta, y in self._state.pieces(name, parameters[name].detach(), proposal):
                y.copy_(self._state.step.propose(theta, start, velocity))
                torch.sub(y, theta, out=start)
        if exact is not snapshot:
            snapshot.pack(exact.views)
        return exact

    @torch.no_grad()
    def apply(
        self,
        parameters: Mapping[str, Tensor],
        proposal: FlatBuffer,
        own: FlatBuffer,
        received: Sequence[FlatBuffer],
        weight: float,
    ) -> bool:
        """Move the replica by its own outer step and by c = −weight · Σ_k (own − received_k), in one pass over each.

        Args:
            parameters: as :meth:`propose` was given, by now with the optimizer's updates.
            proposal: what :meth:`propose` returned.
            own: the snapshot that it wrote.
            received: the partners' snapshots, in ascending rank; there may be none.
            weight: of the sum.

        Returns:
            Whether all differences were finite; where not, nothing is mixed in, and the own step is made all the same.
        """
        return self._move(parameters, proposal, own, received, weight)

    @torch.no_grad()
    def mix(
        self, parameters: Mapping[str, Tensor], own: FlatBuffer, received: Sequence[FlatBuffer], weight: float
    ) -> bool:
        """Mix as :meth:`apply` does, where the own step is made already."""
        return self._move(parameters, None, own, received, weight)

    @torch.no_grad()
    def take(self, parameters: Mapping[str, Tensor], snapshot: FlatBuffer) -> None:
        """Take a partner's snapshot in place of a replica that is not finite, and begin a round there."""
        snapshot.copy_to(parameters)
        snapshot.copy_to({name: self._state.starts[name] for name in snapshot.views})
        for name in self._state.velocities.keys() & snapshot.views.keys():
            self._state.velocities[name].zero_()

    def _move(
        self,
        parameters: Mapping[str, Tensor],
        proposal: FlatBuffer | None,
        own: FlatBuffer,
        received: Sequence[FlatBuffer],
        weight: float,
    ) -> bool:
        snapshots = [buffer.views for buffer in (own, *received)]
        proposed = None if proposal is None else proposal.views
        mixed: list[tuple[Tensor, ...]] = []  # pieces that were
        finite = True
        for name in own.views:
            parameter, next_start = parameters[name].detach(), (proposed or snapshots[0])[name]
            for start, velocity, theta, y, mine, *theirs in self._state.pieces(
                name, parameter, next_start, *(views[name] for views in snapshots)
            ):
                if proposed is not None:
                    theta.add_(start)
                    start.copy_(y)
                if theirs and finite:
                    finite = self._absorb(theta, start, velocity, mine, theirs, -weight)
                    mixed.append((theta, start, velocity, mine, *theirs))
        if not finite:
            for theta, start, velocity, mine, *theirs in mixed[:-1]:
                self._absorb(theta, start, velocity, mine, theirs, weight)
        return finite

    def _absorb(
        self, theta: Tensor, start: Tensor, velocity: Tensor, mine: Tensor, theirs: Sequence[Tensor], weight: float
    ) -> bool:
        """Move a piece by weight · Σ_k (mine − theirs_k), unless that is not finite; return whether it is."""
        move = sum_of_differences(mine, theirs, torch.empty_like(start)).mul_(weight)
        if not is_finite(move):
            return False
        self._state.step.absorb(move, theta, start, velocity)
        return True

    def begin_anew(self) -> None:
        """Forget starts and momenta: the next step begins where the parameters are then."""
        self._state = OuterState(self._state.step)

    def state_dict(self) -> dict[str, Any]:
        """Return starts and momenta, as tensors; between a proposal and its application, what the class says."""
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned; raises as :meth:`OuterState.load_state_dict`."""
        self._state.load_state_dict(state, parameters)

    def _exact_of(self, snapshot: FlatBuffer) -> FlatBuffer:
        if not snapshot.layout.narrows:
            return snapshot
        if self._exact is None or self._exact.layout.fingerprint != snapshot.layout.unrounded.fingerprint:
            self._exact = FlatBuffer.empty(snapshot.layout.unrounded, snapshot.storage.device)
        return self._exact
