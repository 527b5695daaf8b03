"""How the payloads of one exchange reach the partners: over links (gloo), or as one batch (NCCL)."""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from functools import partial

import torch.distributed as dist
from torch import Tensor

from lightning_gossip.control import LOOK, Control, RunStopped
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
    def wait(self) -> Collection[int]:
        """Wait until everything arrived and left; return the partners that were skipped: they never began the step.

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
    def reset(self, generation: int) -> None:
        """Begin anew with everybody, after partners were skipped; called on all ranks, with nothing under way."""

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
        self._left: set[int] = set()  # skipped since the last meeting; their links are closed

    def post(self, header: Header, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Posted:
        """See :meth:`Transport.post`."""
        jobs: dict[int, Future[None]] = {}
        for partner in sorted({*outgoing, *incoming} - self._left):
            link = self._links.to(end_of_rank(partner))
            job = partial(_trade, link, header, outgoing.get(partner), incoming.get(partner))
            jobs[partner] = link.submit(job)
        return _PostedOnLinks(jobs, {*outgoing, *incoming} & self._left, header.step, self._control, self._skip)

    def _skip(self, partner: int) -> None:
        self._left.add(partner)
        self._control.note_skip()
        self._links.to(end_of_rank(partner)).close()

    def reset(self, generation: int) -> None:
        """See :meth:`Transport.reset`."""
        self._left.clear()
        self._links.reset(generation)

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
    def __init__(
        self,
        jobs: Mapping[int, Future[None]],
        skipped: set[int],
        step: int,
        control: Control,
        skip: Callable[[int], None],
    ) -> None:
        self._jobs = jobs
        self._skipped = skipped
        self._step = step
        self._control = control
        self._skip = skip
        self._changed = threading.Event()  # a transfer is done, or failed
        for future in jobs.values():
            future.add_done_callback(lambda _: self._changed.set())

    def wait(self) -> Collection[int]:
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
        return self._skipped

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

    def reset(self, generation: int) -> None:
        """Nothing: unequal numbers of batches, and so skipped partners, are refused on NCCL."""

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        dist.destroy_process_group(self._group)


class _PostedOnStream(Posted):
    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> Collection[int]:
        for work in self._works:
            work.wait()
        return ()
