"""What exchanges did, in numbers: counts, times, and how far partners are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from lightning_gossip.exchange.tensors import wide
from lightning_gossip.rules.mixing import CHUNK


@dataclass
class ExchangeStats:
    """What the exchanges of this rank did; counts since the start, the rest of the last step.

    Attributes:
        exchanges: payloads received and mixed.
        bytes_sent: bytes of payload sent.
        wait_seconds: that training waited for payloads in the last step.
        mix_seconds: that snapshots and mixing took in the last step.
        partner: smallest rank exchanged with in the exchange applied in the last step, -1 for none; None where all
            exchange with all.
        partner_distance: ‖s_i − s_k‖ / ‖s_i‖ of the exchange applied in the last step, mean over its partners; None
            where there was none, or :attr:`Exchange.measure` was off.
    """

    exchanges: int = 0
    bytes_sent: int = 0
    wait_seconds: float = 0.0
    mix_seconds: float = 0.0
    partner: int | None = -1
    partner_distance: float | None = None


def mean_distance(own: Sequence[Tensor], received: Sequence[Sequence[Tensor]]) -> float:
    """Return the mean over ``received`` of ‖own − received_k‖ / ‖own‖, each given as segments."""
    norm = _distance(own)
    distances = [_distance(own, segments) for segments in received]
    return sum(distances) / len(distances) / norm if norm > 0 else 0.0


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor] | None = None) -> float:
    """Return ‖ours − theirs‖, or ‖ours‖, over all segments.

    In float32 at least, for a difference rounded to bfloat16 would show; on a CPU in chunks that its cache holds.
    """
    norms = []
    for index, segment in enumerate(ours):
        width = wide(segment.dtype)
        chunk = CHUNK if segment.device.type == "cpu" else segment.numel()
        out = torch.empty(min(chunk, segment.numel()), dtype=width, device=segment.device)
        others = repeat(None) if theirs is None else theirs[index].split(chunk)
        for x, y in zip(segment.split(chunk), others, strict=False):
            difference = x.to(width) if y is None else torch.sub(x.to(width), y, out=out[: x.numel()])
            norms.append(torch.linalg.vector_norm(difference))
    return math.hypot(*torch.stack(norms).tolist())
