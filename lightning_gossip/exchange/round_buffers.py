"""What a round of LocalSGD and DiLoCo lies in, on its way: the drift, what of it travels, and the mean (design §12)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout, Segment
from lightning_gossip.exchange.flat_mixing import is_finite
from lightning_gossip.exchange.staging import Staging
from lightning_gossip.exchange.tensors import wide
from lightning_gossip.rules import mixing
from lightning_gossip.rules.mixing import CHUNK
from lightning_gossip.transport.all_reduce import Reduction
from lightning_gossip.transport.halves import part_of, room_bytes
from lightning_gossip.transport.interface import Staged


class RoundBuffers:
    """Of one part of the model: what this replica drifted, what of it travels, and room for what comes back.

    Args:
        layout: on the wire.
        world_size: number of replicas, at most.
        device: of the parameters.
        staging: where what travels lies in host memory and the parameters do not: the copies between the two.
    """

    def __init__(self, layout: FlatLayout, world_size: int, device: torch.device, staging: Staging | None) -> None:
        self.layout = layout
        self.drift = FlatBuffer.empty(layout.unrounded, device)
        self.rounded = FlatBuffer.empty(layout, device) if layout.narrows else self.drift
        self._staging = staging
        self.sent = self.rounded.storage
        room = room_bytes(layout.nbytes, world_size)
        if staging is None:
            self.room = torch.empty(room, dtype=torch.uint8, device=device)
        else:
            pinned = device.type != "cpu"
            self.sent = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pinned)
            self.room = torch.empty(room, dtype=torch.uint8, pin_memory=pinned)

    @torch.no_grad()
    def fill(self, starts: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Staged | None:
        """Write the drift since ``starts``, and begin to copy what of it travels to where it is sent from.

        Returns:
            What tells when it is there, beside training; None where it is there already.
        """
        if self._staging is not None:
            self._staging.before_packing()
        for name, drift in self.drift.views.items():
            torch.sub(starts[name], parameters[name].detach(), out=drift)
        if self.rounded is not self.drift:
            self.rounded.pack(self.drift.views)
        return None if self._staging is None else self._staging.stage(self.rounded.storage, self.sent)


@dataclass
class Round:
    """Of one part of the model, posted and not applied yet; one of ``reduction`` and ``mean`` is None.

    Attributes:
        step: at which it was posted.
        part: of the model.
        parameters: of that part, by name.
        buffers: in which it lies.
        members: the ranks that take part; after a resume their number alone is what it was.
        reduction: on its way.
        mean: of what all drifted, 1-D, uint8, on the parameters' device.
        finite: whether the mean is, and so is applied.
        sick: whether it is not for this replica.
        healed: whether this replica went back to its start since: then its drift is nothing.
    """

    step: int
    part: int
    parameters: Mapping[str, Tensor]
    buffers: RoundBuffers
    members: tuple[int, ...]
    reduction: Reduction | None = None
    mean: Tensor | None = None
    finite: bool = True
    sick: bool = False
    healed: bool = False

    def arrived(self, mean: Tensor) -> None:
        """Take the mean, and find out whether it is finite, and if not, whether this replica is to blame."""
        alone = len(self.members) == 1
        self.mean, self.reduction = mean, None
        layout = self.buffers.layout
        self.finite = is_finite(mean, layout) if alone else marked_finite(layout, self.buffers.room, len(self.members))
        self.sick = not self.finite and not is_finite(self.buffers.rounded.storage, layout)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to apply it in another process."""
        drift = self.buffers.drift.storage
        return {
            "step": self.step,
            "part": self.part,
            "names": list(self.parameters),
            "layout": self.buffers.layout.fingerprint,
            "drift": torch.zeros_like(drift) if self.healed else drift.clone(),
            "mean": None if self.mean is None else self.mean.clone(),
            "ranks": len(self.members),
            "finite": self.finite,
            "sick": self.sick and not self.healed,
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], parameters: Mapping[str, Tensor], buffers: RoundBuffers, world_size: int
    ) -> Round:
        """Return what :meth:`state_dict` was called on.

        Raises:
            ValueError: if it does not fit.
        """
        if state["layout"] != buffers.layout.fingerprint:
            raise ValueError(
                "a round was in flight whose parameters are not laid out as this model's are: `wire_dtype`,"
                " `precision` and the parameters' shapes have to be as they were"
            )
        buffers.drift.storage.copy_(state["drift"])
        return cls(
            int(state["step"]),
            int(state["part"]),
            parameters,
            buffers,
            tuple(range(int(state.get("ranks", world_size)))),
            mean=state["mean"].to(buffers.drift.storage.device),
            finite=bool(state.get("finite", True)),
            sick=bool(state.get("sick", False)),
        )


def stretches(layout: FlatLayout, begin: int, end: int) -> Iterator[tuple[Segment, int, int]]:
    """Return the segments that lie between two bytes of a buffer, and from which byte to which."""
    for segment in layout.segments:
        first, last = max(segment.start, begin), min(segment.start + segment.nbytes, end)
        if first < last:
            yield segment, first, last


class MeanOver:
    """Writes the mean of some buffers' stretch, summed in their order, in float32 or wider.

    Where that is not finite, its first element says so: it is seen while it lies in the cache, and whoever gets the
    stretch looks at that element alone.

    Args:
        layout: of the buffers.
    """

    def __init__(self, layout: FlatLayout) -> None:
        self._layout = layout

    def __call__(self, pieces: Sequence[Tensor], begin: int, out: Tensor) -> None:
        """Combine.

        Args:
            pieces: the stretch of each buffer (1-D, uint8).
            begin: at which byte of the whole it begins.
            out: where to write.
        """
        for segment, first, last in stretches(self._layout, begin, begin + out.numel()):
            width, finite = wide(segment.dtype), True
            numbers = [x[first - begin : last - begin].view(segment.wire_dtype) for x in (out, *pieces)]
            chunk = CHUNK if out.device.type == "cpu" else numbers[0].numel()
            for target, *terms in zip(*[x.split(chunk) for x in numbers], strict=True):
                total = terms[0].to(width, copy=True)
                for term in terms[1:]:
                    total += term
                target.copy_(total.div_(len(terms)))
                finite = finite and mixing.is_finite(total)
            if not finite:
                numbers[0][0] = float("nan")


def marked_finite(layout: FlatLayout, mean: Tensor, ranks: int) -> bool:
    """Whether all stretches of a mean (1-D, uint8) among so many ranks are finite, by :class:`MeanOver`'s marks."""
    for index in range(ranks):
        part = part_of(layout.nbytes, ranks, index)
        for segment, first, last in stretches(layout, part.start, part.stop):
            if not mixing.is_finite(mean[first:last].view(segment.wire_dtype)[:1]):
                return False
    return True
