"""What exchanges did, in numbers, how far partners are apart, and whose replicas are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from lightning_gossip.exchange.tensors import wide
from lightning_gossip.rules.mixing import CHUNK

NonFinite = Literal["heal", "error"]
NONFINITE: tuple[NonFinite, ...] = get_args(NonFinite)


class NotFinite(RuntimeError):
    """A replica has NaN or infinite parameters; with ``nonfinite="heal"`` it takes a partner's in their place.

    Either way they are mixed into no other replica.

    Attributes:
        rank: whose replica it is.
        step: of the exchange in which it was found.
    """

    def __init__(self, rank: int, step: int, found_by: int) -> None:
        super().__init__(f"the replica of rank {rank} is not finite at step {step} (found by rank {found_by})")
        self.rank = rank
        self.step = step


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
            where there was none, or ``Exchange.measure`` was off.
        healed: how often this replica was not finite, and took a partner's snapshot in its place.
    """

    exchanges: int = 0
    bytes_sent: int = 0
    wait_seconds: float = 0.0
    mix_seconds: float = 0.0
    partner: int | None = -1
    partner_distance: float | None = None
    healed: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """Return what was saved, of this kind of exchanges or another: each takes the counts that it has."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})


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
