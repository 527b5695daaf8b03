"""Exchanges over links (gloo) and, between ranks that see the same memory, where snapshots are written.

When two ranks exchange for the first time, each tells the other on their link where its outbox is
(:mod:`~lightning_gossip.transport.shared_memory`). Where both can read the other's they are near, and give the link up.
Between others every payload travels on it, behind a header.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from lightning_gossip.control.run import LOOK, Control, RunStopped
from lightning_gossip.transport.interface import PartnerLost, Posted, Rooms, Transferred, Transport
from lightning_gossip.transport.link import Header, Kind, LayoutMismatch, Link, LinkError, Links, reason_of
from lightning_gossip.transport.shared_memory import ADDRESS_BYTES, AVAILABLE, Address, Inbox, Outbox, moment, step_of

_GLANCE = 0.001
"""Longest pause in seconds between looks at a near partner's outbox."""


def end_of_rank(rank: int) -> str:
    """Return the name of a rank's end of its links."""
    return f"rank{rank}"


class LinkTransport(Transport):
    """Over :mod:`~lightning_gossip.transport.link`, a two-member gloo group a partner, or through shared memory.

    Args:
        links: of this process; closed with this object.
        control: of the run.
        shared_memory: whether partners on this host read snapshots where they were written.
        pin_memory: whether payloads are copied from and to a GPU; such payloads travel on the links.
    """

    from_host = True

    def __init__(self, links: Links, control: Control, shared_memory: bool = True, pin_memory: bool = False) -> None:
        self._links = links
        self._control = control
        self._shares = shared_memory and AVAILABLE and control.world_size > 1 and not pin_memory
        self._outbox: Outbox | None = None
        self._slot = -1  # of the outbox, where the next payload lies; -1 for none
        self._rooms = Rooms(torch.device("cpu"), pin_memory)  # 0: what is sent from no outbox; then what arrives
        self._lanes: dict[int, _Lane] = {}
        self._rewound = 0  # how often the clock was set back
        self._left: set[int] = set()  # skipped since the last meeting; their links are closed

    def room(self, nbytes: int, at_most: int) -> Tensor:
        """See :meth:`Transport.room`."""
        self._rooms.resize(nbytes)
        if self._shares and self._outbox is None:
            self._outbox = Outbox(at_most, self._control.world_size)
        if self._outbox is None or nbytes > self._outbox.address.slot_bytes:
            self._slot = -1
            return self._rooms[0]
        self._slot = self._await_slot(self._outbox)
        return self._outbox.slots[self._slot][:nbytes]

    def _await_slot(self, outbox: Outbox) -> int:
        limit = self._control.timeout.total_seconds()
        slot = self._control.poll(outbox.free_slot, time.monotonic() + limit, _GLANCE)
        if slot is None:
            if not (readers := outbox.readers(0)):
                return 0  # they have finished just now
            reader, when = next(iter(readers.items()))
            why = f"it did not read this rank's snapshot of that step for {limit:g} s"
            raise _lost(self._control.rank, reader, step_of(when), why)
        return slot

    def post(self, header: Header, send_to: Collection[int], receive_from: Collection[int]) -> Posted:
        """See :meth:`Transport.post`."""
        header = replace(header, extra=self._rewound)
        if self._outbox is not None and self._slot >= 0:
            self._outbox.announce(self._slot, header)
            payload = self._outbox.slots[self._slot][: header.nbytes]
        else:
            payload = self._rooms[0]
        transfers = {}
        for number, partner in enumerate(sorted({*send_to, *receive_from} - self._left), start=1):
            lane = self._lane(partner)
            transfer = _Transfer(lane, sends=partner in send_to, receives=partner in receive_from)
            if not lane.is_near(header.nbytes):
                outgoing = payload if transfer.sends else None
                room = partial(self._rooms.__getitem__, number) if transfer.receives else None
                link = self._links.to(end_of_rank(partner))
                transfer.job = link.submit(partial(lane.trade, link, header, outgoing, room))
            transfers[partner] = transfer
        lend = partial(self._outbox.lend, self._slot) if self._outbox is not None else None
        return _PostedOnLinks(transfers, header, lend, self._control, self._part, self._skip)

    def _lane(self, partner: int) -> _Lane:
        if partner not in self._lanes:
            self._lanes[partner] = _Lane(self._outbox, self._control.world_size)
        return self._lanes[partner]

    def _part(self, partner: int) -> None:
        self._links.part(end_of_rank(partner))

    def _skip(self, partner: int) -> None:
        self._left.add(partner)
        self._control.note_skip()
        self._part(partner)

    def rewind(self) -> None:
        """See :meth:`Transport.rewind`."""
        self._rewound += 1

    def reset(self, generation: int) -> None:
        """See :meth:`Transport.reset`."""
        self._left.clear()
        self._lanes.clear()
        self._links.reset(generation)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._links.close()
        self._lanes.clear()
        if self._outbox is not None:
            self._outbox.close()


class _Lane:
    """What lies between this rank and a partner.

    Args:
        outbox: of this rank; None where it shares no memory.
        readers: number of ranks.
    """

    def __init__(self, outbox: Outbox | None, readers: int) -> None:
        self.inbox: Inbox | None = None
        """The partner's outbox, where the two are near; known once a first :meth:`trade` is done."""
        self._outbox = outbox
        self._readers = readers
        self._has_met = False

    def is_near(self, nbytes: int) -> bool:
        """Whether a payload of ``nbytes`` is read where it was written; both ends give the same answer."""
        if self.inbox is None or self._outbox is None:
            return False
        return nbytes <= min(self.inbox.address.slot_bytes, self._outbox.address.slot_bytes)

    def trade(
        self, link: Link, header: Header, outgoing: Tensor | None, room: Callable[[], Tensor] | None
    ) -> Tensor | None:
        """Send and receive on ``link``, unless it turns out that the partner is near; runs in the link's thread.

        Args:
            link: to the partner.
            header: of both payloads.
            outgoing: what to send, if anything.
            room: returns where to put what arrives; None where nothing is to be received.

        Returns:
            What arrived on the link.

        Raises:
            LinkError: if the partner sends something else.
            RuntimeError: if it is gone, or silent past the timeout.
        """
        if not self._has_met:
            self._meet(link, header.step)
        if self.is_near(header.nbytes):
            return None
        if outgoing is not None:
            link.send(header)
        incoming = None
        if room is not None:
            check_header(link.receive_header(), header, link.peer)
            incoming = room()
        link.swap(outgoing, incoming)
        return incoming

    def _meet(self, link: Link, step: int) -> None:
        """Tell the partner where the outbox is, and hear where its is; near is who reads and is read."""
        address = Address() if self._outbox is None else self._outbox.address
        link.send(Header(Kind.OUTBOX, step, ADDRESS_BYTES), address.to_tensor())
        check_header(link.receive_header(), Header(Kind.OUTBOX, step, ADDRESS_BYTES), link.peer)
        offered = torch.empty(ADDRESS_BYTES, dtype=torch.uint8)
        link.receive(offered)
        inbox = Inbox.open(Address.from_tensor(offered), self._readers) if self._outbox is not None else None
        link.send(Header(Kind.NEAR, step, 0, number=int(inbox is not None)))
        answer = link.receive_header()
        check_header(answer, Header(Kind.NEAR, step, 0, number=answer.number), link.peer)
        link.flush()
        self.inbox = inbox if answer.number == 1 else None
        self._has_met = True


@dataclass
class _Transfer:
    """With one partner; ``job`` runs on a link, where the partner is not known to be near."""

    lane: _Lane
    sends: bool
    receives: bool
    job: Future[Tensor | None] | None = None


class _PostedOnLinks(Posted):
    def __init__(
        self,
        transfers: Mapping[int, _Transfer],
        header: Header,
        lend: Callable[[int, int], None] | None,
        control: Control,
        part: Callable[[int], None],
        skip: Callable[[int], None],
    ) -> None:
        self._transfers = dict(transfers)
        self._header = header
        self._lend = lend
        self._control = control
        self._part = part
        self._skip = skip
        self._inboxes: list[Inbox] = []
        self._changed = threading.Event()  # a job is done, or failed
        for transfer in transfers.values():
            if transfer.job is not None:
                transfer.job.add_done_callback(lambda _: self._changed.set())

    def wait(self) -> Transferred:
        received: dict[int, Tensor] = {}
        deadline = time.monotonic() + self._control.timeout.total_seconds()
        try:
            self._await_jobs(deadline)
            for partner, transfer in list(self._transfers.items()):
                payload = transfer.job.result() if transfer.job is not None else None
                if transfer.lane.is_near(self._header.nbytes) and transfer.lane.inbox is not None:
                    payload = self._look(partner, transfer, transfer.lane.inbox, deadline)
                if payload is not None:
                    received[partner] = payload
        except RunStopped as stopped:
            if (lost := stopped.stop.lost) in self._transfers:
                raise self._lost(lost, stopped.stop.cause) from stopped
            raise
        return Transferred(received, [partner for partner, transfer in self._transfers.items() if transfer.sends])

    def release(self) -> None:
        for inbox in self._inboxes:
            inbox.finish(self._control.rank, moment(self._header))
        self._inboxes.clear()

    def _look(self, partner: int, transfer: _Transfer, inbox: Inbox, deadline: float) -> Tensor | None:
        """Wait until a near partner has begun the step; return its snapshot, if this rank mixes it."""
        now = moment(self._header)
        while not self._control.poll(lambda: inbox.has_begun(now) or None, time.monotonic() + LOOK, _GLANCE):
            if self._skip_if_left(partner):
                return None
            if not inbox.owner_lives:
                self._explain(partner, ConnectionError("its process is gone"))
            if time.monotonic() >= deadline:
                self._explain(partner, self._silence())
        if transfer.job is None:
            self._part(partner)  # it came to know this rank in a step before, and has read what was sent then
        if transfer.sends and self._lend is not None:
            self._lend(partner, now)
        if not transfer.receives:
            return None
        header, memory = inbox.find(now) or (None, torch.empty(0))
        try:
            check_header(header, self._header, end_of_rank(partner))
        except LinkError as error:
            self._explain(partner, error)
        self._inboxes.append(inbox)
        return memory[: self._header.nbytes]

    def _await_jobs(self, deadline: float) -> None:
        while waiting := self._waiting():
            changed = self._control.wait(self._changed, min(deadline, time.monotonic() + LOOK))
            self._changed.clear()
            for partner, job in waiting.items():
                failure = job.exception() if job.done() else None
                overdue = not changed and failure is None
                if (overdue or failure is not None) and self._skip_if_left(partner):
                    continue
                if failure is not None:
                    self._explain(partner, failure)
            if time.monotonic() >= deadline and (late := self._waiting()):
                self._explain(next(iter(late)), self._silence())

    def _waiting(self) -> dict[int, Future[Tensor | None]]:
        """Return the jobs by partner that are not done, failed ones among them."""
        jobs = {partner: transfer.job for partner, transfer in self._transfers.items()}
        return {
            partner: job
            for partner, job in jobs.items()
            if job is not None and (not job.done() or job.exception() is not None)
        }

    def _skip_if_left(self, partner: int) -> bool:
        """Skip a partner that waits elsewhere and never began this step."""
        if not self._control.has_left(partner, self._header.step):
            return False
        del self._transfers[partner]
        self._skip(partner)
        return True

    def _explain(self, partner: int, error: BaseException) -> NoReturn:
        """Raise why ``partner`` is not there: the reason that a rank gave when it stopped, or else its loss."""
        stop = self._control.await_stop(1.0)
        if stop is not None and stop.lost != partner:
            self._control.check()
        raise self._lost(partner, reason_of(error)) from error

    def _silence(self) -> TimeoutError:
        return TimeoutError(f"it stayed silent for {self._control.timeout.total_seconds():g} s")

    def _lost(self, partner: int, why: str) -> PartnerLost:
        return _lost(self._control.rank, partner, self._header.step, why)


def check_header(arrived: Header | None, expected: Header, peer: str) -> None:
    """Raise :class:`LinkError` where what ``peer`` sent is not what was expected."""
    if arrived is not None and replace(arrived, layout=expected.layout, nbytes=expected.nbytes) == expected != arrived:
        raise LayoutMismatch(f"{peer} sent a snapshot of other tensors")
    if arrived != expected:
        raise LinkError(f"expected {expected}, but {peer} sent {arrived}")


def _lost(rank: int, partner: int, step: int, why: str) -> PartnerLost:
    return PartnerLost(f"rank {rank} lost its partner rank {partner} at step {step}: {why}", partner)
