"""The clock of LocalSGD and DiLoCo: rounds in which all replicas meet in one start (design §12; ``rules/outer.py``).

Used as the clock of pairwise exchanges is::

    rounds.begin()   # tick; where a round is due, post what this replica drifted since its start, a − θ(t)
    ...              # forward, backward, the optimizer's step: θ(t) + u(t)
    rounds.end()     # wait; the outer step a → a'; θ(t+1) = θ(t) + u(t) + (a' − θ(t))

What travels is the drift: it is rounded to the wire, not the parameters, so that a narrow wire costs little.

A round is applied by all or by none, so that no two replicas ever have different starts:

=================================  ====================================================================================
a round                            is
=================================  ====================================================================================
whose mean all have                applied, in the step in which it falls due
in which a member is lost, or      dropped (:mod:`~lightning_gossip.transport.voted_all_reduce`): starts and momenta
which one has not begun            stay, what replicas drifted stays in them, and is in the next round's drift
whose mean is not finite           the same; all see it, for they have the same mean
after which a replica is found     that replica goes back to its starts, once: what it has in flight besides counts as
sick: its own drift is not finite  no drift of its own. Or it ends, as ``nonfinite`` says
=================================  ====================================================================================
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.arguments import check_choice, check_integer
from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout, travelling
from lightning_gossip.exchange.outer_state import OuterState
from lightning_gossip.exchange.round_buffers import MeanOver, Round, RoundBuffers
from lightning_gossip.exchange.staging import Staging
from lightning_gossip.exchange.stats import NONFINITE, ExchangeStats, NonFinite, NotFinite
from lightning_gossip.rules.fragments import due, layers_of, strided
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.transport.all_reduce import AllReduce
from lightning_gossip.transport.halves import bytes_sent
from lightning_gossip.transport.header import Header, Kind

log = logging.getLogger(__name__)


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
        members: returns the ranks that take part in the round of a step, ascending; None for all, always.
        nonfinite: what becomes of a replica that is not finite: it goes back to the common start (``"heal"``), or
            raises (``"error"``).

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
        members: Callable[[int], tuple[int, ...]] | None = None,
        nonfinite: NonFinite = "error",
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
        self.on_heal: Callable[[], None] = lambda: None  # called after this replica went back to its start
        self.measure = False  # the clock of pairwise exchanges has it; here there is no partner to measure
        self._reducer = reducer
        self._parameters = parameters
        self._delay = delay
        self._fragments = fragments
        self._wire_dtype = wire_dtype
        self._members = members or (lambda step: tuple(range(world_size)))
        self._heals = check_choice("nonfinite", nonfinite, NONFINITE) == "heal"
        self._state = OuterState(outer)
        self._in_flight: list[Round] = []  # in the order in which they were posted, and will be applied
        self._buffers: dict[int, RoundBuffers] = {}  # by part

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
            members = self._members(self.step)
            for part in parts:
                self._post(part, {name: tensors[name] for name in dealt[part]}, members)

    def end(self) -> None:
        """End a step, after the optimizer's update: apply the rounds that are due.

        Raises:
            PartnerLost: if a rank died or stayed silent past the timeout, and the run ends with that.
            RunStopped: if some rank stopped.
            NotFinite: if this replica is not finite, and ``nonfinite`` is ``"error"``.
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

    def state_to_join(self) -> dict[str, Any]:
        """Return what a rank begins with that takes over this replica, after a meeting that came before it.

        Rounds from now on count that rank; those that are in flight do not, and are its own all the same: they are
        applied to what was this replica when they were posted. :meth:`load_state_dict` takes it.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        return self.state_dict() | {"stats": asdict(ExchangeStats(partner=None)), "reducer": self._reducer.position()}

    def state_dict(self) -> dict[str, Any]:
        """Return clock, counts, starts, momenta and what is in flight; it waits for what is on the wire.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self.arrive()
        in_flight = [round_.state_dict() for round_ in self._in_flight]
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
        if "reducer" in state:
            self._reducer.take_place(state["reducer"])
        self.step = int(state["step"])
        self.stats = ExchangeStats.of(state["stats"])
        parameters = self._parameters()
        self._state.load_state_dict(state["outer"], parameters)
        for saved in state["in_flight"]:
            if missing := [name for name in saved["names"] if name not in parameters]:
                raise ValueError(f"a round was in flight for parameters that this model does not have: {missing}")
            tensors = {name: parameters[name] for name in saved["names"]}
            buffers = self._buffers_of(int(saved["part"]), tensors)
            self._in_flight.append(Round.from_state(saved, tensors, buffers, self.world_size))

    def close(self) -> None:
        """Give up what is in flight and release the transport."""
        self._reducer.close()
        self._in_flight.clear()
        self._buffers.clear()

    def _post(self, part: int, tensors: dict[str, Tensor], members: tuple[int, ...]) -> None:
        # one that unfroze may have come to another part than it has a round in flight with
        under_way = {name for round_ in self._in_flight for name in round_.parameters}
        tensors = {name: p for name, p in tensors.items() if name not in under_way}
        if not tensors:
            return
        start = time.perf_counter()
        buffers = self._buffers_of(part, tensors)
        staged = buffers.fill(self._state.starts, tensors)
        layout = buffers.layout
        round_ = Round(self.step, part, tensors, buffers, members)
        if members == (self.rank,):
            round_.arrived(buffers.rounded.storage)
        else:
            header = Header(Kind.REDUCTION, self.step, layout.nbytes, layout.fingerprint, part)
            mean = MeanOver(layout)
            round_.reduction = self._reducer.post(header, buffers.sent, buffers.room, mean, staged, members)
        self._in_flight.append(round_)
        self.stats.mix_seconds += time.perf_counter() - start

    def _buffers_of(self, part: int, tensors: Mapping[str, Tensor]) -> RoundBuffers:
        """Return the buffers of a part; new ones only where names, shapes, dtypes or the device changed."""
        layout = FlatLayout(tensors, self._wire_dtype)
        device = next(iter(tensors.values())).device
        kept = self._buffers.get(part)
        same = kept is not None and list(kept.layout.shapes) == list(tensors) and kept.drift.storage.device == device
        if kept is None or not same or kept.layout.fingerprint != layout.fingerprint:
            kept = self._buffers[part] = RoundBuffers(layout, self.world_size, device, self._staging_of(device))
        return kept

    def _staging_of(self, device: torch.device) -> Staging | None:
        """Return what copies between the device and the host, for one part, whose rounds never overlap."""
        return Staging(device) if self._reducer.from_host and self.world_size > 1 and device.type != "cpu" else None

    def _receive(self, round_: Round) -> bool:
        """Wait until a round's mean is there; give up one that was dropped, and return False."""
        if round_.reduction is None:
            return True
        start = time.perf_counter()
        mean = round_.reduction.wait()
        self.stats.wait_seconds += time.perf_counter() - start
        if mean is None:
            # nobody has its mean: starts stay where they are, and the next round's drift begins there
            self._in_flight.remove(round_)
            del self._buffers[round_.part]  # links may be writing to them until they are closed
            return False
        round_.arrived(mean)
        ranks, index = len(round_.members), round_.members.index(self.rank)
        self.stats.bytes_sent += bytes_sent(round_.buffers.layout.nbytes, ranks, index)
        return True

    def _apply(self, before: int) -> None:
        """Apply the rounds that were posted before a step."""
        while self._in_flight and self._in_flight[0].step < before:
            round_ = self._in_flight[0]
            if self._receive(round_):
                self._in_flight.pop(0)
                if round_.finite:
                    self._make_step(round_)
                else:
                    self._leave_out(round_)

    @torch.no_grad()
    def _leave_out(self, round_: Round) -> None:
        """Drop a round whose mean is not finite, and heal this replica where it is the cause."""
        if not round_.sick or round_.healed:
            log.info("the round of step %d is dropped: its mean is not finite", round_.step)
            return
        found = NotFinite(self.rank, round_.step, self.rank)
        if not self._heals:
            raise found
        log.warning("%s: it goes back to the common start, and the round is dropped", found)
        parameters = self._parameters()
        for name, start in self._state.starts.items():
            parameters[name].detach().copy_(start)
        for other in self._in_flight:
            other.healed = True
        self.stats.healed += 1
        self.on_heal()

    @torch.no_grad()
    def _make_step(self, round_: Round) -> None:
        if round_.mean is None:
            raise RuntimeError("a round is applied once its mean is there")
        start = time.perf_counter()
        buffers = round_.buffers
        means, drifts = FlatBuffer(buffers.layout, round_.mean).views, buffers.drift.views
        for name, parameter in round_.parameters.items():
            theta = parameter.detach()
            for a, velocity, x, drift, mean in self._state.pieces(name, theta, drifts[name], means[name]):
                moved = self._state.step.descend(a, velocity, mean.to(a.dtype))
                if not round_.healed:
                    x.add_(drift)
                x.add_(moved)  # a' − θ(t) = (a − θ(t)) + (a' − a)
        if len(round_.members) > 1:
            self.stats.exchanges += 1
        self.stats.mix_seconds += time.perf_counter() - start


def _sizes(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in parameters.items()}
