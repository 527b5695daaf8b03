"""The exchange clock: snapshots, posting, waiting and applying (design §3).

Usable from any training loop::

    exchange.begin()   # tick; post the snapshot of θ(t)
    ...                # forward, backward, the optimizer's step: θ(t) + u(t)
    exchange.end()     # wait; θ(t+1) = θ(t) + u(t) − weight · Σ (s_i − s_k)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.arguments import check_integer
from lightning_gossip.flat import FlatBuffer, FlatLayout, Segment
from lightning_gossip.link import Header, Kind
from lightning_gossip.mixing import MixingRule, Transfers, sum_of_differences
from lightning_gossip.schedule import Schedule
from lightning_gossip.transport import Posted, Transport

_CHUNK = 2**17  # elements


@dataclass
class ExchangeStats:
    """What the exchanges of this rank did; counts since the start, the rest of the last step.

    Attributes:
        exchanges: payloads received and mixed.
        bytes_sent: bytes of payload sent.
        wait_seconds: that training waited for payloads in the last step.
        mix_seconds: that snapshots and mixing took in the last step.
        partner: smallest rank exchanged with in the last step, -1 for none.
        partner_distance: ‖s_i − s_k‖ / ‖s_i‖ of the exchange applied in the last step, mean over its partners; None
            where there was none, or :attr:`Exchange.measure` was off.
    """

    exchanges: int = 0
    bytes_sent: int = 0
    wait_seconds: float = 0.0
    mix_seconds: float = 0.0
    partner: int = -1
    partner_distance: float | None = None


@dataclass
class _InFlight:
    """An exchange that was posted and is not applied yet; ``posted`` is None once it has arrived."""

    step: int
    transfers: Transfers
    parameters: Mapping[str, Tensor]
    buffers: _Buffers
    posted: Posted | None
    skipped: Collection[int] = ()

    def received(self) -> list[FlatBuffer]:
        """Return what arrived, in ascending rank."""
        partners = self.transfers.receive_from
        buffers = self.buffers.receive(len(partners))
        return [b for k, b in zip(partners, buffers, strict=True) if k not in self.skipped]


@dataclass
class _Buffers:
    """Room for one exchange at a time; kept from one to the next while the layout stays."""

    layout: FlatLayout
    device: torch.device
    staged: bool
    own: FlatBuffer
    received: list[FlatBuffer] = field(default_factory=list)
    differences: dict[Segment, Tensor] = field(default_factory=dict)

    def receive(self, partners: int) -> list[FlatBuffer]:
        """Return buffers for ``partners`` payloads."""
        while len(self.received) < partners:
            self.received.append(FlatBuffer(self.layout, self.device, self.staged))
        return self.received[:partners]

    def difference(self, segment: Segment, received: Tensor) -> Tensor:
        """Return where to sum a segment's differences: in what was received, where that has the right dtype."""
        if segment.dtype == segment.wire_dtype:
            return received
        if segment not in self.differences:
            self.differences[segment] = torch.empty(segment.numel, dtype=segment.dtype, device=self.device)
        return self.differences[segment]


class Exchange:
    """One rank's exchanges over a training.

    Args:
        rank: of this replica.
        world_size: number of replicas.
        schedule: who chooses whom.
        rule: what choices mean and how much of a difference is taken over.
        transport: how payloads travel.
        parameters: returns this replica's parameters by name, the same names, shapes and dtypes as on its partners;
            those that require a gradient when an exchange is posted travel.
        delay: steps from posting to applying, from 0 to ``schedule.period - 1``, so that at most one is in flight.
        wire_dtype: snapshots are rounded to it, on both sides, where it is narrower than the parameter.

    Raises:
        ValueError: if ``delay`` or the world size does not suit the schedule.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        schedule: Schedule,
        rule: MixingRule,
        transport: Transport,
        parameters: Callable[[], Mapping[str, Tensor]],
        delay: int = 0,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("delay", delay, low=0, high=schedule.period - 1, why="at most period - 1")
        schedule.check_world_size(world_size)
        self.rank = rank
        self.world_size = world_size
        self.step = 0
        self.stats = ExchangeStats()
        self.measure = False  # whether to compute `stats.partner_distance`, one more pass over the snapshots
        self._schedule = schedule
        self._rule = rule
        self._transport = transport
        self._parameters = parameters
        self._delay = delay
        self._wire_dtype = wire_dtype
        self._in_flight: _InFlight | None = None
        self._buffers: _Buffers | None = None
        self._signature: tuple[object, ...] = ()

    @property
    def in_flight(self) -> bool:
        """Whether an exchange was posted and is not applied yet."""
        return self._in_flight is not None

    def begin(self) -> None:
        """Begin a step: advance the clock and, in a round with partners, take a snapshot and post it."""
        self.step += 1
        self.stats.wait_seconds = self.stats.mix_seconds = 0.0
        self.stats.partner = -1
        self.stats.partner_distance = None
        if self._in_flight is not None and self.step > self._in_flight.step + self._delay:
            self._apply(self._in_flight)  # it fell due when the clock was set forward
        if self.world_size == 1 or not self._schedule.is_round(self.step):
            return
        choices = self._schedule.choices(self.step, self.world_size)
        transfers = self._rule.transfers(choices, self.rank)
        if transfers:
            self._post(transfers)

    def end(self) -> None:
        """End a step, after the optimizer's update: apply the exchange that is due.

        Raises:
            PartnerLost: if a partner died or stayed silent past the timeout.
            RunStopped: if some rank stopped.
        """
        if self._in_flight is not None and self.step >= self._in_flight.step + self._delay:
            self._apply(self._in_flight)

    def align(self, clock: int) -> None:
        """Set the clock to the largest of the ranks' clocks, where all ranks meet."""
        self.step = max(self.step, clock)

    def reset_links(self, generation: int) -> None:
        """Begin anew with all partners, after some were skipped; called on all ranks after :meth:`arrive`."""
        self._transport.reset(generation)

    def arrive(self) -> None:
        """Wait until what is in flight has arrived, without applying it: nothing is on the wire afterwards.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        if self._in_flight is not None:
            self._arrive(self._in_flight)

    def settle(self) -> None:
        """Apply what is in flight at once: at the end of training.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        if self._in_flight is not None:
            self._apply(self._in_flight)

    def state_dict(self) -> dict[str, Any]:
        """Return clock, counts and what is in flight, as tensors and numbers; it waits for what is on the wire.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self.arrive()
        state: dict[str, Any] = {"step": self.step, "stats": asdict(self.stats), "in_flight": None}
        if (exchange := self._in_flight) is not None and (received := exchange.received()):
            state["in_flight"] = {
                "step": exchange.step,
                "names": list(exchange.parameters),
                "own": exchange.buffers.own.payload.clone(),
                "received": [buffer.payload.clone() for buffer in received],
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned on this rank.

        Raises:
            ValueError: if what was in flight does not fit this replica's parameters.
        """
        self.step = int(state["step"])
        self.stats = ExchangeStats(**state["stats"])
        self._in_flight = None
        if (saved := state["in_flight"]) is None:
            return
        parameters = self._parameters()
        missing = [name for name in saved["names"] if name not in parameters]
        if missing:
            raise ValueError(f"an exchange was in flight for parameters that this model does not have: {missing}")
        travelling = {name: parameters[name] for name in saved["names"]}
        buffers = self._room(travelling)
        payloads = [(buffers.own, saved["own"])]
        payloads += zip(buffers.receive(len(saved["received"])), saved["received"], strict=True)
        for buffer, payload in payloads:
            if payload.shape != buffer.payload.shape:
                raise ValueError(
                    f"an exchange was in flight with {payload.numel()} bytes, but this model's parameters take"
                    f" {buffer.payload.numel()}; `wire_dtype` has to be as it was"
                )
            buffer.payload.copy_(payload)
        buffers.own.unpack()
        partners = Transfers(send_to=(), receive_from=tuple(range(len(saved["received"]))))
        self._in_flight = _InFlight(int(saved["step"]), partners, travelling, buffers, posted=None)

    def close(self) -> None:
        """Give up what is in flight and release the transport."""
        self._in_flight = None
        self._transport.close()

    def _post(self, transfers: Transfers) -> None:
        start = time.perf_counter()
        travelling = {name: p for name, p in self._parameters().items() if p.requires_grad}
        if not travelling:
            return
        buffers = self._room(travelling)
        buffers.own.pack(travelling)
        payload = buffers.own.payload
        layout = buffers.layout
        header = Header(Kind.SNAPSHOT, self.step, layout.nbytes, layout.fingerprint)
        received = buffers.receive(len(transfers.receive_from))
        posted = self._transport.post(
            header,
            outgoing=dict.fromkeys(transfers.send_to, payload),
            incoming={k: b.payload for k, b in zip(transfers.receive_from, received, strict=True)},
        )
        self._in_flight = _InFlight(self.step, transfers, travelling, buffers, posted)
        self.stats.bytes_sent += len(transfers.send_to) * layout.nbytes
        self.stats.partner = min(transfers.send_to + transfers.receive_from)
        self.stats.mix_seconds += time.perf_counter() - start

    def _room(self, tensors: Mapping[str, Tensor]) -> _Buffers:
        """Return the buffers for these tensors; new ones only where names, shapes, dtypes or the device changed."""
        device = next(iter(tensors.values())).device
        signature = (device, *((name, p.dtype, p.shape) for name, p in tensors.items()))
        if self._buffers is None or signature != self._signature:
            layout = FlatLayout(tensors, self._wire_dtype)
            staged = self._transport.from_host and device.type != "cpu"
            self._buffers = _Buffers(layout, device, staged, FlatBuffer(layout, device, staged))
            self._signature = signature
        return self._buffers

    def _arrive(self, exchange: _InFlight) -> None:
        if exchange.posted is not None:
            start = time.perf_counter()
            exchange.skipped = exchange.posted.wait()
            exchange.posted = None
            self.stats.wait_seconds += time.perf_counter() - start

    @torch.no_grad()
    def _apply(self, exchange: _InFlight) -> None:
        self._arrive(exchange)
        self._in_flight = None
        received = exchange.received()
        if not received:
            return
        start = time.perf_counter()
        buffers = exchange.buffers
        for buffer in received:
            buffer.unpack()
        if self.measure:
            pause = time.perf_counter()
            self.stats.partner_distance = _mean_distance(buffers.own, received)
            start += time.perf_counter() - pause  # no part of mixing
        weight = self._rule.weight(len(received))
        layout = buffers.layout
        for index, segment in enumerate(layout.segments):
            snapshots = [buffer.segments[index] for buffer in received]
            out = buffers.difference(segment, snapshots[0])
            difference = sum_of_differences(buffers.own.segments[index], snapshots, out)
            parameters = [exchange.parameters[name] for name in segment.names]
            torch._foreach_add_(parameters, layout.views(segment, difference), alpha=-weight)
        self.stats.exchanges += len(received)
        self.stats.mix_seconds += time.perf_counter() - start


def _mean_distance(own: FlatBuffer, received: list[FlatBuffer]) -> float:
    """Return the mean over ``received`` of ‖own − received_k‖ / ‖own‖."""
    norm = _distance(own.segments)
    distances = [_distance(own.segments, k.segments) for k in received]
    return sum(distances) / len(distances) / norm if norm > 0 else 0.0


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor] | None = None) -> float:
    """Return ‖ours − theirs‖, or ‖ours‖, over all segments.

    In float32 at least, for a difference rounded to bfloat16 would show; on a CPU in chunks that its cache holds.
    """
    norms = []
    for index, segment in enumerate(ours):
        wide = torch.promote_types(segment.dtype, torch.float32)
        chunk = _CHUNK if segment.device.type == "cpu" else segment.numel()
        out = torch.empty(min(chunk, segment.numel()), dtype=wide, device=segment.device)
        others = repeat(None) if theirs is None else theirs[index].split(chunk)
        for x, y in zip(segment.split(chunk), others, strict=False):
            difference = x.to(wide) if y is None else torch.sub(x.to(wide), y, out=out[: x.numel()])
            norms.append(torch.linalg.vector_norm(difference))
    return math.hypot(*torch.stack(norms).tolist())
