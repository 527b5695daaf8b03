"""Elastic gossip with an outer step, between the exchange clock and its rule (design §12; ``rules/outer.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.exchange.flat import FlatBuffer
from lightning_gossip.exchange.outer_state import OuterState
from lightning_gossip.rules.mixing import sum_of_differences
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
    ) -> None:
        """Move the replica by its own outer step and by c = −weight · Σ_k (own − received_k), in one pass over each.

        Args:
            parameters: as :meth:`propose` was given, by now with the optimizer's updates.
            proposal: what :meth:`propose` returned.
            own: the snapshot that it wrote.
            received: the partners' snapshots, in ascending rank; there may be none.
            weight: of the sum.
        """
        snapshots = [buffer.views for buffer in (own, *received)]
        for name, next_start in proposal.views.items():
            parameter = parameters[name].detach()
            for start, velocity, theta, y, mine, *theirs in self._state.pieces(
                name, parameter, next_start, *(views[name] for views in snapshots)
            ):
                theta.add_(start)
                start.copy_(y)
                if theirs:
                    mixed = sum_of_differences(mine, theirs, torch.empty_like(start)).mul_(-weight)
                    self._state.step.absorb(mixed, theta, start, velocity)

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
