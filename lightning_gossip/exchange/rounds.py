"""The clock of LocalSGD and DiLoCo: rounds in which all replicas meet in one start (design §12; ``rules/outer.py``).

Used as the clock of pairwise exchanges is::

    rounds.begin()   # tick; where a round is due, post what this replica drifted since its start, a − θ(t)
    ...              # forward, backward, the optimizer's step: θ(t) + u(t)
    rounds.end()     # wait; the outer step a → a'; θ(t+1) = θ(t) + u(t) + (a' − θ(t))

What travels is the drift: it is rounded to the wire, not the parameters, so that a narrow wire costs little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.arguments import check_integer
from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout, travelling
from lightning_gossip.exchange.outer_state import OuterState
from lightning_gossip.exchange.staging import Staging
from lightning_gossip.exchange.stats import ExchangeStats
from lightning_gossip.exchange.tensors import wide
from lightning_gossip.rules.fragments import due, layers_of, strided
from lightning_gossip.rules.mixing import CHUNK
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.transport.all_reduce import AllReduce, Reduction, bytes_sent, part_bytes
from lightning_gossip.transport.interface import Staged
from lightning_gossip.transport.link import Header, Kind


class _Buffers:
    """Of one part of the model: what this replica drifted, what of it travels, and room for what comes back.

    Args:
        layout: on the wire.
        world_size: number of replicas.
        device: of the parameters.
        staging: where what travels lies in host memory and the parameters do not: the copies between the two.
    """

    def __init__(self, layout: FlatLayout, world_size: int, device: torch.device, staging: Staging | None) -> None:
        self.layout = layout
        self.drift = FlatBuffer.empty(layout.unrounded, device)
        self._rounded = FlatBuffer.empty(layout, device) if layout.narrows else self.drift
        self._staging = staging
        self.sent = self._rounded.storage
        room = world_size * part_bytes(layout.nbytes, world_size)
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
        if self._rounded is not self.drift:
            self._rounded.pack(self.drift.views)
        return None if self._staging is None else self._staging.stage(self._rounded.storage, self.sent)


@dataclass
class _Round:
    """Of one part of the model, posted and not applied yet; one of ``reduction`` and ``mean`` is None.

    The mean lies on the parameters' device (1-D, uint8).
    """

    step: int
    part: int
    parameters: Mapping[str, Tensor]
    buffers: _Buffers
    reduction: Reduction | None = None
    mean: Tensor | None = None


class Rounds:
    """One rank's rounds over a training.

    Args:
        rank: of this replica.
        world_size: number of replicas.
        period: steps from one round to the next, at least 1.
        outer: the step made with the mean drift.
        reducer: how drifts travel.
        parameters: returns this replica's parameters by name, the same names, shapes and dtypes on all ranks; those
            that require a gradient when a round is posted travel. They are equal on all ranks when they first do.
        delay: steps from posting to applying, from 0 to ``period - 1``.
        fragments: parts of the model, each with rounds of its own, period / fragments steps apart; up to ``period``.
        wire_dtype: drifts are rounded to it where it is narrower than the parameter.

    Raises:
        ValueError: if ``delay`` or ``fragments`` does not suit the period, or ``fragments`` exceeds the model's layers.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        period: int,
        outer: OuterStep,
        reducer: AllReduce,
        parameters: Callable[[], Mapping[str, Tensor]],
        delay: int = 0,
        fragments: int = 1,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.period = check_integer("period", period, low=1)
        check_integer("delay", delay, low=0, high=period - 1, why="at most period - 1")
        check_integer("fragments", fragments, low=1, high=period, why="at most period")
        if fragments > max(1, layers := len(layers_of(_sizes(parameters())))):
            raise ValueError(f"`fragments` must be at most {layers}, the layers of this model, got {fragments!r}")
        self.rank = rank
        self.world_size = world_size
        self.step = 0
        self.stats = ExchangeStats(partner=None)
        self.measure = False  # the clock of pairwise exchanges has it; here there is no partner to measure
        self._reducer = reducer
        self._parameters = parameters
        self._delay = delay
        self._fragments = fragments
        self._wire_dtype = wire_dtype
        self._state = OuterState(outer)
        self._in_flight: list[_Round] = []  # in the order in which they were posted, and will be applied
        self._buffers: dict[int, _Buffers] = {}  # by part

    @property
    def in_flight(self) -> bool:
        """Whether a round was posted and is not applied yet."""
        return bool(self._in_flight)

    @property
    def starts(self) -> Mapping[str, Tensor]:
        """The replicas' common start of the present round, by the parameters' names; to be read only."""
        return self._state.starts

    def begin(self) -> None:
        """Begin a step: advance the clock and, for every part whose round it is, post what it drifted."""
        self.step += 1
        self.stats.wait_seconds = self.stats.mix_seconds = 0.0
        self._apply(before=self.step - self._delay)  # what fell due when the clock was set forward
        tensors = travelling(self._parameters())
        self._state.follow(tensors)
        if parts := due(self.step, self.period, self._fragments):
            dealt = strided(_sizes(tensors), self._fragments)
            for part in parts:
                self._post(part, {name: tensors[name] for name in dealt[part]})

    def end(self) -> None:
        """End a step, after the optimizer's update: apply the rounds that are due.

        Raises:
            PartnerLost: if a rank died or stayed silent past the timeout.
            RunStopped: if some rank stopped.
        """
        self._apply(before=self.step - self._delay + 1)

    def align(self, clock: int) -> None:
        """Set the clock to the largest of the ranks' clocks, where all ranks meet."""
        self.step = max(self.step, clock)

    def reset_links(self, generation: int) -> None:
        """Begin anew with all, after a round was dropped; called on all ranks after :meth:`arrive`."""
        self._reducer.reset(generation)

    def arrive(self) -> None:
        """Wait until what is in flight has arrived: this rank may wait for others now.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        for round_ in list(self._in_flight):
            self._receive(round_)

    def drop(self) -> None:
        """Give up what is in flight, and starts and momenta: on all ranks alike, who are to get new parameters.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self.arrive()
        self._in_flight.clear()
        self._state = OuterState(self._state.step)

    def settle(self) -> None:
        """Apply what is in flight at once: at the end of training.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self._apply(before=self.step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return clock, counts, starts, momenta and what is in flight; it waits for what is on the wire.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self.arrive()
        in_flight = [
            {
                "step": round_.step,
                "part": round_.part,
                "names": list(round_.parameters),
                "layout": round_.buffers.layout.fingerprint,
                "drift": round_.buffers.drift.storage.clone(),
                "mean": round_.mean.clone(),
            }
            for round_ in self._in_flight
            if round_.mean is not None
        ]
        return {
            "step": self.step,
            "stats": asdict(self.stats),
            "outer": self._state.state_dict(),
            "in_flight": in_flight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned on this rank; what is in flight now is given up.

        Raises:
            ValueError: if it does not fit this replica's parameters.
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self.arrive()
        self._in_flight.clear()
        self._reducer.rewind()
        self.step = int(state["step"])
        self.stats = ExchangeStats(**state["stats"])
        parameters = self._parameters()
        self._state.load_state_dict(state["outer"], parameters)
        for saved in state["in_flight"]:
            if missing := [name for name in saved["names"] if name not in parameters]:
                raise ValueError(f"a round was in flight for parameters that this model does not have: {missing}")
            tensors = {name: parameters[name] for name in saved["names"]}
            buffers = self._buffers_of(int(saved["part"]), tensors)
            if saved["layout"] != buffers.layout.fingerprint:
                raise ValueError(
                    "a round was in flight whose parameters are not laid out as this model's are: `wire_dtype`,"
                    " `precision` and the parameters' shapes have to be as they were"
                )
            buffers.drift.storage.copy_(saved["drift"])
            mean = saved["mean"].to(buffers.drift.storage.device)
            self._in_flight.append(_Round(int(saved["step"]), int(saved["part"]), tensors, buffers, mean=mean))

    def close(self) -> None:
        """Give up what is in flight and release the transport."""
        self._reducer.close()
        self._in_flight.clear()
        self._buffers.clear()

    def _post(self, part: int, tensors: dict[str, Tensor]) -> None:
        # one that unfroze may have come to another part than it has a round in flight with
        under_way = {name for round_ in self._in_flight for name in round_.parameters}
        tensors = {name: p for name, p in tensors.items() if name not in under_way}
        if not tensors:
            return
        start = time.perf_counter()
        buffers = self._buffers_of(part, tensors)
        staged = buffers.fill(self._state.starts, tensors)
        layout = buffers.layout
        round_ = _Round(self.step, part, tensors, buffers)
        if self.world_size > 1:
            header = Header(Kind.REDUCTION, self.step, layout.nbytes, layout.fingerprint, part)
            round_.reduction = self._reducer.post(header, buffers.sent, buffers.room, mean_over(layout), staged)
        else:
            round_.mean = buffers.sent
        self._in_flight.append(round_)
        self.stats.mix_seconds += time.perf_counter() - start

    def _buffers_of(self, part: int, tensors: Mapping[str, Tensor]) -> _Buffers:
        """Return the buffers of a part; new ones only where names, shapes, dtypes or the device changed."""
        layout = FlatLayout(tensors, self._wire_dtype)
        device = next(iter(tensors.values())).device
        kept = self._buffers.get(part)
        same = kept is not None and list(kept.layout.shapes) == list(tensors) and kept.drift.storage.device == device
        if kept is None or not same or kept.layout.fingerprint != layout.fingerprint:
            kept = self._buffers[part] = _Buffers(layout, self.world_size, device, self._staging_of(device))
        return kept

    def _staging_of(self, device: torch.device) -> Staging | None:
        """Return what copies between the device and the host, for one part, whose rounds never overlap."""
        return Staging(device) if self._reducer.from_host and self.world_size > 1 and device.type != "cpu" else None

    def _receive(self, round_: _Round) -> bool:
        """Wait until a round's mean is there; give up one that was dropped, and return False."""
        if round_.reduction is None:
            return True
        start = time.perf_counter()
        round_.mean = round_.reduction.wait()
        round_.reduction = None
        self.stats.wait_seconds += time.perf_counter() - start
        if came := round_.mean is not None:
            self.stats.bytes_sent += bytes_sent(round_.buffers.layout.nbytes, self.world_size, self.rank)
        else:
            # nobody has its mean: starts stay where they are, and the next round's drift begins there
            self._in_flight.remove(round_)
            del self._buffers[round_.part]  # links may be writing to them until they are closed
        return came

    def _apply(self, before: int) -> None:
        """Apply the rounds that were posted before a step."""
        while self._in_flight and self._in_flight[0].step < before:
            round_ = self._in_flight[0]
            if self._receive(round_):
                self._in_flight.pop(0)
                self._make_step(round_)

    @torch.no_grad()
    def _make_step(self, round_: _Round) -> None:
        if round_.mean is None:
            raise RuntimeError("a round is applied once its mean is there")
        start = time.perf_counter()
        buffers = round_.buffers
        means, drifts = FlatBuffer(buffers.layout, round_.mean).views, buffers.drift.views
        for name, parameter in round_.parameters.items():
            theta = parameter.detach()
            for a, velocity, x, drift, mean in self._state.pieces(name, theta, drifts[name], means[name]):
                moved = self._state.step.descend(a, velocity, mean.to(a.dtype))
                x.add_(drift).add_(moved)  # a' − θ(t) = (a − θ(t)) + (a' − a)
        if self.world_size > 1:
            self.stats.exchanges += 1
        self.stats.mix_seconds += time.perf_counter() - start


def mean_over(layout: FlatLayout) -> Callable[[Sequence[Tensor], int, Tensor], None]:
    """Return what writes the mean of some buffers' stretch, summed in their order, in float32 or wider.

    It is told the stretch of each (1-D, uint8), at which byte of the whole it begins, and where to write.
    """

    def combine(stretches: Sequence[Tensor], begin: int, out: Tensor) -> None:
        for segment in layout.segments:
            first = max(segment.start - begin, 0)
            last = min(segment.start + segment.nbytes - begin, out.numel())
            if first >= last:
                continue
            width = wide(segment.dtype)
            numbers = [x[first:last].view(segment.wire_dtype) for x in (out, *stretches)]
            chunk = CHUNK if out.device.type == "cpu" else numbers[0].numel()
            for target, *pieces in zip(*(x.split(chunk) for x in numbers), strict=True):
                total = pieces[0].to(width, copy=True)
                for piece in pieces[1:]:
                    total += piece
                target.copy_(total.div_(len(pieces)))

    return combine


def _sizes(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in parameters.items()}
