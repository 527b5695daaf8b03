"""One rank's view of a run that goes on without those that it loses (see ``members`` for the protocol).

It adds to :class:`~lightning_gossip.control.run.Control`: the same thread also reads the log, moves the horizon on, and
watches the processes of this host and the heartbeats of three other members.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistNetworkError, DistStoreError, Store
from typing_extensions import override

from lightning_gossip.control.meeting import Heartbeats, Meeting
from lightning_gossip.control.member_log import MemberLog, ends_membership
from lightning_gossip.control.members import LEFT, LOST, Change, Members
from lightning_gossip.control.process_id import host_of, is_gone, own_process
from lightning_gossip.control.run import LOOK, Control
from lightning_gossip.control.stop import Stop

T = TypeVar("T")

log = logging.getLogger(__name__)

LOST_AFTER = timedelta(seconds=30)
"""Without a sign of life, by default."""

LEAD = 2.0
"""Seconds of training, about, for which a member knows beforehand who takes part."""

_WATCHED = 3
"""Members whose heartbeat each watches, and of its host, whose process: so many neighbours lost at once are noticed."""

_WORD = 0.7
"""Seconds for which the log may still say why a link broke: two looks of whoever shares a host with the other end."""


@dataclass(frozen=True)
class Survival:
    """How a run goes on without those that it loses.

    Attributes:
        min_replicas: the run ends where fewer are left.
        lost_after: a member that gives no sign of life for that long is lost.
        process: names this process to the others.
        is_gone: whether the process of that name has ended, as far as can be seen from here.
    """

    min_replicas: int = 1
    lost_after: timedelta = LOST_AFTER
    process: str = ""
    is_gone: Callable[[str], bool] = is_gone


class MemberControl(Control):
    """The control of a rank whose run goes on without those that it loses.

    Args:
        survival: how.
        on_loss: called with every entry of the log, from any thread; it must not wait.
        connect, rank, world_size, timeout, clock: see :class:`~lightning_gossip.control.run.Control`; ``world_size`` is
            the number of seats.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        rank: int,
        world_size: int,
        timeout: timedelta,
        survival: Survival,
        on_loss: Callable[[Change], None] = lambda change: None,
        **options: Any,
    ) -> None:
        self._survival = survival
        self._process = survival.process or own_process()
        self._on_loss = on_loss
        self._log = MemberLog(Members(world_size), rank, self._take)
        self._processes: dict[int, str] = {}
        self._pace = _Pace()
        self._hurry = threading.Event()  # the training thread waits for the horizon
        self._look_up = min(2.0, survival.lost_after.total_seconds() / 4)  # seconds, while it waits
        self.declared: Change | None = None
        """The entry that says that this rank takes part no more."""
        super().__init__(connect, rank, world_size, timeout, **options)
        with self._reaching_store():
            self._store.set(f"process/{rank}", self._process)

    # -- who is there -------------------------------------------------------------------------------------------

    @property
    @override
    def members(self) -> tuple[int, ...]:
        return self._log.present

    @property
    def lost(self) -> int:
        """How many ranks do not take part any more."""
        return self.world_size - len(self._log.present)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Who is lost, or left, as far as this rank knows, in the order in which it was declared."""
        return self._log.changes

    def members_at(self, step: int) -> tuple[int, ...]:
        """Return the ranks among which the round of ``step`` is drawn, ascending: the same on all of them.

        Raises:
            RunStopped: as :meth:`check`, while it waits until that is known.
        """
        while step > self._log.horizon:
            self._hurry.set()
            self._pause.set()
            self._log.await_horizon(step, LOOK)
            self.check()
        return self._log.at(step)

    def is_lost(self, rank: int) -> bool:
        """Whether the log says that ``rank`` takes part no more, as far as this rank has read it."""
        return rank not in self._log.present

    def goes_on_without(self, rank: int, why: str) -> bool:
        """Return True: who can not be reached is skipped, and declared lost where its process is seen to be gone.

        Where it is not, whoever sees more gets a moment to say so.

        Raises:
            RunStopped: as :meth:`check`; also where too few are left.
        """
        with self._reaching_store():
            deadline = time.monotonic() + _WORD
            while not self.is_lost(rank) and self.stopped is None and time.monotonic() < deadline:
                if self._sees_gone(self._store, rank):
                    self._declare(self._store, rank, f"its process is gone: {why}" if why else "its process is gone")
                    break
                self._closing.wait(LOOK / 4)
            self._log.read(self._store)
        self.check()
        return True

    def await_loss(self, members: tuple[int, ...], deadline: float) -> bool:
        """Wait until one of ``members`` is lost, up to ``deadline`` (of :func:`time.monotonic`); return whether it is.

        Raises:
            RunStopped: as :meth:`check`.
        """
        return self.poll(lambda: any(self.is_lost(rank) for rank in members) or None, deadline) is not None

    def patience(self) -> float:
        """For ever: who gives no sign of life is declared lost, and who does is waited for."""
        return math.inf

    def declare_lost(self, rank: int, cause: str) -> None:
        """Append the loss of ``rank``, unless the log has it: for whoever started its process, and saw how it ended."""
        with suppress(DistNetworkError, DistStoreError):
            self._declare(self._store, rank, cause)

    def declare_ended(self, ranks: Collection[int]) -> None:
        """Append the loss of those of ``ranks`` that have said that they end, and are members still."""
        for rank in ranks:
            if self._store.check([f"gone/{rank}"]):
                self._declare(self._store, rank, "it has ended")

    def leave(self, cause: str) -> None:
        """Append that this rank takes part no more; between two steps, or where it ends on an exception."""
        with suppress(DistNetworkError, DistStoreError):
            incarnation = self._log.incarnation(self.rank)
            self._log.append(self._store, LEFT, self.rank, incarnation, self._clock(), cause)

    # -- the beginning ------------------------------------------------------------------------------------------

    def begin(self, seconds: float) -> Meeting:
        """Wait until every seat has its process, up to ``seconds``; who has not come by then is lost. Then meet.

        Raises:
            RunStopped: if too few have come, or this rank came too late.
        """
        deadline = time.monotonic() + seconds
        missing = list(range(self.world_size))
        with self._reaching_store():
            while missing:
                missing = [
                    rank for rank in missing if not self.is_lost(rank) and not self._store.check([f"process/{rank}"])
                ]
                if time.monotonic() >= deadline:
                    for rank in missing:
                        self._declare(self._store, rank, f"no process came within {seconds:g} s")
                    break
                self.check()
                self._closing.wait(LOOK / 4)
        return self.meet("the beginning")

    # -- meetings -----------------------------------------------------------------------------------------------

    def meet(self, reason: str, ending: bool = False, follow: Callable[[str], bool] | None = None) -> Meeting:
        """Wait until all members that are left call this with the same ``reason``; see :meth:`Control.meet`.

        The meeting names them. One that gives no sign of life for ``lost_after`` is declared lost, and not waited for.
        """
        self.check()
        self._claim_or_follow(reason, follow)
        self._meetings += 1
        key = f"meet/{self._meetings}"
        with self._reaching_store():
            self._announce(key, ending)
            look = self._ended(f"{key}/go", f"{key}/count", lambda: self._end_meeting(key))
            found = self._await(look, self._meetings, reason)
            number, clock, skipped, some_ending = map(int, found.split(b":"))
            members = self._log.fold(self._store, number)
            self.check()
            if self.rank == members[0]:
                # everybody has left the meeting before this one
                before = f"meet/{self._meetings - 1}"
                fields = ["reason", "count", "go", "skipped", "ending", "votes", "verdict"]
                for field in [*fields, *(f"vote/{rank}" for rank in range(self.world_size))]:
                    self._store.delete_key(f"{before}/{field}")
        return Meeting(clock, bool(skipped), bool(some_ending), self._meetings, members)

    @override
    def _await(self, look: Callable[[], T | None], meeting: int, reason: str) -> T:
        """Call ``look`` until it finds something; who has not come to ``meeting`` and is silent is declared lost."""
        while (found := self.poll(look, time.monotonic() + self._look_up)) is None:
            self._declare_late(lambda rank: self._whereabouts(rank)[0] < meeting)
        return found

    def agree(self, meeting: Meeting, succeeded: bool) -> bool:
        """Return whether what the members met for has succeeded on all that are left: else all repeat it.

        Args:
            meeting: that came before it.
            succeeded: whether it has on this rank.

        Raises:
            RunStopped: as :meth:`check`.
        """
        key = f"meet/{meeting.number}"
        with self._reaching_store():
            self._store.set(f"{key}/vote/{self.rank}", str(int(succeeded)))
            look = self._ended(f"{key}/verdict", f"{key}/votes", lambda: self._end_vote(key, meeting.members))
            while (found := self.poll(look, time.monotonic() + self._look_up)) is None:
                self._declare_late(lambda rank: not self._store.check([f"{key}/vote/{rank}"]))
        self.check()
        return found == b"1"

    def _ended(self, word: str, arrivals: str, end: Callable[[], None]) -> Callable[[], bytes | None]:
        """Arrive, and return what returns the word at key ``word`` once it is there: who comes last writes it.

        Or, where that one dies over it, or the last of those that are left has come already, whoever reads so.
        """
        is_last = self._store.add(arrivals, 1) >= len(self._log.present)
        looked, again = -1 if is_last else self._log.length, time.monotonic() + self._look_up

        def look() -> bytes | None:
            nonlocal looked, again
            if self._store.check([word]):
                return self._store.get(word)
            if looked < self._log.length or time.monotonic() > again:
                self._log.read(self._store)
                looked, again = self._log.length, time.monotonic() + self._look_up
                end()
            return None

        return look

    def _end_meeting(self, key: str) -> None:
        """Write the word that ends the meeting, if all that are left have come."""
        members, number = self._log.present, self._log.length
        whereabouts = [self._whereabouts(rank) for rank in members]
        if self.rank in members and all(meeting >= self._meetings for meeting, _ in whereabouts):
            clock = max(clock for _, clock in whereabouts)
            notes = [int(self._store.check([f"{key}/{note}"])) for note in ("skipped", "ending")]
            self._store.compare_set(f"{key}/go", "", ":".join(map(str, (number, clock, *notes))))

    def _end_vote(self, key: str, voters: tuple[int, ...]) -> None:
        """Write the verdict, if all that met have said how it went, or are lost."""
        given = {rank: self._store.check([f"{key}/vote/{rank}"]) for rank in voters}
        if all(has_voted or self.is_lost(rank) for rank, has_voted in given.items()):
            votes = [self._store.get(f"{key}/vote/{rank}") for rank, has_voted in given.items() if has_voted]
            self._store.compare_set(f"{key}/verdict", "", str(int(all(vote == b"1" for vote in votes))))

    # -- losses -------------------------------------------------------------------------------------------------

    def _declare(self, store: Store, rank: int, cause: str) -> None:
        self._log.append(store, LOST, rank, self._log.incarnation(rank), self._clock(), cause)

    def _take(self, change: Change) -> None:
        """Look at an entry of the log: does this rank's membership, or the run, end with it?"""
        present = self._log.present
        if ends_membership(change, self.rank):
            self.declared = change
            if change.kind == LOST and self.stopped is None:
                cause = f"this rank was declared lost by rank {change.by} ({change.cause}), and the others went on"
                self.stopped = Stop("error", -1, self._clock(), f"rank {self.rank} ends: {cause}")
        elif self.rank == min(present, default=-1):
            log.warning("%s; %d of %d go on", change, len(present), self.world_size)
        if len(present) < self._survival.min_replicas and self.stopped is None:
            # each can tell by itself, so nobody has to be told: all read the same log
            missing = [self._log.last_change(rank) for rank in range(self.world_size) if rank not in present]
            self.stopped = Stop(
                "error",
                -1,
                self._clock(),
                f"{len(present)} of {self.world_size} replicas are left, fewer than `min_replicas="
                f"{self._survival.min_replicas}`: {'; '.join(map(str, filter(None, missing)))}",
            )
        self._on_loss(change)

    def _process_of(self, store: Store, rank: int) -> str:
        """Return what names the process of ``rank``; empty where none has come."""
        if rank not in self._processes and store.check([key := f"process/{rank}"]):
            self._processes[rank] = store.get(key).decode()
        return self._processes.get(rank, "")

    def _shares_host(self, store: Store, rank: int) -> bool:
        process = self._process_of(store, rank)
        return bool(process) and host_of(process) == host_of(self._process)

    def _sees_gone(self, store: Store, rank: int) -> bool:
        """Whether the process of ``rank`` has ended before its time, as far as can be seen from here."""
        process = self._process_of(store, rank)
        return bool(process) and self._survival.is_gone(process) and not store.check([f"gone/{rank}"])

    def _declare_late(self, is_late: Callable[[int], bool]) -> None:
        """Declare those lost for whom this rank waits, and that have ended, or give no sign of life."""
        late = [rank for rank in self._log.present if rank != self.rank and is_late(rank)]
        self.declare_ended(late)
        self._declare_silent(self._store, self._heartbeats, late)

    def _declare_silent(self, store: Store, heartbeats: Heartbeats, ranks: Sequence[int]) -> None:
        """Declare those of ``ranks`` lost that have come, have not ended, and have been silent for too long."""
        limit = self._survival.lost_after.total_seconds()
        for rank in ranks:
            if heartbeats.silence(rank) > limit and self._runs(store, rank):
                self._declare(store, rank, f"no sign of life for {limit:g} s")

    def _runs(self, store: Store, rank: int) -> bool:
        """Whether the process of ``rank`` has come, and has not said that it ends."""
        return store.check([f"process/{rank}"]) and not store.check([f"gone/{rank}"])

    def _next(self, ranks: Sequence[int]) -> Sequence[int]:
        """Return those of ``ranks`` (ascending) that this rank watches: the next in the ring of them all."""
        later = [rank for rank in ranks if rank > self.rank]
        return [*later, *(rank for rank in ranks if rank < self.rank)][:_WATCHED]

    # -- the thread ---------------------------------------------------------------------------------------------

    def _look(self, store: Store, beats: bool) -> None:
        super()._look(store, beats)
        self._log.read(store)
        if self.declared is not None:
            return
        others = [rank for rank in self._log.present if rank != self.rank]
        for rank in self._next([rank for rank in others if self._shares_host(store, rank)]):
            if self._sees_gone(store, rank):
                self._declare(store, rank, "its process is gone")
        if beats:
            self._declare_silent(store, self._watch, self._next(others))
        step = self._clock()
        lead = self._pace.lead(step)
        if self._log.horizon < step + max(1, lead // 2) or self._hurry.is_set():
            self._hurry.clear()
            self._log.extend(store, step + lead)

    def _leave(self, grace: float) -> None:
        """Nobody's process holds the store."""


class _Pace:
    """How many steps a rank makes, by its own clock."""

    def __init__(self) -> None:
        self._step, self._when = 0, time.monotonic()
        self._rate = 0.0
        self._lead = 1

    def lead(self, step: int) -> int:
        """Return how many steps ahead of ``step`` make about :data:`LEAD` seconds: from 2 to twice the last answer."""
        seconds = max(time.monotonic() - self._when, 1e-3)
        rate = max(0, step - self._step) / seconds
        if seconds >= LOOK / 2:
            self._step, self._when, self._rate = step, time.monotonic(), rate
        self._lead = max(2, min(2 * self._lead, math.ceil(LEAD * max(rate, self._rate))))
        return self._lead
