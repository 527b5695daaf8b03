"""Exchanges over links (gloo): payloads travel on the link, or lie in memory that both ends share.

Where two ranks see the same memory (:mod:`~lightning_gossip.shared_memory`), the link carries only the header: it says
in which slot of the sender's outbox the snapshot lies. Each sender offers its outbox to a partner once; the partner's
answer decides the road from then on.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_gossip.control import LOOK, Control, RunStopped
from lightning_gossip.link import Header, Kind, Link, LinkError, Links
from lightning_gossip.shared_memory import ADDRESS_BYTES, AVAILABLE, Address, Inbox, Outbox
from lightning_gossip.transport import PartnerLost, Posted, Rooms, Transport

_GLOO_DECORATION = re.compile(r"^\[\S+\.cc:\d+\] |This is typically caused by.*$")  # leaves what happened, and where
_HOST = torch.device("cpu")


def end_of_rank(rank: int) -> str:
    """Return the name of a rank's end of its links."""
    return f"rank{rank}"


class LinkTransport(Transport):
    """Over :mod:`~lightning_gossip.link`, a two-member gloo group a partner.

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
        self._slot = 0  # of the outbox: where the next payload lies
        self._rooms = Rooms(torch.device("cpu"), pin_memory)  # 0: what is sent without an outbox; then what arrives
        self._lanes: dict[int, _Lane] = {}
        self._left: set[int] = set()  # skipped since the last meeting; their links are closed

    def room(self, nbytes: int) -> Tensor:
        """See :meth:`Transport.room`."""
        self._rooms.resize(nbytes)
        if not self._shares:
            return self._rooms[0]
        if self._outbox is None or self._outbox.address.slot_bytes < nbytes:
            # whoever reads the one before keeps it alive
            self._outbox = Outbox(nbytes, self._control.world_size)
        self._slot = self._await_slot(self._outbox)
        return self._outbox.slots[self._slot][:nbytes]

    def _await_slot(self, outbox: Outbox) -> int:
        limit = self._control.timeout.total_seconds()
        deadline = time.monotonic() + limit
        while (slot := self._control.poll(outbox.free_slot, deadline)) is None:
            reader, step = next(iter(outbox.readers(0).items()), (-1, 0))
            if reader >= 0:
                raise _lost(
                    self._control.rank,
                    reader,
                    step,
                    f"it did not read this rank's snapshot of that step for {limit:g} s",
                )
        return slot

    def post(self, header: Header, send_to: Collection[int], receive_from: Collection[int]) -> Posted:
        """See :meth:`Transport.post`."""
        outgoing = _Outgoing(self._rooms[0], None, 0)
        if self._outbox is not None:
            outgoing = _Outgoing(self._outbox.slots[self._slot][: header.nbytes], self._outbox, self._slot)
        numbers = {partner: number for number, partner in enumerate(receive_from, start=1)}
        jobs: dict[int, Future[_Traded]] = {}
        for partner in sorted({*send_to, *receive_from} - self._left):
            lane = self._lane(partner)
            room = partial(self._rooms.__getitem__, numbers[partner]) if partner in numbers else None
            job = partial(lane.trade, header, outgoing if partner in send_to else None, room)
            jobs[partner] = lane.link.submit(job)
        return _PostedOnLinks(jobs, header.step, outgoing, self._control, self._skip)

    def _lane(self, partner: int) -> _Lane:
        if partner not in self._lanes:
            link = self._links.to(end_of_rank(partner))
            self._lanes[partner] = _Lane(link, self._control.world_size)
        return self._lanes[partner]

    def _skip(self, partner: int) -> None:
        self._left.add(partner)
        self._control.note_skip()
        self._links.to(end_of_rank(partner)).close()

    def reset(self, generation: int) -> None:
        """See :meth:`Transport.reset`; who still reads a slot goes on reading."""
        self._left.clear()
        self._lanes.clear()
        self._links.reset(generation)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._links.close()
        self._lanes.clear()
        self._outbox = None


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A payload; where memory is shared, also the outbox and the slot in which it lies."""

    payload: Tensor
    outbox: Outbox | None
    slot: int


@dataclass(frozen=True, slots=True)
class _Traded:
    """What came of the transfers with one partner.

    Attributes:
        received: what it sent; None where it does not send.
        inbox: where ``received`` lies; None where it travelled on the link.
        lent: whether the partner reads this rank's payload in its outbox.
    """

    received: Tensor | None
    inbox: Inbox | None
    lent: bool


class _Lane:
    """The transfers with one partner; :meth:`trade` runs in the link's thread, which owns all state here.

    Args:
        link: to the partner.
        readers: number of ranks.
    """

    def __init__(self, link: Link, readers: int) -> None:
        self.link = link
        self._readers = readers
        self._offered: Outbox | None = None
        self._accepted = False
        self._inbox: Inbox | None = None

    def trade(self, header: Header, outgoing: _Outgoing | None, room: Callable[[], Tensor] | None) -> _Traded:
        """Send and receive.

        Args:
            header: of both payloads.
            outgoing: what to send, if anything.
            room: returns where to put what arrives on the link; None where nothing is to be received.

        Raises:
            LinkError: if the partner sends something else.
            RuntimeError: if it is gone, or silent past the timeout.
        """
        offering = outgoing is not None and self._offer(outgoing.outbox, header.step)
        if outgoing is not None and not offering:
            self._send(header, outgoing)
        received: Tensor | None = None
        inbox: Inbox | None = None
        while offering or (room is not None and received is None):
            arrived = self.link.receive_header()
            if arrived.kind == Kind.OFFER and arrived.nbytes == ADDRESS_BYTES:
                self._answer(arrived.step)
            elif arrived.kind == Kind.ANSWER and outgoing is not None and offering:
                offering = False
                self._offered, self._accepted = outgoing.outbox, arrived.number == 1
                self._send(header, outgoing)
            elif room is not None and received is None and replace(arrived, number=0) == header:
                received, inbox = self._receive(arrived, room)
            else:
                raise LinkError(f"expected {header}, but {self.link.peer} sent {arrived}")
        self.link.flush()
        return _Traded(received, inbox, lent=outgoing is not None and self._accepted)

    def _offer(self, outbox: Outbox | None, step: int) -> bool:
        """Tell the partner of an outbox that it does not know yet; whether there was one."""
        if outbox is None or outbox is self._offered:
            return False
        self.link.send(Header(Kind.OFFER, step, ADDRESS_BYTES), outbox.address.to_tensor())
        return True

    def _answer(self, step: int) -> None:
        address = torch.empty(ADDRESS_BYTES, dtype=torch.uint8)
        self.link.receive(address)
        self._inbox = Inbox.open(Address.from_tensor(address), self._readers)
        self.link.send(Header(Kind.ANSWER, step, 0, number=int(self._inbox is not None)))

    def _send(self, header: Header, outgoing: _Outgoing) -> None:
        if self._accepted:
            self.link.send(replace(header, number=1 + outgoing.slot))
        else:
            self.link.send(header, outgoing.payload)

    def _receive(self, arrived: Header, room: Callable[[], Tensor]) -> tuple[Tensor, Inbox | None]:
        if arrived.number == 0:
            payload = room()
            self.link.receive(payload)
            return payload, None
        slot = self._inbox.slot(arrived.number - 1, arrived.nbytes) if self._inbox is not None else None
        if slot is None:
            raise LinkError(f"{self.link.peer} sent {arrived}, and there is no such slot in its outbox")
        return slot, self._inbox


class _PostedOnLinks(Posted):
    def __init__(
        self,
        jobs: Mapping[int, Future[_Traded]],
        step: int,
        outgoing: _Outgoing,
        control: Control,
        skip: Callable[[int], None],
    ) -> None:
        self._jobs = jobs
        self._skipped: set[int] = set()
        self._step = step
        self._outgoing = outgoing
        self._control = control
        self._skip = skip
        self._inboxes: list[Inbox] = []
        self._changed = threading.Event()  # a transfer is done, or failed
        for future in jobs.values():
            future.add_done_callback(lambda _: self._changed.set())

    def wait(self) -> Mapping[int, Tensor]:
        self._await_jobs()
        received: dict[int, Tensor] = {}
        for partner, job in self._jobs.items():
            if partner in self._skipped:
                continue
            traded = job.result()
            if traded.received is not None:
                received[partner] = traded.received
            if traded.inbox is not None:
                self._inboxes.append(traded.inbox)
            if traded.lent and self._outgoing.outbox is not None:
                self._outgoing.outbox.lend(self._outgoing.slot, partner, self._step)
        return received

    def release(self) -> None:
        for inbox in self._inboxes:
            inbox.finish(self._control.rank, self._step)
        self._inboxes.clear()

    def _await_jobs(self) -> None:
        limit = self._control.timeout.total_seconds()
        deadline = time.monotonic() + limit
        try:
            while waiting := self._waiting():
                changed = self._control.wait(self._changed, min(deadline, time.monotonic() + LOOK))
                self._changed.clear()
                for partner in waiting:
                    failure = self._jobs[partner].exception() if self._jobs[partner].done() else None
                    overdue = not changed and failure is None
                    if (overdue or failure is not None) and self._skip_if_left(partner):
                        continue
                    if failure is not None:
                        self._explain(partner, failure)
                if time.monotonic() >= deadline and (late := self._waiting()):
                    self._explain(late[0], TimeoutError(f"it stayed silent for {limit:g} s"))
        except RunStopped as stopped:
            if stopped.stop.lost in self._waiting():
                raise self._lost(stopped.stop.lost, stopped.stop.cause) from stopped
            raise

    def _waiting(self) -> list[int]:
        """Return the partners whose transfers are not done, failed ones among them."""
        return [
            partner
            for partner, future in self._jobs.items()
            if partner not in self._skipped and (not future.done() or future.exception() is not None)
        ]

    def _skip_if_left(self, partner: int) -> bool:
        """Skip a partner that waits elsewhere and never began this step."""
        if not self._control.has_left(partner, self._step):
            return False
        self._skipped.add(partner)
        self._skip(partner)
        return True

    def _explain(self, partner: int, error: BaseException) -> None:
        """Raise why ``partner`` is not there: the reason that a rank gave when it stopped, or else its loss."""
        stop = self._control.await_stop(1.0)
        if stop is not None and stop.lost != partner:
            self._control.check()
        raise self._lost(partner, _GLOO_DECORATION.sub("", str(error)).strip()) from error

    def _lost(self, partner: int, why: str) -> PartnerLost:
        return _lost(self._control.rank, partner, self._step, why)


def _lost(rank: int, partner: int, step: int, why: str) -> PartnerLost:
    return PartnerLost(f"rank {rank} lost its partner rank {partner} at step {step}: {why}", partner)
