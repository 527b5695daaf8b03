"""One rank's view of a run that goes on without those that it loses (see ``members`` for the protocol).

It adds to :class:`~lightning_gossip.control.run.Control`: the same thread also reads the log, moves the horizon on, and
watches the processes of this host and the heartbeats of three other members.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistNetworkError, DistStoreError, Store
from typing_extensions import override

from lightning_gossip.control.meeting import Heartbeats, Meeting
from lightning_gossip.control.member_log import MemberLog
from lightning_gossip.control.members import JOINED, JOINING, LEFT, LOST, Change, Members
from lightning_gossip.control.process_id import host_of, is_gone, own_process
from lightning_gossip.control.run import HEARTBEAT, LOOK, Control
from lightning_gossip.control.stop import Stop

T = TypeVar("T")

OVER = "over"
"""The key that says that training is over, with what is left of it."""

log = logging.getLogger(__name__)


class RunOver(RuntimeError):
    """A process has come to a run whose training is over; :attr:`left` is what is left of it, in words."""

    def __init__(self, left: str) -> None:
        super().__init__(f"the training is over: {left}")
        self.left = left


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
        self._asked = 0  # requests to join that were read
        self._asking: list[tuple[int, int]] = []  # seat and incarnation, of those that nobody has answered yet
        self.guest: tuple[int, int] | None = None
        """Seat and incarnation that this rank is to take in at the end of a step."""
        self._pace = _Pace()
        self._hurry = threading.Event()  # the training thread waits for the horizon
        self._look_up = min(2.0, survival.lost_after.total_seconds() / 4)  # seconds, while it waits
        self.declared: Change | None = None
        """The entry that says that this rank takes part no more."""
        super().__init__(connect, rank, world_size, timeout, **options)
        with self._reaching_store():
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

    def incarnation_of(self, rank: int) -> int:
        """Return which process of ``rank`` takes part, or was the last to: how many came before it."""
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
        if self.incarnation and self._log.incarnation_at(step, self.rank) != self.incarnation:
            return tuple(rank for rank in members if rank != self.rank)
        return members

    def all_at(self, step: int) -> tuple[int, ...]:
        """Return the ranks that take part in what all do at ``step``, ascending: those that join, too.

        Raises:
            RunStopped: as :meth:`members_at`.
        """
        self.members_at(step)
        members = self._log.all_at(step)
        if self._log.incarnation_at(step, self.rank) != self.incarnation:
            return tuple(rank for rank in members if rank != self.rank)
        return members

    @override
    def incarnation_at(self, step: int, rank: int) -> int:
        self.members_at(step)
        return self._log.incarnation_at(step, rank)

    @override
    def is_lost(self, rank: int, incarnation: int | None = None) -> bool:
        """Whether the log says that ``rank``, or that process of it, takes part no more, as far as it was read."""
        return rank not in self._log.present or incarnation not in (None, self._log.incarnation(rank))

    @override
    def _name(self, rank: int) -> str:
        return f"{rank}.{self.incarnation_of(rank)}"

    def goes_on_without(self, rank: int, why: str, incarnation: int | None = None) -> bool:
        """Return True: who can not be reached is skipped, and declared lost where its process is seen to be gone.

        Where it is not, whoever sees more gets a moment to say so.

        Raises:
            RunStopped: as :meth:`check`; also where too few are left.
        """
        with self._reaching_store():
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

    # -- joining ------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask for a donor, for this process that has come to a seat which was lost."""
        with self._reaching_store():
            number = self._store.add("joins", 1)
            self._store.set(f"join/{number}", f"{self.rank}.{self.incarnation}")

    def await_donor(self) -> int:
        """Wait until a member has taken this process in, for as long as there is one; return its rank.

        Raises:
            RunStopped: as :meth:`check`; also where nobody is left who could.
            RunOver: if training is over.
        """
        while (found := self.poll(self._look_for_donor, time.monotonic() + self._look_up)) is None:
            if not self._log.whole:
                self.stop("error", f"nobody is left who could take in rank {self.rank}")
        return found

    def check_over(self) -> None:
        """Raise :class:`RunOver` if training is over."""
        with self._reaching_store():
            if self._store.check([OVER]):
                raise RunOver(self._store.get(OVER).decode())

    def rest(self, seconds: float) -> None:
        """Wait for so long, or until this object is closed."""
        self._closing.wait(seconds)

    def _look_for_donor(self) -> int | None:
        self.check_over()
        change = self._log.last_change(self.rank)
        return change.by if change is not None and (change.kind, change.incarnation) == self._being_taken_in else None

    @property
    def _being_taken_in(self) -> tuple[str, int]:
        return JOINING, self.incarnation

    def take_in(self) -> Change | None:
        """Append that the :attr:`guest` is joining; return the entry, or None where it is no more to be taken in.

        Called at the end of a step; :meth:`position` then tells what comes with this rank's state.
        """
        guest, self.guest = self.guest, None
        if guest is None:
            return None
        with self._reaching_store():
            return self._log.append(self._store, JOINING, *guest, self._clock(), f"from rank {self.rank}")

    def send_away(self, entry: Change, cause: str) -> None:
        """Append that the one taken in by ``entry`` is not joining after all: it will ask again."""
        with self._reaching_store():
            self._log.append(self._store, LEFT, entry.seat, entry.incarnation, self._clock(), cause)

    def step_of(self, entry: Change) -> int:
        """Return from which step ``entry``, which this rank has appended, holds."""
        return self._log.step_of(entry.number)

    @property
    def donor(self) -> int:
        """The first member that is whole, by what all that have met last count."""
        return self._log.whole_by(self._log.folded)[0]

    def word_of(self, rank: int, own: Callable[[], str], otherwise: str) -> str:
        """Return what ``rank`` tells those that have just met with it; ``otherwise``, where it is lost before it has.

        All that have met call this, once before they meet again, and get the same.

        Args:
            rank: one of them.
            own: returns what this rank tells; called where it is ``rank``.
            otherwise: the same on all.

        Raises:
            RunStopped: as :meth:`check`.
        """
        key = f"meet/{self._meetings}/word"
        [incarnation] = self._log.incarnations_of(self._log.folded, (rank,))

        def look() -> str | None:
            if self._store.check([key]):
                return self._store.get(key).decode()
            if self.is_lost(rank, incarnation):
                return self._store.compare_set(key, "", otherwise).decode()
            return None

        with self._reaching_store():
            if rank == self.rank:
                return self._store.compare_set(key, "", own()).decode()
            while (found := self.poll(look, time.monotonic() + self._look_up)) is None:
                self._declare_late(lambda late: late == rank)
        return found

    def hold(self, number: int) -> None:
        """Let the first ``number`` entries of the log hold at every step; on all members, between the same two."""
        with self._reaching_store():
            self._log.fold(self._store, number)

    def position(self) -> dict[str, Any]:
        """Return where this rank is among the meetings and calls of the run, as numbers by name."""
        numbers = {"meetings": self._meetings, "folded": self._log.folded, "calls": self.calls.number}
        return numbers | {"waits": dict(self._waits)}

    def take_place(self, position: Mapping[str, Any]) -> None:
        """Come to the next meeting that the donor comes to, and answer what is called for from now on."""
        with self._reaching_store():
            self._log.fold(self._store, int(position["folded"]))
        self._meetings = int(position["meetings"])
        self._waits.update(position["waits"])
        self.calls.begin_at(int(position["calls"]))
        self._joins = False

    def tell_joined(self, donor: int) -> Change | None:
        """Append that this process is whole: it is drawn from the step on that all know; return the entry.

        Raises:
            RunStopped: as :meth:`check`; also where it was declared lost meanwhile.
        """
        with self._reaching_store():
            cause = f"from rank {donor}"
            entry = self._log.append(self._store, JOINED, self.rank, self.incarnation, self._clock(), cause)
        self.check()
        return entry

    def clock_to_join(self, entry: Change | None) -> int:
        """Return to what one has to set its clock whose ``entry`` says that it has joined.

        It goes with the clocks of the others then, and begins none of the steps in which it is drawn too late: the step
        at which the others are, or the one before the first in which it is drawn.

        Raises:
            RunStopped: as :meth:`check`.
        """
        clock = self._clock_of_others()
        return clock if entry is None else min(clock, self._log.step_of(entry.number) - 1)

    def _clock_of_others(self) -> int:
        """Return the step at which the others are: the first that one tells from now on, as they do once a second.

        Where all stand still, what they told last.

        Raises:
            RunStopped: as :meth:`check`.
        """
        keys = [f"clock/{self._name(rank)}" for rank in self._log.whole if rank != self.rank]

        def look() -> list[int]:
            return [int(self._store.get(key)) for key in keys if self._store.check([key])]

        with self._reaching_store():
            first = look()
            found = self.poll(lambda: now if (now := look()) != first else None, time.monotonic() + 1.5 * HEARTBEAT)
        return max(found or first, default=0)

    def tell_over(self, what: str) -> None:
        """Tell those that come from now on that training is over, and ``what`` is left of it."""
        with self._reaching_store():
            self._store.set(OVER, what)

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
                    rank for rank in missing if not self.is_lost(rank) and not self._store.check([f"process/{rank}.0"])
                ]
                if time.monotonic() >= deadline:
                    for rank in missing:
                        self._declare(self._store, rank, 0, f"no process came within {seconds:g} s")
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
                fields = ["reason", "count", "go", "skipped", "ending", "votes", "verdict", "word"]
                for field in [*fields, *(f"vote/{rank}" for rank in range(self.world_size))]:
                    self._store.delete_key(f"{before}/{field}")
            incarnations = self._log.incarnations_of(number, members)
        return Meeting(clock, bool(skipped), bool(some_ending), self._meetings, members, incarnations)

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
            look = self._ended(f"{key}/verdict", f"{key}/votes", lambda: self._end_vote(key, meeting))
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
        number = -1
        while number < self._log.length:  # who took somebody in did so before it came: read that before the word
            members, number = self._log.present, self._log.length
            whereabouts = [self._whereabouts(rank) for rank in members]
            if self.rank not in members or any(meeting < self._meetings for meeting, _ in whereabouts):
                return
            self._log.read(self._store)
        clock = max(clock for _, clock in whereabouts)
        notes = [int(self._store.check([f"{key}/{note}"])) for note in ("skipped", "ending")]
        self._store.compare_set(f"{key}/go", "", ":".join(map(str, (number, clock, *notes))))

    def _end_vote(self, key: str, meeting: Meeting) -> None:
        """Write the verdict, if all that met have said how it went, or are lost."""
        lost = dict(zip(meeting.members, map(self.is_lost, meeting.members, meeting.incarnations), strict=True))
        given = {rank: self._store.check([f"{key}/vote/{rank}"]) for rank in lost}
        if all(has_voted or lost[rank] for rank, has_voted in given.items()):
            votes = [self._store.get(f"{key}/vote/{rank}") for rank, has_voted in given.items() if has_voted]
            self._store.compare_set(f"{key}/verdict", "", str(int(all(vote == b"1" for vote in votes))))

    # -- losses -------------------------------------------------------------------------------------------------

    def _declare(self, store: Store, rank: int, incarnation: int, cause: str) -> None:
        self._log.append(store, LOST, rank, incarnation, self._clock(), cause)

    def _take(self, change: Change) -> None:
        """Look at an entry of the log: does this rank's membership, or the run, end with it?"""
        present = self._log.present
        if change.ends and (change.seat, change.incarnation) == (self.rank, self.incarnation):
            self.declared = change
            if (change.kind == LOST or change.by != self.rank) and self.stopped is None:
                cause = f"this rank was declared lost by rank {change.by} ({change.cause}), and the others went on"
                self.stopped = Stop("lost", -1, self._clock(), f"rank {self.rank} ends: {cause}")
        elif self.rank == next(iter(present), -1) and change.kind != JOINING:
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
            if beats:
                store.add(f"alive/{self.rank}", 1)
            self._log.read(store)
            return
        super()._look(store, beats)
        self._log.read(store)
        if self.declared is not None:
            return
        others = [rank for rank in self._log.present if rank != self.rank]
        for rank in self._next([rank for rank in sorted(others) if self._shares_host(store, rank)]):
            self._declare_gone(store, rank)
        step = self._clock()
        if beats:
            self._declare_silent(store, self._watch, self._next(sorted(others)))
            store.set(f"clock/{self._name(self.rank)}", str(step))
        if self.rank in self._log.whole:
            self._look_for_guests(store)
        lead = self._pace.lead(step)
        if self._log.horizon < step + max(1, lead // 2) or self._hurry.is_set():
            self._hurry.clear()
            self._log.extend(store, step + lead)

    def _look_for_guests(self, store: Store) -> None:
        """See who asks to join; the first member that is whole takes it in, one at a time."""
        while store.check([key := f"join/{self._asked + 1}"]):
            seat, _, incarnation = store.get(key).decode().partition(".")
            self._asking.append((int(seat), int(incarnation)))
            self._asked += 1
        if not self._asking:
            return
        self._asking = [
            (k, n) for k, n in self._asking if n > self._log.incarnation(k) and self._waits_still(store, k, n)
        ]
        is_donor = self.rank == self._log.whole[0]
        self.guest = next((g for g in self._asking if g[0] not in self._log.present), None) if is_donor else None

    def _waits_still(self, store: Store, seat: int, incarnation: int) -> bool:
        name = f"{seat}.{incarnation}"
        return self._runs(store, name) and not self._is_gone(store, name)

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
