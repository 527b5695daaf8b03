"""An exchange between posting and applying."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout
from lightning_gossip.transport.interface import Posted


@dataclass
class InFlight:
    """An exchange that was posted and is not applied yet.

    Attributes:
        step: at which it was posted.
        parameters: by name, that travel.
        layout: in which their snapshots lie.
        own: this rank's snapshot, 1-D, uint8.
        posted: the transfers; None where what arrived is this rank's own: copied, or from a checkpoint.
        received: what arrived, in ascending rank, shaped as ``own``; None while it is on the wire.
        partner: smallest rank exchanged with, -1 for none; known once it arrived.
        proposal: what this rank's own outer step led to; None without one. There is a snapshot then, and it falls due,
            also where the round brought no partner.
        received_from: the ranks of what arrived; empty where that is not known any more (an old checkpoint's).
    """

    step: int
    parameters: Mapping[str, Tensor]
    layout: FlatLayout
    own: Tensor
    posted: Posted | None
    received: list[Tensor] | None = None
    partner: int = -1
    proposal: FlatBuffer | None = None
    received_from: tuple[int, ...] = ()
