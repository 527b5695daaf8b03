"""How the payloads of one exchange reach the partners: over links (gloo), or as one batch (NCCL)."""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial

import torch.distributed as dist
from torch import Tensor

from lightning_gossip.control import Control, RunStopped
from lightning_gossip.link import Header, Link, LinkError, Links

_GLOO_DECORATION = re.compile(r"^\[\S+\.cc:\d+\] |This is typically caused by.*$")  # leaves what happened, and where


class PartnerLost(RuntimeError):
    """A partner died or stayed silent past the timeout; :attr:`partner` is its rank."""

    def __init__(self, message: str, partner: int) -> None:
        super().__init__(message)
        self.partner = partner


class Posted(ABC):
    """Transfers under way."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until everything arrived and left.

        Raises:
            PartnerLost: if a partner died or stayed silent past the timeout.
            RunStopped: if some rank stopped.
        """


class Transport(ABC):
    """Moves payloads between ranks, and knows no algorithm."""

    from_host: bool
    """Whether payloads have to lie in host memory."""

    @abstractmethod
    def post(self, header: Header, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Posted:
        """Begin the transfers of one step.

        Args:
            header: what both sides must agree on: kind, step, size and layout.
            outgoing: payload for each partner that gets one (1-D, uint8); must not change before
                :meth:`Posted.wait` returned.
            incoming: where to put what each partner sends (1-D, uint8).
        """

    @abstractmethod
    def close(self) -> None:
        """Give up whatever is under way and release connections."""


class LinkTransport(Transport):
    """Over :mod:`~lightning_gossip.link`, a two-member gloo group a partner.

    Args:
        links: of this process; closed with this object.
        control: of the run.
    """

    from_host = True

    def __init__(self, links: Links, control: Control) -> None:
        self._links = links
        self._control = control

    def post(self, header: Header, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Posted:
        """See :meth:`Transport.post`."""
        jobs: dict[int, Future[None]] = {}
        for partner in sorted({*outgoing, *incoming}):
            link = self._links.to(end_of_rank(partner))
            job = partial(_trade, link, header, outgoing.get(partner), incoming.get(partner))
            jobs[partner] = link.submit(job)
        return _PostedOnLinks(jobs, header.step, self._control)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._links.close()


def end_of_rank(rank: int) -> str:
    """Return the name of a rank's end of its links."""
    return f"rank{rank}"


def _trade(link: Link, header: Header, outgoing: Tensor | None, incoming: Tensor | None) -> None:
    """Send and receive with one partner; runs in the link's thread."""
    if outgoing is not None:
        link.send(header, outgoing)
    if incoming is not None:
        received = link.receive_header()
        if received != header:
            raise LinkError(f"expected {header}, but {link.peer} sent {received}")
        link.receive(incoming)
    link.flush()


class _PostedOnLinks(Posted):
    def __init__(self, jobs: Mapping[int, Future[None]], step: int, control: Control) -> None:
        self._jobs = jobs
        self._step = step
        self._control = control
        self._settled = threading.Event()  # all done, or one failed
        self._left = len(jobs)
        self._lock = threading.Lock()
        for future in jobs.values():
            future.add_done_callback(self._count)

    def _count(self, future: Future[None]) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0 or future.exception() is not None:
                self._settled.set()

    def wait(self) -> None:
        limit = self._control.timeout.total_seconds()
        try:
            in_time = self._control.wait(self._settled, time.monotonic() + limit)
        except RunStopped as stopped:
            if stopped.stop.lost in self._waiting():
                raise self._lost(stopped.stop.lost, stopped.stop.cause) from stopped
            raise
        if not in_time:
            self._explain(self._waiting()[0], TimeoutError(f"it stayed silent for {limit:g} s"))
        for partner, future in self._jobs.items():
            if future.done() and (error := future.exception()) is not None:
                self._explain(partner, error)

    def _waiting(self) -> list[int]:
        return [partner for partner, future in self._jobs.items() if not future.done() or future.exception()]

    def _explain(self, partner: int, error: BaseException) -> None:
        """Raise why ``partner`` is not there: the reason that a rank gave when it stopped, or else its loss."""
        stop = self._control.await_stop(1.0)
        if stop is not None and stop.lost != partner:
            self._control.check()
        raise self._lost(partner, _GLOO_DECORATION.sub("", str(error)).strip()) from error

    def _lost(self, partner: int, why: str) -> PartnerLost:
        message = f"rank {self._control.rank} lost its partner rank {partner} at step {self._step}: {why}"
        return PartnerLost(message, partner)


class NcclTransport(Transport):
    """One ``batch_isend_irecv`` a step on a group of its own, from device memory.

    NCCL has no headers and does not raise in ``wait``: a mismatch or a dead partner shows as a hang of the stream,
    which NCCL's own watchdog ends. Written from its documentation; it has run on no GPU yet.

    Args:
        group: of all ranks, on which nothing else runs.
    """

    from_host = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        dist.barrier(group=group)  # NCCL wants the first call on a group to be a collective by all ranks

    def post(self, header: Header, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Posted:
        """See :meth:`Transport.post`."""
        operations = []
        for partner in sorted({*outgoing, *incoming}):
            if partner in outgoing:
                operations.append(dist.P2POp(dist.isend, outgoing[partner], partner, self._group))
            if partner in incoming:
                operations.append(dist.P2POp(dist.irecv, incoming[partner], partner, self._group))
        return _PostedOnStream(dist.batch_isend_irecv(operations))

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        dist.destroy_process_group(self._group)


class _PostedOnStream(Posted):
    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
