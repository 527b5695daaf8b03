"""The exchange clock: snapshots, posting, waiting and applying (design §3).

Usable from any training loop::

    exchange.begin()   # tick; post the snapshot of θ(t)
    ...                # forward, backward, the optimizer's step: θ(t) + u(t)
    exchange.end()     # wait; θ(t+1) = θ(t) + u(t) − weight · Σ (s_i − s_k)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.arguments import check_choice, check_integer
from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout, travelling
from lightning_gossip.exchange.in_flight import InFlight
from lightning_gossip.exchange.mixer import Mixer
from lightning_gossip.exchange.outer_gossip import OuterGossip
from lightning_gossip.exchange.staging import Staging
from lightning_gossip.exchange.stats import NONFINITE, ExchangeStats, NonFinite, mean_distance
from lightning_gossip.rules.mixing import MixingRule, Transfers
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.header import Header, Kind
from lightning_gossip.transport.interface import Staged, Transport


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
        outer: the step that every rank makes in each round with what it drifted since the last, before it exchanges
            what the step leads to (:mod:`~lightning_gossip.rules.outer`; with :class:`ElasticMixing`, whose mixing sums
            to zero); None exchanges the replicas as they are.
        members: returns the ranks among which the round of a step is drawn, ascending; None for all, always. Where the
            schedule can not serve as many, all are drawn, and the transport skips those that are lost.
        nonfinite: what becomes of a replica that is not finite: it takes a partner's snapshot (``"heal"``), or whoever
            finds it raises (``"error"``).

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
        outer: OuterStep | None = None,
        members: Callable[[int], tuple[int, ...]] | None = None,
        nonfinite: NonFinite = "error",
    ) -> None:
        check_integer("delay", delay, low=0, high=schedule.period - 1, why="at most period - 1")
        schedule.check_world_size(world_size)
        self.rank = rank
        self.world_size = world_size
        self.step = 0
        self.stats = ExchangeStats()
        self.on_heal: Callable[[], None] = lambda: None  # called after this replica took a partner's snapshot
        self.measure = False  # whether to compute `stats.partner_distance`, one more pass over the snapshots
        self._schedule = schedule
        self._rule = rule
        self._transport = transport
        self._parameters = parameters
        self._delay = delay
        self._wire_dtype = wire_dtype
        self._outer = None if outer is None else OuterGossip(outer)
        self._members = members
        heals = check_choice("nonfinite", nonfinite, NONFINITE) == "heal"
        self._mixer = Mixer(rank, rule, self._outer, heals)
        self._drawn: dict[int, Transfers] = {}  # by step
        self._drawn_among: tuple[int, ...] = tuple(range(world_size))
        self._in_flight: InFlight | None = None
        self._layout: FlatLayout | None = None
        self._signature: tuple[object, ...] = ()
        self._most_bytes = 0  # of a snapshot, when all parameters travel; 0: not known yet
        self._snapshots: dict[int, FlatBuffer] = {}  # by address of the room: there are few
        self._staging: Staging | None = None  # where the transport's rooms are on the host and the replica is not

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
            self._apply()  # it fell due when the clock was set forward
        if self._outer is not None:
            self._outer.follow(travelling(self._parameters()))
        if not self._schedule.is_round(self.step):
            return
        transfers = self._transfers()
        if transfers or self._outer is not None:
            self._post(transfers)

    def end(self) -> None:
        """End a step, after the optimizer's update: apply the exchange that is due.

        Raises:
            PartnerLost: if a partner died or stayed silent past the timeout, and the run ends with that.
            RunStopped: if some rank stopped.
            NotFinite: if a replica is not finite, and ``nonfinite`` is ``"error"``.
        """
        if self._in_flight is not None and self.step >= self._in_flight.step + self._delay:
            self._apply()

    def align(self, clock: int) -> None:
        """Set the clock to the largest of the ranks' clocks, where all ranks meet."""
        self.step = max(self.step, clock)

    def reset_links(self, generation: int) -> None:
        """Begin anew with all partners, after some were skipped; called on all ranks after :meth:`arrive`."""
        self._transport.reset(generation)

    def arrive(self) -> None:
        """Wait until what is in flight has arrived, and keep a copy of it until it is due.

        Nothing is on the wire afterwards, and no partner waits for this rank to have read its snapshot: this rank may
        wait for others now.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self._receive()
        if (exchange := self._in_flight) is not None and exchange.posted is not None:
            exchange.received = [payload.clone() for payload in exchange.received or ()]
            exchange.posted.release()
            exchange.posted = None

    def drop(self) -> None:
        """Give up what is in flight, on all ranks alike: the parameters to which it belongs are replaced.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self.arrive()
        self._in_flight = None
        if self._outer is not None:
            self._outer.begin_anew()

    def settle(self) -> None:
        """Apply what is in flight at once: at the end of training.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self._apply()

    def state_to_join(self) -> dict[str, Any]:
        """Return what a rank begins with that takes over this replica: nothing in flight, and nobody's counts.

        It waits for nobody; :meth:`load_state_dict` takes it.
        """
        state: dict[str, Any] = {"step": self.step, "stats": asdict(ExchangeStats()), "in_flight": None}
        if self._outer is not None:
            state["outer"] = self._outer.state_dict()
            if self._in_flight is not None:  # a round that is another's; the joiner's first begins here
                here = travelling(self._parameters())
                state["outer"]["starts"] = {name: p.detach().clone() for name, p in here.items()}
        return state | {"transport": self._transport.position()}

    def state_dict(self) -> dict[str, Any]:
        """Return clock, counts and what is in flight, as tensors and numbers; it waits for what is on the wire.

        Raises:
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self.arrive()
        state: dict[str, Any] = {"step": self.step, "stats": asdict(self.stats), "in_flight": None}
        if self._outer is not None:
            state["outer"] = self._outer.state_dict()
        if (exchange := self._in_flight) is not None and (exchange.received or exchange.proposal is not None):
            state["in_flight"] = {
                "step": exchange.step,
                "partner": exchange.partner,
                "names": list(exchange.parameters),
                "layout": exchange.layout.fingerprint,
                "own": exchange.own.clone(),
                "received": exchange.received,
                # where the wire rounds nothing the snapshot is the proposal
                "proposal": exchange.proposal.storage.clone()
                if exchange.proposal and exchange.layout.narrows
                else None,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned on this rank; what is in flight now is given up.

        Raises:
            ValueError: if what was in flight does not fit this replica's parameters.
            PartnerLost, RunStopped: as :meth:`end`.
        """
        self.arrive()
        self._in_flight = None
        self._transport.rewind()
        if "transport" in state:
            self._transport.take_place(state["transport"])
        self.step = int(state["step"])
        self.stats = ExchangeStats.of(state["stats"])
        parameters = self._parameters()
        saved = state["in_flight"]
        if self._outer is not None and "outer" in state:
            self._outer.load_state_dict(state["outer"], parameters)
        if saved is None:
            return
        if (self._outer is None) != ("outer" not in state):
            raise ValueError(
                "an exchange was in flight, with an outer step on one side of the checkpoint and without on the other:"
                " `outer_lr` and `outer_momentum` have to be as they were"
            )
        missing = [name for name in saved["names"] if name not in parameters]
        if missing:
            raise ValueError(f"an exchange was in flight for parameters that this model does not have: {missing}")
        tensors = {name: parameters[name] for name in saved["names"]}
        layout = self._layout_of(tensors)
        # files from before the layout was saved tell the size alone
        if saved.get("layout", layout.fingerprint) != layout.fingerprint or saved["own"].numel() != layout.nbytes:
            raise ValueError(
                f"an exchange of {saved['own'].numel()} bytes was in flight, which are not laid out as this model's"
                f" {layout.nbytes} are: `wire_dtype`, `precision` and the parameters' shapes have to be as they were"
            )
        device = next(iter(tensors.values())).device
        own, *received = (payload.to(device) for payload in (saved["own"], *saved["received"]))
        partner = int(saved.get("partner", -1))
        proposal = None
        if self._outer is not None:
            proposal = FlatBuffer(layout.unrounded, saved["proposal"].to(device) if layout.narrows else own)
        self._in_flight = InFlight(int(saved["step"]), tensors, layout, own, None, received, partner, proposal)

    def close(self) -> None:
        """Give up what is in flight and release the transport."""
        self._in_flight = None
        self._snapshots.clear()
        self._transport.close()

    def _transfers(self) -> Transfers:
        """Return this rank's transfers in the present step.

        Those of a block of rounds are drawn together: a forward and backward pass leaves the caches cold for a draw,
        which then takes ten times as long as one that follows another.
        """
        if self._members is not None and (members := self._members(self.step)) != self._drawn_among:
            self._drawn_among = members
            self._drawn.clear()
        if self.step not in self._drawn:
            period = self._schedule.period
            steps = range(self.step, self.step + self._schedule.drawn_together * period, period)
            self._drawn = {step: self._draw(step, self._drawn_among) for step in steps}
        return self._drawn[self.step]

    def _draw(self, step: int, members: tuple[int, ...]) -> Transfers:
        """Return this rank's transfers in a round of ``members``, numbered among them for the schedule."""
        if self.rank not in members:
            return Transfers((), ())
        if len(members) == self.world_size or not self._schedule.serves(len(members)):
            return self._rule.transfers(self._schedule.choices(step, self.world_size), self.rank)
        drawn = self._rule.transfers(self._schedule.choices(step, len(members)), members.index(self.rank))
        return Transfers(*(tuple(members[k] for k in ranks) for ranks in (drawn.send_to, drawn.receive_from)))

    def _post(self, transfers: Transfers) -> None:
        parameters = self._parameters()
        tensors = travelling(parameters)
        if not tensors:
            return
        start = time.perf_counter()
        layout = self._layout_of(tensors)
        if not self._most_bytes:
            self._most_bytes = FlatLayout(parameters, self._wire_dtype).nbytes
        room = self._transport.room(layout.nbytes, self._most_bytes)
        ready = time.perf_counter()
        own, proposal, staged = self._snapshot(layout, tensors, room)
        self._in_flight = exchange = InFlight(self.step, tensors, layout, own, None, [], proposal=proposal)
        if transfers:
            header = Header(Kind.SNAPSHOT, self.step, layout.nbytes, layout.fingerprint)
            exchange.posted = self._transport.post(header, transfers.send_to, transfers.receive_from, staged)
            exchange.received = None
        self.stats.wait_seconds += ready - start
        self.stats.mix_seconds += time.perf_counter() - ready

    def _layout_of(self, tensors: Mapping[str, Tensor]) -> FlatLayout:
        """Return the layout of these tensors; a new one only where names, shapes, dtypes or the device changed."""
        signature = tuple((name, p.dtype, p.shape, p.device) for name, p in tensors.items())
        if self._layout is None or signature != self._signature:
            self._layout = FlatLayout(tensors, self._wire_dtype)
            self._signature = signature
            self._snapshots.clear()
        return self._layout

    def _snapshot(
        self, layout: FlatLayout, tensors: Mapping[str, Tensor], room: Tensor
    ) -> tuple[Tensor, FlatBuffer | None, Staged | None]:
        """Copy ``tensors``, or what an outer step makes of them, to ``room``.

        Returns:
            The snapshot on their device (1-D, uint8); what an outer step led to before it was rounded; and, where the
            room is on the host and they are not, what tells when it has been copied there, beside training.
        """
        device = next(iter(tensors.values())).device
        staging = None if room.device == device else self._staging_of(device)
        address = room.data_ptr() if staging is None else 0
        if (snapshot := self._snapshots.get(address)) is None:
            snapshot = FlatBuffer(layout, room) if staging is None else FlatBuffer.empty(layout, device)
            self._snapshots[address] = snapshot
        if staging is not None:
            staging.before_packing()
        proposal = None
        if self._outer is None:
            snapshot.pack(tensors)
        else:
            proposal = self._outer.propose(tensors, snapshot)
        return snapshot.storage, proposal, None if staging is None else staging.stage(snapshot.storage, room)

    def _staging_of(self, device: torch.device) -> Staging:
        if self._staging is None:
            self._staging = Staging(device)
        return self._staging

    def _receive(self) -> None:
        """Wait until what is in flight has arrived."""
        if (exchange := self._in_flight) is None or exchange.posted is None:
            return
        start, done = time.perf_counter(), exchange.posted.wait()
        exchange.received = [done.received[partner] for partner in sorted(done.received)]
        exchange.received_from = tuple(sorted(done.received))
        exchange.partner = min({*done.received, *done.sent_to}, default=-1)
        self.stats.bytes_sent += len(done.sent_to) * exchange.layout.nbytes
        self.stats.wait_seconds += time.perf_counter() - start

    @torch.no_grad()
    def _apply(self) -> None:
        self._receive()
        exchange, self._in_flight = self._in_flight, None
        if exchange is None:
            return
        start = time.perf_counter()
        self.stats.partner = exchange.partner
        layout, received = exchange.layout, exchange.received
        if received and self.measure:
            self.stats.partner_distance = mean_distance(
                layout.split(exchange.own), [layout.split(payload) for payload in received]
            )
            start = time.perf_counter()  # measuring is no part of mixing
        if (received or exchange.proposal is not None) and not self._mix(exchange, received or []):
            received = self._mixer.mix_finite(exchange, received or [], self._note_healing)
        self.stats.exchanges += len(received or ())
        if exchange.posted is not None:
            exchange.posted.release()
        self.stats.mix_seconds += time.perf_counter() - start

    def _mix(self, exchange: InFlight, received: Sequence[Tensor]) -> bool:
        """Mix ``received`` in, or nothing where something is not finite: see :meth:`Mixer.mix`."""
        return self._mixer.mix(exchange, received)

    def _note_healing(self) -> None:
        self.stats.healed += 1
        self.on_heal()
