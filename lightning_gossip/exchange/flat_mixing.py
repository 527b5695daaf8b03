"""Mixing of whole snapshots, dtype by dtype; and whether they are finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_gossip.exchange.flat import FlatLayout, Segment
from lightning_gossip.rules import mixing


class Scratch:
    """Room for differences that a CPU's cache holds, by dtype; a GPU mixes all at once."""

    def __init__(self) -> None:
        self._rooms: dict[torch.dtype, Tensor] = {}

    def __call__(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return it, or None for all at once."""
        if device.type != "cpu":
            return None
        if dtype not in self._rooms:
            self._rooms[dtype] = torch.empty(mixing.CHUNK, dtype=dtype)
        return self._rooms[dtype]


def mix_segments(
    layout: FlatLayout,
    parameters: Mapping[str, Tensor],
    own: Tensor,
    received: Sequence[Tensor],
    weight: float,
    scratch_of: Callable[[torch.dtype, torch.device], Tensor | None],
) -> bool:
    """Subtract weight · Σ_k (own − received_k) from ``parameters``.

    Args:
        layout: of the snapshots.
        parameters: by name.
        own, received: snapshots, 1-D, uint8, as laid out.
        weight: of the sum.
        scratch_of: returns room for differences in a dtype on a device, see :func:`~lightning_gossip.rules.mixing.mix`.

    Returns:
        Whether all differences were finite; where not, the parameters are as they were, but for a rounding.
    """

    def mix(segment: Segment, weight: float) -> bool:
        targets = [parameters[name] for name in segment.names]
        snapshots = [segment.of(payload) for payload in received]
        return mixing.mix(targets, segment.of(own), snapshots, weight, scratch_of(segment.dtype, own.device))

    for index, segment in enumerate(layout.segments):
        if not mix(segment, weight):
            for mixed in layout.segments[:index]:
                mix(mixed, -weight)
            return False
    return True


def is_finite(snapshot: Tensor, layout: FlatLayout) -> bool:
    """Whether no element of ``snapshot`` (1-D, uint8, as laid out) is NaN or infinite."""
    return all(mixing.is_finite(flat) for flat in layout.split(snapshot))
