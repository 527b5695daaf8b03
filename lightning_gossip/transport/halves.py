"""The two halves of an all-reduce among some ranks, over links: each combines the part that it owns, then all gather.

All hold the same bits afterwards, for each part was computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from itertools import chain

from torch import Tensor

from lightning_gossip.control.run import LOOK
from lightning_gossip.transport.header import Header, SendFailed
from lightning_gossip.transport.lanes import check_header
from lightning_gossip.transport.link import Link

ALIGNMENT = 64  # bytes; parts begin at multiples of it, so that none cuts an element of a flat buffer

Combine = Callable[[Sequence[Tensor], int, Tensor], None]
"""Combines what all ranks sent of a part, in ascending rank, into the part of the result; begin: of it, in bytes."""

Failure = tuple[int, BaseException]
"""With which rank, and why."""


def part_bytes(nbytes: int, ranks: int) -> int:
    """Return the bytes of every part but the last ones, which may be shorter or empty."""
    return -(-nbytes // (ranks * ALIGNMENT)) * ALIGNMENT


def part_of(nbytes: int, ranks: int, index: int) -> slice:
    """Return the bytes that the ``index``-th of some ranks owns."""
    size = part_bytes(nbytes, ranks)
    return slice(min(index * size, nbytes), min((index + 1) * size, nbytes))


def room_bytes(nbytes: int, world_size: int) -> int:
    """Return the bytes of a room in which a result fits, among however many ranks."""
    return max(ranks * part_bytes(nbytes, ranks) for ranks in range(1, world_size + 1))


def bytes_sent(nbytes: int, ranks: int, index: int) -> int:
    """Return what the ``index``-th of some ranks sends in both halves: about 2 N (n − 1) / n."""
    own = part_of(nbytes, ranks, index)
    size = own.stop - own.start
    return nbytes - size + (ranks - 1) * size


class Halves:
    """Both halves of one all-reduce.

    Args:
        header: what all must agree on.
        sent: this rank's payload (1-D, uint8, ``header.nbytes``).
        room: for the result, see :func:`room_bytes`; it is the first ``header.nbytes`` in the end.
        combine: see :data:`Combine`.
        rank: of this process.
        members: the ranks among which it is, this one too, ascending.
        spares: whether who is gone once this rank has all that it needs does not matter.
    """

    def __init__(
        self,
        header: Header,
        sent: Tensor,
        room: Tensor,
        combine: Combine,
        rank: int,
        members: tuple[int, ...],
        spares: bool = False,
    ) -> None:
        self._header, self._sent, self._room, self._combine = header, sent, room, combine
        self._members, self._spares = members, spares
        self._index = members.index(rank)
        self.others = tuple(other for other in members if other != rank)
        self._jobs: dict[int, Future[None]] = {}  # of the present half

    @property
    def waits_for(self) -> int:
        """A rank with which the present half has failed, or is not done; the first, where all are through."""
        jobs = self._jobs.items()
        failed = (rank for rank, job in jobs if job.done() and job.exception() is not None)
        waiting = (rank for rank, job in jobs if not job.done())
        return next(chain(failed, waiting), min(self.others))

    def run(self, links: Mapping[int, Link], given_up: Callable[[Collection[int]], Failure | None]) -> Failure | None:
        """Do both halves, in a thread that may wait.

        Args:
            links: to the others.
            given_up: called several times a second with the ranks that are not through; says whether to wait no more.

        Returns:
            Why the result is not there; None where it is.
        """
        nbytes, ranks = self._header.nbytes, len(self._members)
        size = part_bytes(nbytes, ranks)
        parts = {rank: part_of(nbytes, ranks, index) for index, rank in enumerate(self._members)}
        own = parts[self._members[self._index]]
        # what others send of this rank's part lies where their parts of the result will
        slots = {
            rank: self._room[index * size : index * size + own.stop - own.start]
            for index, rank in enumerate(self._members)
        }

        def scatter(rank: int) -> None:
            links[rank].send(self._header)
            check_header(links[rank].receive_header(), self._header, links[rank].peer)
            _swap(links[rank], self._sent[parts[rank]], slots[rank])

        def gather(rank: int) -> None:
            incoming = self._room[parts[rank]]
            try:
                _swap(links[rank], self._room[own], incoming)
            except SendFailed as error:
                if not self._spares or (incoming.numel() and error.received is None):
                    raise

        if (failure := self._with_all(links, scatter, given_up)) is not None:
            return failure
        pieces = [self._sent[own] if index == self._index else slots[rank] for index, rank in enumerate(self._members)]
        self._combine(pieces, own.start, self._room[own])
        return self._with_all(links, gather, given_up)

    def _with_all(
        self,
        links: Mapping[int, Link],
        job: Callable[[int], None],
        given_up: Callable[[Collection[int]], Failure | None],
    ) -> Failure | None:
        """Run a job on every link; return the first failure."""
        self._jobs = {rank: links[rank].submit(partial(job, rank)) for rank in self.others}
        while futures.wait(self._jobs.values(), LOOK, futures.FIRST_EXCEPTION).not_done:
            if any(future.done() and future.exception() for future in self._jobs.values()):
                break
            # a job that came to a link after it was closed is never begun
            if failure := given_up([rank for rank, future in self._jobs.items() if not future.done()]):
                return failure
        for rank, future in self._jobs.items():
            if future.done() and (error := future.exception()) is not None:
                return rank, error
        return None


def _swap(link: Link, outgoing: Tensor, incoming: Tensor) -> None:
    link.swap(outgoing if outgoing.numel() else None, incoming if incoming.numel() else None)
