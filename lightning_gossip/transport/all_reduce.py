"""All-reduce beside training, in the two halves of ``halves`` (design §12).

What is summed, in which order and how wide, is the caller's: a transport moves bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, Protocol

from torch import Tensor

from lightning_gossip.control.helper_thread import HelperThread
from lightning_gossip.control.run import LOOK, Control
from lightning_gossip.control.stop import RunStopped
from lightning_gossip.transport.halves import Combine, Failure, Halves
from lightning_gossip.transport.header import Header, LinkError
from lightning_gossip.transport.interface import PartnerLost, Staged
from lightning_gossip.transport.link import Link, Links, reason_of
from lightning_gossip.transport.link_transport import end_of_rank


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
        self,
        header: Header,
        sent: Tensor,
        room: Tensor,
        combine: Combine,
        staged: Staged | None = None,
        members: tuple[int, ...] | None = None,
    ) -> Reduction:
        """Begin one.

        Args:
            header: what all must agree on: kind, step, size and layout.
            sent: this rank's payload (1-D, uint8, ``header.nbytes``); not to be changed until the end.
            room: for the result (1-D, uint8, see :func:`~lightning_gossip.transport.halves.room_bytes`), whose first
                ``header.nbytes`` it is in the end.
            combine: see :data:`~lightning_gossip.transport.halves.Combine`; called in another thread.
            staged: where both are on the host and the replica on a device: the copies between the two.
            members: the ranks that take part, two at least, ascending, the same on all; None for all ranks.
        """

    @abstractmethod
    def rewind(self) -> None:
        """The exchange clock was set, perhaps back; called on all ranks alike, with nothing under way."""

    @abstractmethod
    def reset(self, generation: int) -> None:
        """Begin anew with everybody, after some were dropped; called on all ranks, with nothing to be waited for."""

    def position(self) -> dict[str, Any]:
        """Return what a rank that takes this one's state has to know to meet the others; with nothing under way."""
        return {}

    def take_place(self, position: Mapping[str, Any]) -> None:  # noqa: B027 - a choice, not a duty
        """Meet the others where the rank does whose :meth:`position` this was; before anything was posted."""

    @abstractmethod
    def close(self) -> None:
        """Give up whatever is under way and release connections."""


class QueuedAllReduce(AllReduce):
    """One at a time, in the order in which they were posted, by a helper thread.

    Args:
        control: of the run.
    """

    from_host = True

    def __init__(self, control: Control) -> None:
        self._control = control
        self._rewound = 0
        self._queue: queue.SimpleQueue[_Runs | None] = queue.SimpleQueue()
        self._thread = HelperThread(self._work, f"all-reduce-{control.rank}", lambda: self._queue.put(None))

    def rewind(self) -> None:
        """See :meth:`AllReduce.rewind`."""
        self._rewound += 1

    def _end(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while (reduction := self._queue.get()) is not None:
            reduction.run()
            del reduction  # it holds the buffers


class _Runs(Protocol):
    def run(self) -> None: ...


class LinkAllReduce(QueuedAllReduce):
    """Over :mod:`~lightning_gossip.transport.link`, one to every other rank; with a rank that is lost the run ends.

    Args:
        links: of this process; closed with this object.
        control: of the run.
    """

    def __init__(self, links: Links, control: Control) -> None:
        self._links = links
        self._spell = _Spell()
        super().__init__(control)

    def post(
        self,
        header: Header,
        sent: Tensor,
        room: Tensor,
        combine: Combine,
        staged: Staged | None = None,
        members: tuple[int, ...] | None = None,
    ) -> Reduction:
        """See :meth:`AllReduce.post`."""
        header = replace(header, extra=self._rewound)
        if self._spell.left:
            return _Dropped()
        rank, everybody = self._control.rank, tuple(range(self._control.world_size))
        halves = Halves(header, sent, room, combine, rank, members or everybody)
        links = {other: self._links.to(end_of_rank(other)) for other in halves.others}
        result = room[: header.nbytes]
        reduction = _OnLinks(halves, header.step, result, staged, links, self._spell, self._control, self._leave)
        self._queue.put(reduction)
        return reduction

    def _leave(self, rank: int) -> None:
        """Drop what is under way: ``rank`` takes no part until all have met."""
        self._spell.left = True
        self._spell.give_up()
        self._control.note_skip()
        self._links.part(end_of_rank(rank))

    def reset(self, generation: int) -> None:
        """See :meth:`AllReduce.reset`."""
        self._spell.give_up()
        self._spell = _Spell()
        self._links.reset(generation)

    def close(self) -> None:
        """See :meth:`AllReduce.close`."""
        self._spell.give_up()
        self._links.close()
        self._end()


class _Spell:
    """From one meeting with a reset to the next: what fails in it leaves the links out of step for all that follows."""

    def __init__(self) -> None:
        self.failure: Failure | None = None
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
        halves: Halves,
        step: int,
        result: Tensor,
        staged: Staged | None,
        links: Mapping[int, Link],
        spell: _Spell,
        control: Control,
        leave: Callable[[int], None],
    ) -> None:
        self._halves, self._step, self._where, self._staged = halves, step, result, staged
        self._links, self._spell, self._control, self._leave = links, spell, control, leave
        self._result: Tensor | None = None
        self._done = threading.Event()  # or failed

    def run(self) -> None:
        """Do both halves, unless one before it failed; in the helper thread."""
        try:
            if self._spell.failure is None:
                if self._staged is not None:
                    self._staged.ready()
                failure = self._halves.run(self._links, lambda _: self._spell.failure)
                if failure is None:
                    self._result = self._where if self._staged is None else self._staged.land(1, self._where)
                else:
                    self._spell.failure = failure
        except Exception as error:  # noqa: BLE001 - a caller's `combine`: whoever waits is told
            self._spell.failure = (self._control.rank, error)
        finally:
            self._done.set()

    def wait(self) -> Tensor | None:
        deadline = self._control.patience()
        try:
            while not self._control.wait(self._done, min(deadline, time.monotonic() + LOOK)):
                if self._is_left():
                    return None
                if time.monotonic() >= deadline:
                    limit = self._control.timeout.total_seconds()
                    self._explain(self._halves.waits_for, TimeoutError(f"it stayed silent for {limit:g} s"))
            if self._result is not None:
                return self._result
            if self._is_left():
                return None
            self._explain(*(self._spell.failure or (self._control.rank, RuntimeError("it failed"))))
        except RunStopped as stopped:
            if (lost := stopped.stop.lost) in self._links:
                raise lost_in(self._control.rank, lost, self._step, stopped.stop.cause) from stopped
            raise

    def _is_left(self) -> bool:
        """Whether some rank waits elsewhere and never began this step: then nobody can complete it."""
        if not self._spell.left:
            for rank in self._links:
                if self._control.has_left(rank, self._step):
                    self._leave(rank)
                    break
        return self._spell.left

    def _explain(self, rank: int, error: BaseException) -> NoReturn:
        """Raise why ``rank`` is not there: the reason that a rank gave when it stopped, or else its loss."""
        self._control.check_cause(rank)
        if rank not in self._links:
            raise error
        raise lost_in(self._control.rank, rank, self._step, reason_of(error)) from error


def lost_in(me: int, rank: int, step: int, why: str) -> PartnerLost:
    """Return what says that ``rank`` was lost in an all-reduce."""
    return PartnerLost(f"rank {me} lost rank {rank} in the all-reduce of step {step}: {why}", rank)
