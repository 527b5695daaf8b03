"""Exchanges that nobody waits for, over links and threads: who asks, who is asked (the words: :mod:`agreement`).

Whose thread does what:

====================  ================================================================================================
thread                does
====================  ================================================================================================
training              :meth:`Partners.ask` in its own round, with a snapshot; :meth:`take` and :meth:`release` at the
                      end of a step
of an own link        asks, hears, trades; asks the next where one is busy
of a visitor's link   waits for asks; answers, with a snapshot taken while the parameters stand still; trades
====================  ================================================================================================
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistNetworkError, DistStoreError, Store

from lightning_gossip.control.meeting import Process
from lightning_gossip.control.run import LOOK, Control
from lightning_gossip.exchange.agreement import Phase, Side, Word
from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout
from lightning_gossip.exchange.snapshots import Agreed, Misfits, Received, Snapshot, Standing
from lightning_gossip.exchange.spoken import pass_payloads
from lightning_gossip.exchange.standstill import Standstill
from lightning_gossip.transport.doors import Doors
from lightning_gossip.transport.header import Header, LinkError
from lightning_gossip.transport.interface import PartnerLost
from lightning_gossip.transport.link import Link, reason_of

PATIENCE = 2.0
"""Seconds after which a rank withdraws an ask to which nothing was said: nobody answers more slowly but who is stopped,
or has not come yet."""

_FOR_EVER = timedelta(days=365)


@dataclass
class Counts:
    """Since the start: bytes of payload sent; exchanges that were agreed, but for those that others asked for alone."""

    bytes_sent: int = 0
    agreed: int = 0


class Partners(ABC):
    """One rank's exchanges with others, while it trains.

    Args:
        control: of the run.
        store: of the run, on a connection that nobody blocks.
        still: when this rank's parameters stand still.
        standing: returns what does.
        another: returns whom to ask next, given the step of the round, who was asked in it and who must not be; -1 for
            nobody.
        sends: whether the leader, and the asked one, send a snapshot.
    """

    def __init__(
        self,
        control: Control,
        store: Store,
        still: Standstill,
        standing: Callable[[], Standing],
        another: Callable[[int, set[int], set[int]], int],
        sends: tuple[bool, bool],
    ) -> None:
        self._control = control
        self._rank = control.rank
        self._still = still
        self._standing = standing
        self._another = another
        self._leader_sends, self._asked_sends = sends
        self._changed = threading.Condition()  # holds all that follows
        own = control.process_of(control.rank)
        self._side = Side(own.rank, asks=own.incarnation << 32)  # whoever comes back counts on
        self._own: Snapshot | None = None  # of the exchange that this rank is in, or asks for
        self._theirs: Received | None = None
        self._tried: set[int] = set()
        self._known: dict[int, Process] = {}  # by rank: the last one that this rank has a link with
        self._members = set[Process]()  # as last looked at
        self._silent: set[int] = set()  # ranks that have said nothing to an ask yet, which was withdrawn
        self._asked_at = 0.0
        self.counts = Counts()
        self._failure: tuple[int, BaseException] | None = None
        self._closing = False
        self._buffers: dict[Hashable, FlatBuffer] = {}
        self._misfits = Misfits(own.rank)
        self._doors = Doors(store, own, control.timeout, self._let_in)

    # -- from the training thread -------------------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        """Whether an exchange was asked for, or agreed, and is not applied yet."""
        return self._side.phase is not Phase.IDLE

    def ask(self, partner: int, standing: Standing, write: Callable[[FlatBuffer], None]) -> bool:
        """Ask ``partner`` for an exchange, and others where it is busy, unless one is under way; return whether it did.

        Args:
            partner: a rank.
            standing: what stands now.
            write: writes the snapshot.
        """
        with self._changed:
            if not self._side.is_free:
                return False
            buffer = self._buffer("own", standing.layout)
            write(buffer)
            self._own = Snapshot(standing, buffer)
            self._tried = set()
            self._ask_one(partner)
        return True

    def greet(self, ranks: Iterable[int]) -> None:
        """Make links to ``ranks``, beside training, before they are needed."""

        def hello(link: Link) -> None:
            link.send(Header(Word.HELLO, 0, 0))
            link.flush()

        for rank in ranks:
            link = self._doors.to(process := self._know(self._control.process_of(rank)))
            self._run(link, process, partial(hello, link))

    def take(self) -> Agreed | None:
        """Return what is to be applied now, if anything; :meth:`release` it once it is."""
        with self._changed:
            if self._side.phase is not Phase.AGREED or self._own is None or self._theirs is None:
                return None
            return Agreed(self._own, (self._theirs,))

    def release(self) -> None:
        """What was taken is applied."""
        with self._changed:
            self._side = self._side.applied()
            self._theirs = None
            self._changed.notify_all()

    def leave(self) -> None:
        """Take part in nothing new from now on."""
        with self._changed:
            self._side = self._side.leave().side
            self._withdraw()

    def _withdraw(self) -> None:
        """Wait no more for who was asked and says nothing, with the lock held."""
        partner = self._side.partner
        before, self._side = self._side, self._side.withdraw().side
        if self._side is not before:
            self._silent.add(partner)
        self._changed.notify_all()

    def come_back(self) -> None:
        """Take part again."""
        with self._changed:
            self._side = self._side.come_back()

    def await_settled(self) -> None:
        """Wait until nothing is under way any more; what is agreed is to be taken then.

        Raises:
            PartnerLost, RunStopped: as :meth:`check`.
        """
        deadline = self._control.patience()
        while True:
            with self._changed:
                settled = self._changed.wait_for(lambda: self._side.is_settled or self._failure is not None, LOOK)
                partner = self._side.partner
            self.check()
            if settled:
                return
            self._control.check()
            if time.monotonic() >= deadline:
                limit = self._control.timeout.total_seconds()
                raise self._lost(partner, f"it stayed silent for {limit:g} s")

    def check(self) -> None:
        """Let go of ranks that are lost, and of asks to which nothing is said; raise what ends the run.

        Raises:
            PartnerLost: if a partner died or stayed silent past the timeout, and the run ends with that.
            RunStopped: if that was because some rank stopped.
        """
        if self._failure is not None:
            partner, error = self._failure
            self._control.check_cause(partner)
            raise self._lost(partner, reason_of(error)) from error
        members = set(map(self._control.process_of, self._control.members))
        for lost in self._members - members:
            if lost == self._known.get(lost.rank):
                self._let_go(lost)
        self._members = members
        if self._side.partner >= 0 and time.monotonic() > self._asked_at + PATIENCE:
            with self._changed:
                if time.monotonic() > self._asked_at + PATIENCE:
                    self._withdraw()

    def _know(self, process: Process) -> Process:
        """Return the last one at its rank; let go of the one before: what its links do tells nothing of this one."""
        with self._changed:
            before = self._known.setdefault(process.rank, process)
            if before < process:
                self._known[process.rank] = process
                self._let_go(before)
            return self._known[process.rank]

    def _let_go(self, lost: Process) -> None:
        """Let go of one that is lost: a host that is cut off breaks no link."""
        with self._changed:
            self._silent.discard(lost.rank)
            self._side = self._side.lose(lost.rank).side
            self._changed.notify_all()
        self._doors.part(lost)

    def close(self) -> None:
        """Give up whatever is under way; the parameters are not still any more by then."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._doors.close()

    # -- who asks ---------------------------------------------------------------------------------------------------

    def _begin(self, partner: int, own: Snapshot) -> None:
        """Ask, with the lock held."""
        process = self._know(self._control.process_of(partner))
        self._tried.add(partner)
        self._asked_at = time.monotonic()
        self._side = self._side.ask(partner).side
        try:
            link = self._doors.to(process)
        except (DistNetworkError, DistStoreError):  # the run's store is gone: its control ends it
            self._side = self._side.part(partner).side
            return
        self._run(link, process, partial(self._ask, link, partner, own, self._side.asks))

    def _ask(self, link: Link, partner: int, own: Snapshot, asks: int) -> None:
        link.send(own.header(Word.ASK, asks))
        header = link.receive_header()
        link.flush()
        if header.kind not in (Word.ANSWER, Word.BUSY, Word.CROSSED):
            raise LinkError(f"rank {partner} answered with a message of kind {header.kind}")
        with self._changed:
            self._silent.discard(partner)
            asking = self._side.phase is Phase.ASKING and self._side.asks == asks
            self._side, says = self._side.hear_reply(Word(header.kind), partner, asks, header.number)
            if asking and header.kind != Word.ANSWER:
                self._go_on()
            self._changed.notify_all()
        if header.kind == Word.ANSWER:
            go = any(say.word is Word.GO for say in says)
            self._say(link, Word.GO if go else Word.VOID)
            if go:
                self._trade(link, partner, own, header, leads=True)

    def _hear(self, word: Word, partner: int, leader: int) -> None:
        with self._changed:
            self._side = self._side.hear(word, partner, leader).side
            self._changed.notify_all()

    def _go_on(self) -> None:
        """Ask another, with the lock held, where the present ask came to nothing."""
        if self._side.is_free and self._own is not None and not self._closing:
            self._ask_one(self._another(self._own.step, self._tried, self._silent))
        self._changed.notify_all()

    def _ask_one(self, partner: int) -> None:
        """Ask ``partner``, or another in the place of one that has said nothing for long, with the lock held."""
        if self._own is not None and partner in self._silent:
            partner = self._another(self._own.step, self._tried, self._silent)
        if self._own is not None and partner >= 0:
            self._begin(partner, self._own)

    def _trade(self, link: Link, partner: int, own: Snapshot, header: Header, leads: bool) -> None:
        """Exchange payloads; what is agreed then waits for the end of the step."""
        sends, receives = self._leader_sends, self._asked_sends
        if not leads:
            sends, receives = receives, sends
        if not self._misfits.fits(partner, own, header):
            with self._changed:
                self._side = self._side.part(partner).side
                self._go_on() if leads else self._changed.notify_all()
            return
        incoming = self._buffer("theirs", own.of.layout).storage if receives else None
        leader = self._rank if leads else partner

        def whole() -> None:
            with self._changed:
                if incoming is not None:
                    self._theirs = Received(partner, header.step, header.extra, incoming)
                self._side = self._side.hear(Word.PAYLOAD, partner, leader).side

        self._pass(link, own if sends else None, incoming, own.step, whole)
        with self._changed:
            self.counts.agreed += 1
            self._side = self._side.hear(Word.HELD, partner, leader).side
            if not receives:
                self._side = self._side.applied()  # there is nothing to apply
            self._changed.notify_all()

    def _pass(
        self, link: Link, own: Snapshot | None, incoming: Tensor | None, step: int, whole: Callable[[], None]
    ) -> None:
        """See :func:`~lightning_gossip.exchange.spoken.pass_payloads`; what is sent counts."""
        pass_payloads(link, own, incoming, step, whole)
        if own is not None:
            with self._changed:
                self.counts.bytes_sent += own.payload.nbytes

    # -- who is asked -----------------------------------------------------------------------------------------------

    def _let_in(self, visitor: Process, link: Link) -> None:
        self._know(visitor)
        self._run(link, visitor, partial(self._serve, visitor.rank, link))

    def _serve(self, visitor: int, link: Link) -> None:
        """Answer whatever ``visitor`` asks, until its link is closed."""
        while True:
            header = link.receive_header(_FOR_EVER)
            if header.kind == Word.HELLO:
                continue
            if header.kind != Word.ASK:
                raise LinkError(f"rank {visitor} sent a message of kind {header.kind} in the place of an ask")
            self._answer(visitor, link, header)

    @abstractmethod
    def _answer(self, visitor: int, link: Link, header: Header) -> None:
        """Answer an ask."""

    def _say(self, link: Link, word: Word, number: int = 0) -> None:
        link.send(Header(word, self._standing().step, 0, number=number))
        link.flush()

    def _copy(self, key: Hashable) -> Snapshot:
        """Take a snapshot, while the parameters stand still."""
        standing = self._standing()
        buffer = self._buffer(key, standing.layout)
        buffer.pack(standing.tensors)
        return Snapshot(standing, buffer)

    def _buffer(self, key: Hashable, layout: FlatLayout) -> FlatBuffer:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.layout.fingerprint != layout.fingerprint:
            buffer = self._buffers[key] = FlatBuffer.empty(layout, torch.device("cpu"))
        return buffer

    # -- links that fail --------------------------------------------------------------------------------------------

    def _run(self, link: Link, process: Process, job: Callable[[], Any]) -> None:
        def ended(future: Any) -> None:
            if (error := future.exception()) is not None:
                self._fail(link, process, error)

        link.submit(job).add_done_callback(ended)

    def _fail(self, link: Link, process: Process, error: BaseException) -> None:
        """Go on without a partner whose link broke, or let the training thread raise why; in the link's thread."""
        self._doors.forget(process, link)
        self._doors.part(process)
        partner = process.rank
        with self._changed:
            self._silent.discard(partner)
            if self._known[partner] != process:
                return  # another has come to its rank
            if self._closing or (self._side.partner != partner and partner not in self._side.waiting):
                return  # nothing was under way: who wants something of it will see
        try:
            goes_on = self._control.goes_on_without(partner, reason_of(error), process.incarnation)
        except BaseException:  # noqa: BLE001 - the run has stopped: the training thread raises that
            return
        with self._changed:
            if self._known[partner] != process:
                return
            asked = self._side.phase is Phase.ASKING and self._side.partner == partner
            if not goes_on:
                self._failure = (partner, error)
            elif self._control.is_lost(*process):
                self._side = self._side.lose(partner).side
            else:
                self._side = self._side.part(partner).side
            if goes_on and asked:
                self._go_on()
            self._changed.notify_all()

    def _lost(self, partner: int, why: str) -> PartnerLost:
        step = self._standing().step
        return PartnerLost(f"rank {self._rank} lost its partner rank {partner} at step {step}: {why}", partner)
