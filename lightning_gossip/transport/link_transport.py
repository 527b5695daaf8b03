"""Exchanges over links (gloo) and, between ranks that see the same memory, where snapshots are written.

When two ranks exchange for the first time, each tells the other on their link where its outbox is
(:mod:`~lightning_gossip.transport.shared_memory`). Where both can read the other's they are near, and give the link up.
Between others every payload travels on it, behind a header.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from lightning_gossip.control.run import LOOK, Control
from lightning_gossip.control.stop import RunStopped
from lightning_gossip.transport.header import Header, LayoutMismatch, LinkError, SendFailed
from lightning_gossip.transport.interface import PartnerLost, Posted, Rooms, Staged, Transferred, Transport
from lightning_gossip.transport.lanes import GLANCE, Lane, Transfer
from lightning_gossip.transport.link import Links, reason_of
from lightning_gossip.transport.shared_memory import (
    AVAILABLE,
    SLOTS,
    Inbox,
    Outbox,
    PinningError,
    moment,
    step_of,
)

log = logging.getLogger(__name__)


def end_of_rank(rank: int, incarnation: int = 0) -> str:
    """Return the name of a rank's end of its links; each process of a rank that was lost has its own."""
    return f"rank{rank}.{incarnation}" if incarnation else f"rank{rank}"


class LinkTransport(Transport):
    """Over :mod:`~lightning_gossip.transport.link`, a two-member gloo group a partner, or through shared memory.

    Args:
        links: of this process; closed with this object.
        control: of the run.
        shared_memory: whether partners on this host read snapshots where they were written.
        pin_memory: whether payloads are copied from and to a GPU: memory is page-locked, and threads of this object
            announce to near partners what is staged, and take theirs to the GPU.
    """

    def __init__(self, links: Links, control: Control, shared_memory: bool = True, pin_memory: bool = False) -> None:
        self._links = links
        self._control = control
        self._shares = shared_memory and AVAILABLE and control.world_size > 1
        self._pins = pin_memory
        self._helpers = ThreadPoolExecutor(thread_name_prefix="staging")  # its threads begin with its first job
        self._outbox: Outbox | None = None
        self._slot = -1  # of the outbox, where the next payload lies; -1 for none
        self._rooms = Rooms(torch.device("cpu"), pin_memory)  # 0: what is sent from no outbox; then what arrives
        self._lanes: dict[int, Lane] = {}
        self._processes: dict[int, int] = {}  # incarnation of every partner so far, as last exchanged with
        self._rewound = 0  # how often the clock was set back
        self._left: set[int] = set()  # skipped since the last meeting; their links are closed
        self._generation = 0  # the meeting from which on links are, see `reset`

    def room(self, nbytes: int, at_most: int) -> Tensor:
        """See :meth:`Transport.room`."""
        self._rooms.resize(nbytes)
        if self._shares and self._outbox is None:
            self._outbox = self._make_outbox(at_most)
        if self._outbox is None or nbytes > self._outbox.address.slot_bytes:
            self._slot = -1
            return self._rooms[0]
        self._slot = self._await_slot(self._outbox)
        return self._outbox.slots[self._slot][:nbytes]

    def _make_outbox(self, nbytes: int) -> Outbox | None:
        outbox = Outbox.where_possible(nbytes, self._control.world_size)
        if outbox is not None and self._pins:
            try:
                outbox.pin()
            except PinningError as error:
                log.warning("rank %d sends over links, not through shared memory: %s", self._control.rank, error)
                outbox = None
        self._shares = outbox is not None
        return outbox

    def _await_slot(self, outbox: Outbox) -> int:
        def free_slot() -> int | None:
            for reader in {reader for slot in range(SLOTS) for reader in outbox.readers(slot)}:
                if self._control.is_lost(reader, self._processes.get(reader, 0)):
                    outbox.forget(reader)
            return outbox.free_slot()

        slot = outbox.free_slot()
        if slot is None:
            slot = self._control.poll(free_slot, self._control.patience(), GLANCE)
        if slot is None:
            if not (readers := outbox.readers(0)):
                return 0  # they have finished just now
            reader, when = next(iter(readers.items()))
            limit = self._control.timeout.total_seconds()
            why = f"it did not read this rank's snapshot of that step for {limit:g} s"
            raise _lost(self._control.rank, reader, step_of(when), why)
        return slot

    def post(
        self,
        header: Header,
        send_to: Collection[int],
        receive_from: Collection[int],
        staged: Staged | None = None,
    ) -> Posted:
        """See :meth:`Transport.post`."""
        header = replace(header, extra=self._rewound)
        announced: Future[None] | None = None
        if self._outbox is not None and self._slot >= 0:
            announce = partial(self._outbox.announce, self._slot, header)
            if staged is None:
                announce()
            else:
                announced = self._helpers.submit(_announce_staged, staged, announce)
            payload = self._outbox.slots[self._slot][: header.nbytes]
        else:
            payload = self._rooms[0]
        transfers = {}
        everybody = {k: self._control.incarnation_at(header.step, k) for k in sorted({*send_to, *receive_from})}
        self._forget_those_before(everybody)
        lost = {k for k, incarnation in everybody.items() if self._control.is_lost(k, incarnation)}
        partners = [k for k in everybody if k not in self._left and k not in lost]
        for number, partner in enumerate(partners, start=1):
            lane = self._lane(partner, everybody[partner])
            transfer = Transfer(lane, sends=partner in send_to, receives=partner in receive_from)
            if staged is not None and transfer.receives:
                transfer.land = partial(staged.land, number)
            if not lane.is_near(header.nbytes):
                outgoing = payload if transfer.sends else None
                room = partial(self._rooms.__getitem__, number) if transfer.receives else None
                link = self._links.to(end_of_rank(partner, lane.incarnation))
                transfer.job = link.submit(partial(lane.trade, link, header, outgoing, room, staged, transfer.land))
            elif transfer.land is not None and lane.inbox is not None:
                transfer.landing = self._helpers.submit(transfer.land_when_announced, lane.inbox, header)
            transfers[partner] = transfer
        lend = partial(self._outbox.lend, self._slot) if self._outbox is not None else None
        return _PostedOnLinks(transfers, header, lend, self._control, self._part, self._skip, announced)

    def _lane(self, partner: int, incarnation: int) -> Lane:
        if partner not in self._lanes:
            self._lanes[partner] = Lane(self._outbox, self._control.world_size, self._pins, incarnation)
        return self._lanes[partner]

    def _forget_those_before(self, partners: Mapping[int, int]) -> None:
        """Give up what lies between this rank and processes of ``partners`` (by incarnation) that were lost."""
        for partner, incarnation in partners.items():
            if self._processes.setdefault(partner, incarnation) != incarnation:
                self._part(partner)
                self._lanes.pop(partner, None)
                self._left.discard(partner)
                if self._outbox is not None:
                    self._outbox.forget(partner)
                self._processes[partner] = incarnation

    def _part(self, partner: int) -> None:
        self._links.part(end_of_rank(partner, self._processes.get(partner, 0)))

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
        self._generation = generation

    def position(self) -> dict[str, int]:
        """See :meth:`Transport.position`."""
        return {"generation": self._generation, "rewound": self._rewound}

    def take_place(self, position: Mapping[str, int]) -> None:
        """See :meth:`Transport.take_place`."""
        if position["generation"]:
            self.reset(position["generation"])
        self._rewound = position["rewound"]

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._links.close()
        self._helpers.shutdown(wait=False, cancel_futures=True)
        self._lanes.clear()
        if self._outbox is not None:
            self._outbox.close()


class _PostedOnLinks(Posted):
    def __init__(
        self,
        transfers: Mapping[int, Transfer],
        header: Header,
        lend: Callable[[int, int], None] | None,
        control: Control,
        part: Callable[[int], None],
        skip: Callable[[int], None],
        announced: Future[None] | None,
    ) -> None:
        self._transfers = dict(transfers)
        self._header = header
        self._lend = lend
        self._control = control
        self._part = part
        self._skip = skip
        self._announced = announced
        self._inboxes: list[Inbox] = []
        self._left_whole: dict[int, Tensor] = {}  # what arrived whole from partners that were lost over the rest
        self._changed = threading.Event()  # a job is done, or failed
        for transfer in transfers.values():
            if transfer.job is not None:
                transfer.job.add_done_callback(lambda _: self._changed.set())

    def wait(self) -> Transferred:
        received: dict[int, Tensor] = {}
        deadline = self._control.patience()
        try:
            if self._announced is not None:
                self._announced.result()
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
        finally:
            for transfer in self._transfers.values():
                transfer.given_up = True
        sent_to = [partner for partner, transfer in self._transfers.items() if transfer.sends]
        return Transferred(received | self._left_whole, sent_to)

    def release(self) -> None:
        for inbox in self._inboxes:
            inbox.finish(self._control.rank, moment(self._header))
        self._inboxes.clear()

    def _look(self, partner: int, transfer: Transfer, inbox: Inbox, deadline: float) -> Tensor | None:
        """Wait until a near partner has begun the step; return its snapshot, if this rank mixes it."""
        now = moment(self._header)
        while not self._control.poll(lambda: inbox.has_begun(now) or None, time.monotonic() + LOOK, GLANCE):
            if self._skip_if_left(partner) or self._drop_if_lost(partner):
                return None
            if not inbox.owner_lives and not inbox.has_begun(now):
                self._go_on_without(partner, ConnectionError("its process is gone"))
                return None
            if time.monotonic() >= deadline:
                self._explain(partner, self._silence())
        if transfer.job is None and not self._is_lost(partner):
            self._part(partner)  # it came to know this rank in a step before, and has read what was sent then
        if transfer.sends and self._lend is not None:
            self._lend(partner, now)
        if not transfer.receives:
            return None
        try:
            landed = transfer.landing.result() if transfer.landing is not None else None
            payload = transfer.take(inbox, self._header) if landed is None else landed
        except LinkError as error:
            self._explain(partner, error)
        self._inboxes.append(inbox)
        return payload

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
                    self._go_on_without(partner, failure)
                elif overdue and not job.done():
                    self._drop_if_lost(partner)
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
        self._transfers.pop(partner).given_up = True
        self._skip(partner)
        return True

    def _is_lost(self, partner: int) -> bool:
        return self._control.is_lost(partner, self._transfers[partner].lane.incarnation)

    def _drop_if_lost(self, partner: int) -> bool:
        """Give up what is under way with a partner that is known to be lost."""
        if not self._is_lost(partner):
            return False
        self._transfers.pop(partner).given_up = True
        self._part(partner)
        return True

    def _go_on_without(self, partner: int, error: BaseException) -> None:
        """Leave out a partner whose link or memory is gone; raise why where the run does not go on without it.

        From one that is lost, what arrived whole is mixed; from one that lives, nothing: it has this rank's not whole.
        """
        incarnation = self._transfers[partner].lane.incarnation
        if isinstance(error, LayoutMismatch) or not self._control.goes_on_without(
            partner, reason_of(error), incarnation
        ):
            self._explain(partner, error)
        if not self._is_lost(partner):
            self._transfers.pop(partner).given_up = True
            self._skip(partner)
            return
        if isinstance(error, SendFailed) and error.received is not None:
            land = self._transfers[partner].land
            self._left_whole[partner] = error.received if land is None else land(error.received)
        self._drop_if_lost(partner)

    def _explain(self, partner: int, error: BaseException) -> NoReturn:
        """Raise why ``partner`` is not there: the reason that a rank gave when it stopped, or else its loss."""
        if not isinstance(error, LayoutMismatch):  # both ends are there, and will say more
            self._control.check_cause(partner)
        raise self._lost(partner, reason_of(error)) from error

    def _silence(self) -> TimeoutError:
        return TimeoutError(f"it stayed silent for {self._control.timeout.total_seconds():g} s")

    def _lost(self, partner: int, why: str) -> PartnerLost:
        return _lost(self._control.rank, partner, self._header.step, why)


def _announce_staged(staged: Staged, announce: Callable[[], None]) -> None:
    staged.ready()
    announce()


def _lost(rank: int, partner: int, step: int, why: str) -> PartnerLost:
    return PartnerLost(f"rank {rank} lost its partner rank {partner} at step {step}: {why}", partner)
