"""All-reduce in two halves, beside training: each rank combines the part that it owns, then all gather (design §12).

All ranks hold the same bits afterwards, for each part was computed once. What is summed, in which order and how wide,
is the caller's: a transport moves bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from typing import NoReturn

from torch import Tensor

from lightning_gossip.control.run import LOOK, Control
from lightning_gossip.control.stop import RunStopped
from lightning_gossip.transport.interface import PartnerLost, Staged
from lightning_gossip.transport.lanes import check_header
from lightning_gossip.transport.link import Header, Link, LinkError, Links, reason_of
from lightning_gossip.transport.link_transport import end_of_rank

ALIGNMENT = 64  # bytes; parts begin at multiples of it, so that none cuts an element of a flat buffer

Combine = Callable[[Sequence[Tensor], int, Tensor], None]
"""Combines what all ranks sent of a part, in ascending rank, into the part of the result; begin: of it, in bytes."""


def part_bytes(nbytes: int, world_size: int) -> int:
    """Return the bytes of every part but the last ones, which may be shorter or empty."""
    return -(-nbytes // (world_size * ALIGNMENT)) * ALIGNMENT


def part_of(nbytes: int, world_size: int, rank: int) -> slice:
    """Return the bytes that ``rank`` owns."""
    size = part_bytes(nbytes, world_size)
    return slice(min(rank * size, nbytes), min((rank + 1) * size, nbytes))


def bytes_sent(nbytes: int, world_size: int, rank: int) -> int:
    """Return what a rank sends in both halves: about 2 N (n − 1) / n."""
    own = part_of(nbytes, world_size, rank)
    size = own.stop - own.start
    return nbytes - size + (world_size - 1) * size


class Reduction(ABC):
    """An all-reduce under way."""

    @abstractmethod
    def wait(self) -> Tensor | None:
        """Wait until the result is there.

        Returns:
            It (1-D, uint8, ``header.nbytes``), on the device where it was staged; None where it was dropped, on all
            ranks alike, because one waits elsewhere and never began this step.

        Raises:
            PartnerLost: if a rank died or stayed silent past the timeout.
            RunStopped: if some rank stopped.
        """


class AllReduce(ABC):
    """All-reduces of all ranks, each begun by all in one order; several may be under way."""

    from_host: bool
    """Whether what is sent and received lies in host memory."""

    @abstractmethod
    def post(
        self, header: Header, sent: Tensor, room: Tensor, combine: Combine, staged: Staged | None = None
    ) -> Reduction:
        """Begin one.

        Args:
            header: what all must agree on: kind, step, size and layout.
            sent: this rank's payload (1-D, uint8, ``header.nbytes``); not to be changed until the end.
            room: for the result (1-D, uint8, as many parts as ranks, each of :func:`part_bytes`), whose first
                ``header.nbytes`` it is in the end.
            combine: see :data:`Combine`; called in another thread.
            staged: where both are on the host and the replica on a device: the copies between the two.
        """

    @abstractmethod
    def rewind(self) -> None:
        """The exchange clock was set, perhaps back; called on all ranks alike, with nothing under way."""

    @abstractmethod
    def reset(self, generation: int) -> None:
        """Begin anew with everybody, after some were dropped; called on all ranks, with nothing to be waited for."""

    @abstractmethod
    def close(self) -> None:
        """Give up whatever is under way and release connections."""


class LinkAllReduce(AllReduce):
    """Over :mod:`~lightning_gossip.transport.link`, one to every other rank, by a helper thread.

    Args:
        links: of this process; closed with this object.
        control: of the run.
    """

    from_host = True

    def __init__(self, links: Links, control: Control) -> None:
        self._links = links
        self._control = control
        self._rewound = 0
        self._spell = _Spell()
        self._queue: queue.SimpleQueue[_OnLinks | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"all-reduce-{control.rank}", daemon=True)
        self._thread.start()

    def post(
        self, header: Header, sent: Tensor, room: Tensor, combine: Combine, staged: Staged | None = None
    ) -> Reduction:
        """See :meth:`AllReduce.post`."""
        header = Header(header.kind, header.step, header.nbytes, header.layout, header.number, self._rewound)
        if self._spell.left:
            return _Dropped()
        others = [rank for rank in range(self._control.world_size) if rank != self._control.rank]
        links = {rank: self._links.to(end_of_rank(rank)) for rank in others}
        reduction = _OnLinks(header, sent, room, combine, staged, links, self._spell, self._control, self._leave)
        self._queue.put(reduction)
        return reduction

    def _leave(self, rank: int) -> None:
        """Drop what is under way: ``rank`` takes no part until all have met."""
        self._spell.left = True
        self._spell.give_up()
        self._control.note_skip()
        self._links.part(end_of_rank(rank))

    def rewind(self) -> None:
        """See :meth:`AllReduce.rewind`."""
        self._rewound += 1

    def reset(self, generation: int) -> None:
        """See :meth:`AllReduce.reset`."""
        self._spell.give_up()
        self._spell = _Spell()
        self._links.reset(generation)

    def close(self) -> None:
        """See :meth:`AllReduce.close`."""
        self._spell.give_up()
        self._queue.put(None)
        self._links.close()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while (reduction := self._queue.get()) is not None:
            reduction.run()
            del reduction  # it holds the buffers


class _Spell:
    """From one meeting with a reset to the next: what fails in it leaves the links out of step for all that follows."""

    def __init__(self) -> None:
        self.failure: tuple[int, BaseException] | None = None  # with which rank, and why
        self.left = False  # some rank waits elsewhere

    def give_up(self) -> None:
        """Let what is under way fail."""
        self.failure = self.failure or (-1, LinkError("it was given up"))


class _Dropped(Reduction):
    def wait(self) -> Tensor | None:
        return None


class _OnLinks(Reduction):
    def __init__(
        self,
        header: Header,
        sent: Tensor,
        room: Tensor,
        combine: Combine,
        staged: Staged | None,
        links: Mapping[int, Link],
        spell: _Spell,
        control: Control,
        leave: Callable[[int], None],
    ) -> None:
        self._header, self._sent, self._room, self._combine, self._staged = header, sent, room, combine, staged
        self._links, self._spell, self._control, self._leave = links, spell, control, leave
        self._jobs: dict[int, Future[None]] = {}  # of the present half
        self._result: Tensor | None = None
        self._done = threading.Event()  # or failed

    # -- in the helper thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Do both halves, unless one before it failed."""
        try:
            if self._spell.failure is None and self._scatter_and_gather():
                result = self._room[: self._header.nbytes]
                self._result = result if self._staged is None else self._staged.land(1, result)
        except Exception as error:  # noqa: BLE001 - a caller's `combine`: whoever waits is told
            self._spell.failure = (self._control.rank, error)
        finally:
            self._done.set()

    def _scatter_and_gather(self) -> bool:
        nbytes, ranks = self._header.nbytes, self._control.world_size
        size = part_bytes(nbytes, ranks)
        parts = [part_of(nbytes, ranks, rank) for rank in range(ranks)]
        own = parts[self._control.rank]
        if self._staged is not None:
            self._staged.ready()
        # what others send of this rank's part lies where their parts of the result will
        slots = [self._room[rank * size : rank * size + own.stop - own.start] for rank in range(ranks)]
        if not self._with_all(lambda rank: partial(self._swap, rank, self._sent[parts[rank]], slots[rank], True)):
            return False
        pieces = [self._sent[own] if rank == self._control.rank else slots[rank] for rank in range(ranks)]
        self._combine(pieces, own.start, self._room[own])
        return self._with_all(lambda rank: partial(self._swap, rank, self._room[own], self._room[parts[rank]], False))

    def _with_all(self, job: Callable[[int], Callable[[], None]]) -> bool:
        """Run a job on every link; return whether all succeeded."""
        self._jobs = {rank: link.submit(job(rank)) for rank, link in self._links.items()}
        while futures.wait(self._jobs.values(), LOOK, futures.FIRST_EXCEPTION).not_done:
            # a job that came to a link after it was closed is never begun
            if self._spell.failure is not None:
                return False
            if any(future.done() and future.exception() for future in self._jobs.values()):
                break
        for rank, future in self._jobs.items():
            if future.done() and (error := future.exception()) is not None:
                self._spell.failure = (rank, error)
                return False
        return True

    # -- in a link's thread -------------------------------------------------------------------------------------

    def _swap(self, rank: int, outgoing: Tensor, incoming: Tensor, with_header: bool) -> None:
        link = self._links[rank]
        if with_header:
            link.send(self._header)
            check_header(link.receive_header(), self._header, link.peer)
        link.swap(outgoing if outgoing.numel() else None, incoming if incoming.numel() else None)

    # -- in the training thread ---------------------------------------------------------------------------------

    def wait(self) -> Tensor | None:
        deadline = time.monotonic() + self._control.timeout.total_seconds()
        try:
            while not self._control.wait(self._done, min(deadline, time.monotonic() + LOOK)):
                if self._is_left():
                    return None
                if time.monotonic() >= deadline:
                    limit = self._control.timeout.total_seconds()
                    self._explain(self._latest(), TimeoutError(f"it stayed silent for {limit:g} s"))
            if self._result is not None:
                return self._result
            if self._is_left():
                return None
            self._explain(*(self._spell.failure or (self._control.rank, RuntimeError("it failed"))))
        except RunStopped as stopped:
            if (lost := stopped.stop.lost) in self._links:
                raise self._lost(lost, stopped.stop.cause) from stopped
            raise

    def _is_left(self) -> bool:
        """Whether some rank waits elsewhere and never began this step: then nobody can complete it."""
        if not self._spell.left:
            for rank in self._links:
                if self._control.has_left(rank, self._header.step):
                    self._leave(rank)
                    break
        return self._spell.left

    def _latest(self) -> int:
        return next((rank for rank, job in self._jobs.items() if not job.done()), min(self._links))

    def _explain(self, rank: int, error: BaseException) -> NoReturn:
        """Raise why ``rank`` is not there: the reason that a rank gave when it stopped, or else its loss."""
        self._control.check_cause(rank)
        if rank not in self._links:
            raise error
        raise self._lost(rank, reason_of(error)) from error

    def _lost(self, rank: int, why: str) -> PartnerLost:
        me, step = self._control.rank, self._header.step
        return PartnerLost(f"rank {me} lost rank {rank} in the all-reduce of step {step}: {why}", rank)
