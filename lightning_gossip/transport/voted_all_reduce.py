"""All-reduces of members, each of which all of them complete or none (design §12; ``control/members``, ``votes``).

**What a rank does with one**, in its helper thread, one after another in the order in which all post them:

==========  ===========================================================  ==============================================
state       what it does                                                 what comes next
==========  ===========================================================  ==============================================
posted      waits for its turn                                           gathering; failed, where one of its members is
                                                                         known to be lost, or to wait elsewhere
gathering   both halves, over links of the present generation            whole; failed, where a link breaks, a member
                                                                         is lost, or the word is ``no``
whole       says yes, and waits for the word                             completed or dropped, as the word says
failed      writes the word ``no``, unless there is a word               dropped; ended, where the word is ``yes``
completed   hands the result on                                          the next one
dropped     closes its links: those of the next generation, named after  the next one
            this all-reduce, carry nothing of it
ended       fails for good: this rank was declared lost                  nothing
==========  ===========================================================  ==============================================

**A member that dies**, and what comes of it:

==================================  ===================================================================================
it dies                             the others
==================================  ===================================================================================
before it posts                     fail: with one that is lost nobody completes the first half
after the sends of its first half   fail: nobody gets the part that it owns
in its second half                  those to whom it has not sent its part fail, and their ``no`` is everybody's
after all its sends, unvoted        are whole, and say yes; once it is declared lost, so is the word
after its vote                      the same, at once
who would have written the word     another finds all votes, and writes it
two of them                         by the same rules: the word is ``yes`` only where all that live have the result
==================================  ===================================================================================

Two that live and whose link breaks fail, and so all drop that one. A member that waits elsewhere and never began the
step is noticed by who waits: all that come until all have met are dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.run import LOOK
from lightning_gossip.control.votes import Vote, Votes
from lightning_gossip.transport.all_reduce import QueuedAllReduce, Reduction, lost_in
from lightning_gossip.transport.halves import Combine, Failure, Halves
from lightning_gossip.transport.header import Header, LayoutMismatch, LinkError
from lightning_gossip.transport.interface import Staged
from lightning_gossip.transport.link import Link, Links, reason_of
from lightning_gossip.transport.link_transport import end_of_rank

log = logging.getLogger(__name__)

_CLOSE = 0.1
"""Seconds for a link's thread to end; one that connects to who is gone ends later, and does nothing more."""


class VotedAllReduce(QueuedAllReduce):
    """Over :mod:`~lightning_gossip.transport.link`, one to every other member, which may be lost.

    Args:
        links: of this process; closed with this object.
        control: of the run.
        votes: of this rank.
    """

    def __init__(self, links: Links, control: MemberControl, votes: Votes) -> None:
        self.links = links
        self.votes = votes
        self.members = control
        self.waits_elsewhere = -1
        """A rank that does, until all have met; -1 for none."""
        self.closed = False
        self._generation = "0"  # the meeting from which on links are, see `reset`
        self._dropped = ""  # the last all-reduce that was dropped since
        self._reached: dict[int, int] = {}  # by rank, to which process of it there is a link
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
        """See :meth:`AllReduce.post`.

        Raises:
            RunStopped: if this rank is declared lost.
        """
        members = members or tuple(range(self.members.world_size))
        if self.members.rank not in members:
            self.members.check()
            raise RuntimeError(f"rank {self.members.rank} takes no part at step {header.step}: members are {members}")
        header = replace(header, extra=self._rewound)
        halves = Halves(header, sent, room, combine, self.members.rank, members, spares=True)
        processes = {rank: self.members.incarnation_at(header.step, rank) for rank in members}
        reduction = _Voted(self, halves, header, processes, room[: header.nbytes], staged)
        self._queue.put(reduction)
        return reduction

    def link_to(self, rank: int, incarnation: int) -> Link:
        """Return the link to a process of ``rank``; that to one before it is closed. In the helper thread."""
        if (before := self._reached.get(rank, incarnation)) != incarnation:
            self.links.part(end_of_rank(rank, before))
        self._reached[rank] = incarnation
        return self.links.to(end_of_rank(rank, incarnation))

    def begin_anew_after(self, dropped: str) -> None:
        """Close all links; the next generation is named after what was dropped. In the helper thread."""
        self._dropped = dropped
        self.links.reset(f"{self._generation}/{dropped}", _CLOSE)

    def reset(self, generation: int) -> None:
        """See :meth:`AllReduce.reset`."""
        self._generation, self._dropped = str(generation), ""
        self.waits_elsewhere = -1
        self.links.reset(self._generation)

    def position(self) -> dict[str, Any]:
        """See :meth:`AllReduce.position`."""
        return {"generation": self._generation, "dropped": self._dropped, "rewound": self._rewound}

    def take_place(self, position: Mapping[str, Any]) -> None:
        """See :meth:`AllReduce.take_place`."""
        if position["generation"] != self._generation:
            self.reset(int(position["generation"]))
        if position["dropped"]:
            self.begin_anew_after(position["dropped"])
        self._rewound = int(position["rewound"])

    def close(self) -> None:
        """See :meth:`AllReduce.close`."""
        self.closed = True
        self._end()
        self.links.close()


class _Voted(Reduction):
    def __init__(
        self,
        reducer: VotedAllReduce,
        halves: Halves,
        header: Header,
        processes: Mapping[int, int],
        result: Tensor,
        staged: Staged | None,
    ) -> None:
        self._reducer, self._control = reducer, reducer.members
        self._halves, self._step = halves, header.step
        self._processes = processes  # by rank, which process of it takes part
        self._where, self._staged = result, staged
        self._name = f"{header.extra}.{header.step}.{header.number}"
        self._result: Tensor | None = None
        self._failure: Failure | None = None  # for good
        self._done = threading.Event()

    # -- in the helper thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Complete it or drop it, as all do."""
        try:
            self._decide()
        except Exception as error:  # noqa: BLE001 - of the store, or of what takes the result: whoever waits is told
            self._failure = (self._control.rank, error)
        finally:
            self._done.set()

    def _decide(self) -> None:
        vote = self._reducer.votes.on(self._name, self._processes)
        failure = self._gather(vote)
        word = vote.say_yes(self._ends) if failure is None else vote.say_no(_reason(failure))
        if failure is not None and (word is None or word.kept or self._is_for_good(failure)):
            self._failure = failure
        elif word is None:
            self._failure = self._control.rank, LinkError("it ends")
        elif word.kept:
            self._result = self._where if self._staged is None else self._staged.land(1, self._where)
        if word is not None and not word.kept:
            if word.by == self._control.rank:
                log.warning("the round of step %d is dropped: %s", self._step, word.why)
            self._reducer.begin_anew_after(self._name)

    def _is_for_good(self, failure: Failure) -> bool:
        """Whether the next one would fail too: for a caller's error, or since others send other tensors."""
        rank, error = failure
        return rank == self._control.rank or isinstance(error, LayoutMismatch)

    def _gather(self, vote: Vote) -> Failure | None:
        """Do both halves; return why that failed."""

        def given_up(pending: Collection[int]) -> Failure | None:
            if self._ends():
                return self._control.rank, LinkError("it ends")
            if (elsewhere := self._reducer.waits_elsewhere) >= 0:
                return elsewhere, LinkError("it waits elsewhere")
            if (lost := next(filter(self._is_lost, pending), None)) is not None:
                return lost, LinkError("it is lost")
            if (word := vote.look()) is not None and not word.kept:
                return word.by, LinkError(word.why)
            return None

        try:
            if self._staged is not None:
                self._staged.ready()
            if (failure := given_up(self._halves.others)) is not None:
                return failure
            links = {rank: self._reducer.link_to(rank, self._processes[rank]) for rank in self._halves.others}
            return self._halves.run(links, given_up)
        except Exception as error:  # noqa: BLE001 - a caller's `combine`: all drop it, and whoever waits is told
            return self._control.rank, error

    def _is_lost(self, rank: int) -> bool:
        return self._control.is_lost(rank, self._processes[rank])

    def _ends(self) -> bool:
        return self._reducer.closed or self._control.stopped is not None

    # -- in the training thread ---------------------------------------------------------------------------------

    def wait(self) -> Tensor | None:
        while not self._control.wait(self._done, time.monotonic() + LOOK):
            self._look_elsewhere()
        if self._failure is not None:
            rank, error = self._failure
            self._control.check_cause(rank)
            if rank not in self._halves.others:
                raise error
            raise lost_in(self._control.rank, rank, self._step, reason_of(error)) from error
        if self._result is None:
            self._control.note_skip()  # who has not begun it has other links: all make new ones when they meet
        return self._result

    def _look_elsewhere(self) -> None:
        """Find out whether a member waits elsewhere and never began this step: then nobody can complete it."""
        if self._reducer.waits_elsewhere >= 0:
            return
        for rank in self._halves.others:
            if not self._is_lost(rank) and self._control.has_left(rank, self._step):
                self._reducer.waits_elsewhere = rank
                return


def _reason(failure: Failure) -> str:
    rank, error = failure
    return f"rank {rank}: {reason_of(error)}"
