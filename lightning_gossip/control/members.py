"""Members of a run: who takes part, from which step that holds, and what everybody does at a death (design §10).

A run has *seats*, numbered as ranks are; a *member* is a seat whose process takes part. This file knows the protocol as
plain data and transitions; ``member_log`` brings them together with the run's store, ``member_control`` with a rank's
threads.

A seat that was lost may be taken again, by a process of the next *incarnation*. What stands in the store about a
member stands there under both numbers, so that nothing that a dead one left is taken for a word of the one after it.

**What is in the store.** One log, to which whoever sees a change appends it: entry n is written by compare and set, by
who has read those before it, so that no loss is declared twice. One step an entry, from which it holds (also by compare
and set). And of each member: its process, its heartbeat, its horizon, the meeting at which it waits.

**States of a seat**, and what the others do with it:

=========  ========================================  =================================================================
state      how a seat comes to it                    what the others do
=========  ========================================  =================================================================
empty      at the beginning; nobody has come         wait, until the start's time is over: then it is declared lost
member     its process came before that; or its      draw it in every round, wait for it as long as it gives a sign
           entry "joined" holds                      of life
lost       an entry of the log says so (it ended, it draw it until the entry holds, and skip it; never wait for it;
           left, or gave no sign of life)            meetings and collectives that begin now do without it
gone       that entry holds, by step or by meeting   draw among those that are left
waiting    a process has claimed a seat that was     nothing; the first member that is whole is its donor, and takes
           lost, and asks for a donor                it in at the end of a step of its own
joining    the donor's entry "joining": it was, or   wait for it at meetings, which it comes to where the donor would;
           is about to be, given the donor's state   draw it in no exchange; rounds of all members count it from the
                                                     step on from which that entry holds
=========  ========================================  =================================================================

**Joining**, message by message (``joining`` has the joiner's side, ``member_control`` the donor's). Between the donor's
entry and its snapshot lies no meeting, and the donor comes to the next one after it: so all meetings from the snapshot
on count the joiner, and what it does in them follows from the state that it was given. Order of precedence is by
seniority, first those of the beginning, then who joined, in the order of the log: who joins never takes duties away.

====================================  =================================================================================
event                                 what follows
====================================  =================================================================================
a process comes to a seat             it claims the next incarnation (compare and set); of two, one gets it
the seat's last process still runs    it is told who holds the seat, and ends; one that is silent is waited for, until
                                      it gives a sign of life or is declared lost
it asks                               the first member that is whole appends "joining" at the end of a step, and serves
                                      its state over a link, from a thread beside training
no member is whole, or none trains    it waits; where training is over, it is told so, and ends
the donor dies before it has served   the joiner appends that it has left, and asks again as the next incarnation;
or what arrives is torn, or a meeting likewise. So no incarnation has two donors, and none becomes whole without having
comes before the snapshot             been given a state
the joiner dies while it waits        its claim is void; nobody has counted it
the joiner dies while it is joining   it is declared lost as any member, and meetings do without it
it has loaded the state               it appends "joined", reads from which step that holds, and sets its clock to that
                                      of the others; it is drawn from that step on
it finds itself declared lost         it gives up what it holds, and comes to its seat anew
====================================  =================================================================================

**From which step.** A member draws the rounds of steps up to its *horizon* only. To move it on it (1) writes the new
horizon to the store, (2) reads the log to its end, giving every entry there its step, and (3) holds it. An entry gets
the step after the largest horizon that stands in the store, the lost one's too, and none before that of the entry
before. Whoever wrote its horizon before that look is reckoned with; whoever wrote it after, reads the entry. So every
member knows, before it draws a step, all that holds there, and who has not read the store for that long waits until it
has. A meeting folds the log: all entries that its word counts hold from there on, whatever their step.

**Events**, and what a rank does:

==================================  ===================================================================================
event                               what each of the others does
==================================  ===================================================================================
a process of this host is gone      who sees it (control looks five times a second; a link or a memory that breaks asks
                                    at once) appends the loss
no heartbeat for ``lost_after``     its three predecessors among the members watch it, and who waits for it: the same
a link breaks, nobody knows why     wait a moment for the log to say; then skip the partner until the next meeting
fewer than ``min_replicas`` left    who reads that entry writes the stop word: the run ends, with who is missing
the own loss stands in the log      join anew, or end, and say so: never go on beside what the others have done without
                                    it
the store is gone                   end
an exception, SIGTERM               append the own entry ("left") between two steps, and end; nobody waits
==================================  ===================================================================================

**A death at every point of a step:**

====================================  =================================================================================
it dies                               its partner in the step, and everybody
====================================  =================================================================================
before it posts                       skips it: its snapshot of the step never comes
after its header, in mid-payload      skips it: what did not arrive whole is not mixed
after its payload                     mixes it: the exchange is as if it had lived
after arrival, before it applies      the same; what it would have made of it is nobody's
while it reads the partner's memory   gets its slot back when the loss is read
at a meeting, before its word         the meeting does without it: its word names who is left
at a meeting, after its word          the word may name it: what follows fails, and is repeated
within a collective                   all end it, say how it went, and repeat it from unchanged inputs unless all that
                                      are left have succeeded
while it saves                        its replica file is of nobody: the save is repeated by those that are left
====================================  =================================================================================

Two that live and whose link breaks both skip each other; where the break came after one had both payloads and before
the other had, the one has mixed and the other has not: the mean moves by that much, once.
"""

from __future__ import annotations

from dataclasses import dataclass

LOST, LEFT, JOINING, JOINED = "lost", "left", "joining", "joined"


class StepNotKnown(RuntimeError):
    """A step beyond the horizon: who takes part there is not known yet."""


@dataclass(frozen=True)
class Change:
    """One entry of the log.

    Attributes:
        number: of the entry, from 1.
        kind: ``"lost"``, ``"left"``, ``"joining"`` or ``"joined"``.
        seat: that it is about.
        incarnation: of that seat's process: it is the number of those that came before, or were expected.
        by: the rank that wrote it.
        step: of that rank's exchange clock; where it takes no part yet, the largest that a member has told.
        cause: in words.
    """

    number: int
    kind: str
    seat: int
    incarnation: int
    by: int
    step: int
    cause: str

    @property
    def ends(self) -> bool:
        """Whether the seat has no member after it."""
        return self.kind in (LOST, LEFT)

    def __str__(self) -> str:
        cause = f"({self.cause})" if self.ends else self.cause
        return f"rank {self.seat} {self.kind} at step {self.step:,} {cause}"


class Members:
    """Who takes part in a run, as one member knows it: the log that it has read, and its horizon.

    Args:
        seats: number of seats; all are members until the log says otherwise.
    """

    def __init__(self, seats: int) -> None:
        self.seats = seats
        self.changes: list[Change] = []
        self.horizon = 0
        self.folded = 0
        """Entries up to this number hold at every step."""
        self._from: list[int] = []
        """The step from which each entry holds, for those that have one; ascending."""
        self._now = _Present.at_first(seats)
        self._after = [(0, self._now)]
        """Who is there from a step on, by that step."""

    # -- who is there -------------------------------------------------------------------------------------------

    @property
    def present(self) -> tuple[int, ...]:
        """The seats that take part once all that was read holds, by seniority: nobody waits for another."""
        return self._now.seats

    @property
    def whole(self) -> tuple[int, ...]:
        """Those of :attr:`present` that are not joining still."""
        return self._now.whole

    def incarnation(self, seat: int) -> int:
        """Return the incarnation that is, or was last, the member at ``seat``."""
        return self._now.incarnations[seat]

    def last_change(self, seat: int) -> Change | None:
        """Return the last entry about ``seat``."""
        return next((change for change in reversed(self.changes) if change.seat == seat), None)

    def at(self, step: int) -> tuple[int, ...]:
        """Return the seats among which the exchanges of ``step`` are drawn, ascending: the same on all members.

        Raises:
            StepNotKnown: beyond the horizon.
        """
        return tuple(sorted(self._at(step).whole))

    def all_at(self, step: int) -> tuple[int, ...]:
        """Return the seats that take part in what all members do at ``step``, ascending: those that join, too.

        Raises:
            StepNotKnown: beyond the horizon.
        """
        return tuple(sorted(self._at(step).seats))

    def incarnation_at(self, step: int, seat: int) -> int:
        """Return the incarnation of ``seat`` that is meant at ``step``.

        Raises:
            StepNotKnown: beyond the horizon.
        """
        return self._at(step).incarnations[seat]

    def incarnations_of(self, number: int, seats: tuple[int, ...]) -> tuple[int, ...]:
        """Return the incarnations of ``seats`` by the first ``number`` entries of the log."""
        incarnations = self._by(number).incarnations
        return tuple(incarnations[seat] for seat in seats)

    def whole_by(self, number: int) -> tuple[int, ...]:
        """Return those that are not joining still by the first ``number`` entries of the log."""
        return self._by(number).whole

    # -- transitions --------------------------------------------------------------------------------------------

    def may_append(self, kind: str, seat: int, incarnation: int) -> bool:
        """Whether an entry would tell something new: each loss is declared once, each join follows a loss."""
        if kind == JOINING:
            return seat not in self.present and incarnation > self.incarnation(seat)
        if incarnation != self.incarnation(seat) or seat not in self.present:
            return False
        return kind != JOINED or seat not in self.whole

    def read(self, change: Change) -> None:
        """Take the next entry of the log.

        Raises:
            ValueError: if it is not the next, or tells nothing new: then somebody broke the protocol.
        """
        if change.number != len(self.changes) + 1:
            raise ValueError(f"entry {change.number} of the log was read after entry {len(self.changes)}")
        if not self.may_append(change.kind, change.seat, change.incarnation):
            raise ValueError(f"entry {change.number} of the log ({change}) contradicts those before it")
        self.changes.append(change)
        self._now = self._now.after(change)

    @property
    def without_step(self) -> Change | None:
        """The first entry of which it is not known from which step it holds."""
        return self.changes[len(self._from)] if len(self._from) < len(self.changes) else None

    def step_for(self, horizons: list[int]) -> int:
        """Return from which step :attr:`without_step` may hold, by the horizons of all seats."""
        return max([*horizons, self._from[-1] - 1 if self._from else 0]) + 1

    def step_of(self, number: int) -> int:
        """Return from which step entry ``number`` holds, which has one."""
        return self._from[number - 1]

    def hold_from(self, number: int, step: int) -> None:
        """Learn from which step entry ``number`` holds.

        Raises:
            ValueError: if it is not the turn of that entry, or the step comes before that of the one before it.
        """
        if number != len(self._from) + 1 or number > len(self.changes):
            raise ValueError(f"entry {number} of the log got its step after entry {len(self._from)}")
        if self._from and step < self._from[-1]:
            raise ValueError(f"entry {number} of the log holds from step {step}, before {self._from[-1]}")
        self._from.append(step)
        if number > self.folded:
            self._after.append((step, self._by(number)))

    def hold_horizon(self, step: int) -> None:
        """Draw rounds up to ``step`` from now on.

        Raises:
            ValueError: if an entry has no step yet: it might hold before ``step``.
        """
        if self.without_step is not None:
            raise ValueError(f"the horizon can not be held while entry {self.without_step.number} has no step")
        self.horizon = max(self.horizon, step)

    def fold(self, number: int) -> tuple[int, ...]:
        """Let the first ``number`` entries hold at every step, from a meeting on; return who is there then."""
        if number > self.folded:
            self.folded = number
            later = [(start, self._by(n)) for n, start in enumerate(self._from, start=1) if n > number]
            self._after = [(0, self._by(number)), *later]
        return self._by(number).seats

    def _at(self, step: int) -> _Present:
        if step > self.horizon:
            raise StepNotKnown(f"who takes part at step {step} is not known: the horizon is {self.horizon}")
        return next(present for start, present in reversed(self._after) if start <= step)

    def _by(self, number: int) -> _Present:
        present = _Present.at_first(self.seats)
        for change in self.changes[:number]:
            present = present.after(change)
        return present


@dataclass(frozen=True)
class _Present:
    """Who is there: by seniority, with the incarnation of every seat."""

    seats: tuple[int, ...]
    whole: tuple[int, ...]
    incarnations: tuple[int, ...]

    @classmethod
    def at_first(cls, seats: int) -> _Present:
        everybody = tuple(range(seats))
        return cls(everybody, everybody, (0,) * seats)

    def after(self, change: Change) -> _Present:
        seat = change.seat
        incarnations = (*self.incarnations[:seat], change.incarnation, *self.incarnations[seat + 1 :])
        if change.kind == JOINING:
            return _Present((*self.seats, seat), self.whole, incarnations)
        if change.kind == JOINED:
            return _Present(self.seats, (*self.whole, seat), incarnations)
        seats, whole = (tuple(k for k in these if k != seat) for these in (self.seats, self.whole))
        return _Present(seats, whole, incarnations)
