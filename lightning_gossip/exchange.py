"""The exchange clock: snapshots, posting, waiting and applying (design §3).

Usable from any training loop::

    exchange.begin()   # tick; post the snapshot of θ(t)
    ...                # forward, backward, the optimizer's step: θ(t) + u(t)
    exchange.end()     # wait; θ(t+1) = θ(t) + u(t) − weight · Σ (s_i − s_k)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gossip.arguments import check_integer
from lightning_gossip.flat import FlatBuffer, FlatLayout, Segment
from lightning_gossip.link import Header, Kind
from lightning_gossip.mixing import MixingRule, Transfers, sum_of_differences
from lightning_gossip.schedule import Schedule
from lightning_gossip.transport import Posted, Transport


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
            exchange.posted.wait()
            exchange.posted = None
            self.stats.wait_seconds += time.perf_counter() - start

    @torch.no_grad()
    def _apply(self, exchange: _InFlight) -> None:
        self._arrive(exchange)
        self._in_flight = None
        partners = len(exchange.transfers.receive_from)
        if not partners:
            return
        start = time.perf_counter()
        buffers = exchange.buffers
        received = buffers.receive(partners)
        for buffer in received:
            buffer.unpack()
        if self.measure:
            self.stats.partner_distance = _mean_distance(buffers.own, received)
        weight = self._rule.weight(partners)
        layout = buffers.layout
        for index, segment in enumerate(layout.segments):
            snapshots = [buffer.segments[index] for buffer in received]
            out = buffers.difference(segment, snapshots[0])
            difference = sum_of_differences(buffers.own.segments[index], snapshots, out)
            parameters = [exchange.parameters[name] for name in segment.names]
            torch._foreach_add_(parameters, layout.views(segment, difference), alpha=-weight)
        self.stats.exchanges += partners
        self.stats.mix_seconds += time.perf_counter() - start


def _mean_distance(own: FlatBuffer, received: list[FlatBuffer]) -> float:
    """Return the mean over ``received`` of ‖own − received_k‖ / ‖own‖."""
    norm = _norm(own.segments)
    distances = [_norm([x - y for x, y in zip(own.segments, k.segments, strict=True)]) for k in received]
    return sum(distances) / len(distances) / norm if norm > 0 else 0.0


def _norm(segments: list[Tensor]) -> float:
    wide = [torch.complex128 if x.dtype.is_complex else torch.float64 for x in segments]
    return math.hypot(*(float(torch.linalg.vector_norm(x, dtype=w)) for x, w in zip(segments, wide, strict=True)))
