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

from lightning_gossip.arguments import check_timeout
from lightning_gossip.control.meeting import Heartbeats, Meeting, tell_clock
from lightning_gossip.control.member_log import MemberLog
from lightning_gossip.control.members import JOINED, JOINING, LEFT, LOST, Change, Members
from lightning_gossip.control.process_id import host_of, is_gone, own_process
from lightning_gossip.control.run import HEARTBEAT, LOOK, Control
from lightning_gossip.control.stop import Stop

T = TypeVar("T")

log = logging.getLogger(__name__)


LOST_AFTER = timedelta(seconds=30)
"""Without a sign of life, by default."""

LEAD = 2.0
"""Seconds of training, about, for which a member knows beforehand who takes part."""

_WATCHED = 3
"""Members whose heartbeat each watches, and of its host, whose process: so many neighbours lost at once are noticed.

At every look it is the next one's process, with every heartbeat all of them.
"""

_WORD = 0.7
"""Seconds for which the log may still say why a link broke: two looks of whoever shares a host with the other end."""


def check_lost_after(lost_after: timedelta) -> timedelta:
    """Return ``lost_after`` if a rank may be given up that gives no sign of life for so long.

    Raises:
        ValueError: if that is too soon.
    """
    if (seconds := check_timeout("lost_after", lost_after).total_seconds()) <= 2 * HEARTBEAT:
        raise ValueError(f"`lost_after` must be more than {2 * HEARTBEAT:g} s, two heartbeats, got {seconds:g} s")
    return lost_after


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


class WatchingControl(Control):
    """The control of a rank whose run goes on without those that it loses.

    Args:
        survival: how.
        incarnation: of this process: 0 where it was there at the beginning; else see ``joining``.
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
        incarnation: int = 0,
        on_loss: Callable[[Change], None] = lambda change: None,
        **options: Any,
    ) -> None:
        self._survival = survival
        self._process = survival.process or own_process()
        self._on_loss = on_loss
        self.incarnation = incarnation
        """Of this process; the log knows those of the others."""
        self._joins = incarnation > 0  # it has not been given a member's place yet
        self._log = MemberLog(Members(world_size), rank, self._take)
        self._processes: dict[str, str] = {}
        self._pace = _Pace()
        self._hurry = threading.Event()  # the training thread waits for the horizon
        self._look_up = min(2.0, survival.lost_after.total_seconds() / 4)  # seconds, while it waits
        self.declared: Change | None = None
        """The entry that says that this rank takes part no more."""
        super().__init__(connect, rank, world_size, timeout, **options)
        with self.reaching_store():
            self._store.set(f"process/{self._name(rank)}", self._process)

    # -- who is there -------------------------------------------------------------------------------------------

    @property
    @override
    def members(self) -> tuple[int, ...]:
        return self._log.present

    @property
    @override
    def whole(self) -> tuple[int, ...]:
        return self._log.whole

    @override
    def incarnation_of(self, rank: int) -> int:
        return self.incarnation if rank == self.rank else self._log.incarnation(rank)

    @property
    def lost(self) -> int:
        """How many members were lost, or left, so far: some may have joined again."""
        return self.world_size - len(self._log.whole) + self.joined

    @property
    def joined(self) -> int:
        """How many processes have joined so far."""
        return sum(change.kind == JOINED for change in self._log.changes)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Who is lost, or left, as far as this rank knows, in the order in which it was declared."""
        return self._log.changes

    def members_at(self, step: int) -> tuple[int, ...]:
        """Return the ranks among which the round of ``step`` is drawn, ascending: the same on all of them.

        One that has joined is there itself only where its own process is meant, not one before it.

        Raises:
            RunStopped: as :meth:`check`, while it waits until that is known.
        """
        while step > self._log.horizon:
            self._hurry.set()
            self._pause.set()
            self._log.await_horizon(step, LOOK)
            self.check()
        members = self._log.at(step)
        return self._less_those_before(step, members) if self.incarnation else members

    def all_at(self, step: int) -> tuple[int, ...]:
        """Return the ranks that take part in what all do at ``step``, ascending: those that join, too.

        Raises:
            RunStopped: as :meth:`members_at`.
        """
        self.members_at(step)
        return self._less_those_before(step, self._log.all_at(step))

    def _less_those_before(self, step: int, members: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``members`` of ``step``, without this rank where another process of it is meant."""
        if self._log.incarnation_at(step, self.rank) == self.incarnation:
            return members
        return tuple(rank for rank in members if rank != self.rank)

    @override
    def incarnation_at(self, step: int, rank: int) -> int:
        self.members_at(step)
        return self._log.incarnation_at(step, rank)

    @override
    def is_lost(self, rank: int, incarnation: int) -> bool:
        """Whether the log says that this process of ``rank`` takes part no more, as far as it was read."""
        last = self._log.incarnation(rank)
        return incarnation < last or (incarnation == last and rank not in self._log.present)

    @override
    def _name(self, rank: int) -> str:
        return str(self.process_of(rank))

    @override
    def goes_on_without(self, rank: int, why: str, incarnation: int) -> bool:
        """Return True: who can not be reached is skipped, and declared lost where its process is seen to be gone.

        Where it is not, whoever sees more gets a moment to say so.

        Raises:
            RunStopped: as :meth:`check`; also where too few are left.
        """
        with self.reaching_store():
            deadline = time.monotonic() + _WORD
            while not self.is_lost(rank, incarnation) and self.stopped is None and time.monotonic() < deadline:
                if self._declare_gone(self._store, rank, f": {why}" if why else ""):
                    break
                self._closing.wait(LOOK / 4)
            self._log.read(self._store)
        self.check()
        return True

    def await_loss(self, meeting: Meeting, deadline: float) -> bool:
        """Wait until one that has met is lost, up to ``deadline`` (of :func:`time.monotonic`); return whether it is.

        Raises:
            RunStopped: as :meth:`check`.
        """
        return self.poll(lambda: self.has_lost(meeting) or None, deadline) is not None

    def has_lost(self, meeting: Meeting) -> bool:
        """Whether one of those that have met is lost."""
        return any(map(self.is_lost, meeting.members, meeting.incarnations))

    def patience(self) -> float:
        """For ever: who gives no sign of life is declared lost, and who does is waited for."""
        return math.inf

    def declare_lost(self, rank: int, cause: str) -> None:
        """Append the loss of ``rank``, unless the log has it: for whoever started its process, and saw how it ended."""
        with suppress(DistNetworkError, DistStoreError):
            self._declare(self._store, rank, self._log.incarnation(rank), cause)

    def declare_ended(self, ranks: Collection[int]) -> None:
        """Append the loss of those of ``ranks`` that have said that they end, and are members still."""
        for rank in ranks:
            incarnation = self._log.incarnation(rank)
            if self._store.check([f"gone/{rank}.{incarnation}"]):
                self._declare(self._store, rank, incarnation, "it has ended")

    def leave(self, cause: str) -> None:
        """Append that this rank takes part no more; between two steps, or where it ends on an exception."""
        with suppress(DistNetworkError, DistStoreError):
            self._log.append(self._store, LEFT, self.rank, self.incarnation, self._clock(), cause)

    # -- losses -------------------------------------------------------------------------------------------------

    def _declare(self, store: Store, rank: int, incarnation: int, cause: str) -> None:
        self._log.append(store, LOST, rank, incarnation, self._clock(), cause)

    def _take(self, change: Change) -> None:
        """Look at an entry of the log: does this rank's membership, or the run, end with it?"""
        present = self._log.present
        if change.ends and (change.seat, change.incarnation) == (self.rank, self.incarnation):
            self.declared = change
            if change.kind == LOST and self.stopped is None:
                cause = f"this rank was declared lost by rank {change.by} ({change.cause}), and the others went on"
                self.stopped = Stop("lost", -1, self._clock(), f"rank {self.rank} ends: {cause}")
        elif self.rank == next(iter(present), -1) and change.kind != JOINING and not self._joins:
            log.warning("%s; %d of %d go on", change, len(present), self.world_size)
        if len(present) < self._survival.min_replicas and self.stopped is None and not self._joins:
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

    def _process_of(self, store: Store, name: str) -> str:
        """Return what names the process of that name; empty where none has come."""
        if name not in self._processes and store.check([key := f"process/{name}"]):
            self._processes[name] = store.get(key).decode()
        return self._processes.get(name, "")

    def _shares_host(self, store: Store, rank: int) -> bool:
        process = self._process_of(store, self._name(rank))
        return bool(process) and host_of(process) == host_of(self._process)

    def _is_gone(self, store: Store, name: str) -> bool:
        """Whether the process of that name has ended before its time, as far as can be seen from here."""
        process = self._process_of(store, name)
        return bool(process) and self._survival.is_gone(process) and not store.check([f"gone/{name}"])

    def _declare_gone(self, store: Store, rank: int, why: str = "") -> bool:
        """Declare ``rank`` lost if its process is seen to be gone; return whether it is."""
        incarnation = self._log.incarnation(rank)
        if gone := self._is_gone(store, f"{rank}.{incarnation}"):
            self._declare(store, rank, incarnation, f"its process is gone{why}")
        return gone

    def _declare_late(self, is_late: Callable[[int], bool]) -> None:
        """Declare those lost for whom this rank waits, and that have ended, or give no sign of life."""
        late = [rank for rank in self._log.present if rank != self.rank and is_late(rank)]
        self.declare_ended(late)
        self._declare_silent(self._store, self._heartbeats, late)

    def _declare_silent(self, store: Store, heartbeats: Heartbeats, ranks: Sequence[int]) -> None:
        """Declare those of ``ranks`` lost that have come, have not ended, and have been silent for too long."""
        limit = self._survival.lost_after.total_seconds()
        for rank in ranks:
            incarnation = self._log.incarnation(rank)
            if heartbeats.silence(rank) > limit and self._runs(store, f"{rank}.{incarnation}"):
                self._declare(store, rank, incarnation, f"no sign of life for {limit:g} s")

    def _runs(self, store: Store, name: str) -> bool:
        """Whether the process of that name has come, and has not said that it ends."""
        return store.check([f"process/{name}"]) and not store.check([f"gone/{name}"])

    def _next(self, ranks: Sequence[int]) -> Sequence[int]:
        """Return those of ``ranks`` (ascending) that this rank watches: the next in the ring of them all."""
        later = [rank for rank in ranks if rank > self.rank]
        return [*later, *(rank for rank in ranks if rank < self.rank)][:_WATCHED]

    # -- the thread ---------------------------------------------------------------------------------------------

    @override
    def _look(self, store: Store, beats: bool) -> None:
        if self._joins:
            self._beat(store, beats)
        else:
            super()._look(store, beats)
        self._log.read(store)
        if self._joins or self.declared is not None:
            return
        others = sorted(rank for rank in self._log.present if rank != self.rank)
        near = self._next([rank for rank in others if self._shares_host(store, rank)])
        for rank in near if beats else near[:1]:  # once the next one is lost, the one after it is the next
            self._declare_gone(store, rank)
        step = self._clock()
        if beats:
            self._declare_silent(store, self._watch, self._next(others))
            tell_clock(store, self._name(self.rank), step)
        if len(others) + 1 < self.world_size and self.rank in self._log.whole:
            self._look_for_guests(store)
        lead = self._pace.lead(step)
        if self._log.horizon < step + max(1, lead // 2) or self._hurry.is_set():
            self._hurry.clear()
            self._log.extend(store, step + lead)

    def _look_for_guests(self, store: Store) -> None:
        """See who asks to join, on the thread's own connection."""

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
