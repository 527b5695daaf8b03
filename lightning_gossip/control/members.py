"""Members of a run: who takes part, from which step that holds, and what everybody does at a death (design §10).

A run has *seats*, numbered as ranks are; a *member* is a seat whose process takes part. This file knows the protocol as
plain data and transitions; ``member_log`` brings them together with the run's store, ``member_control`` with a rank's
threads.

**What is in the store.** One log, to which whoever sees a change appends it: entry n is written by compare and set, by
who has read those before it, so that no loss is declared twice. One step an entry, from which it holds (also by compare
and set). And of each member: its process, its heartbeat, its horizon, the meeting at which it waits.

**States of a seat**, and what the others do with it:

=========  ========================================  =================================================================
state      how a seat comes to it                    what the others do
=========  ========================================  =================================================================
empty      at the beginning; nobody has come         wait, until the start's time is over: then it is declared lost
member     its process came before that; or, later,  draw it in every round, wait for it as long as it gives a sign
           a joiner's entry holds                    of life
lost       an entry of the log says so (it ended, it draw it until the entry holds, and skip it; never wait for it;
           left, or gave no sign of life)            meetings and collectives that begin now do without it
gone       that entry holds, by step or by meeting   draw among those that are left
joining    its process has come to a seat that was   nothing, but for one donor; it is drawn from the step on from
           lost; a donor serves it (not built yet)   which its own entry holds, under the next incarnation
=========  ========================================  =================================================================

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
the own loss stands in the log      end, and say so: never go on beside what the others have done without it
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

LOST, LEFT, JOINED = "lost", "left", "joined"


class StepNotKnown(RuntimeError):
    """A step beyond the horizon: who takes part there is not known yet."""


@dataclass(frozen=True)
class Change:
    """One entry of the log.

    Attributes:
        number: of the entry, from 1.
        kind: ``"lost"``, ``"left"`` or ``"joined"``.
        seat: that it is about.
        incarnation: of that seat: how many processes have come to it before.
        by: the rank that wrote it.
        step: of that rank's exchange clock.
        cause: in words.
    """

    number: int
    kind: str
    seat: int
    incarnation: int
    by: int
    step: int
    cause: str

    def __str__(self) -> str:
        return f"rank {self.seat} {self.kind} at step {self.step:,} ({self.cause})"


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
        self._present = tuple(range(seats))
        self._incarnations = [0] * seats
        self._lists: list[tuple[int, tuple[int, ...]]] = [(0, self._present)]
        """Members by the step from which on they are."""

    # -- who is there -------------------------------------------------------------------------------------------

    @property
    def present(self) -> tuple[int, ...]:
        """The seats that take part once all that was read holds, ascending: nobody waits for another."""
        return self._present

    def incarnation(self, seat: int) -> int:
        """Return how many processes have come to ``seat`` before the one that is, or was last, its member."""
        return self._incarnations[seat]

    def last_change(self, seat: int) -> Change | None:
        """Return the last entry about ``seat``."""
        return next((change for change in reversed(self.changes) if change.seat == seat), None)

    def at(self, step: int) -> tuple[int, ...]:
        """Return the seats among which the round of ``step`` is drawn, ascending: the same on all members.

        Raises:
            StepNotKnown: beyond the horizon.
        """
        if step > self.horizon:
            raise StepNotKnown(f"who takes part at step {step} is not known: the horizon is {self.horizon}")
        return next(seats for start, seats in reversed(self._lists) if start <= step)

    def after(self, number: int) -> tuple[int, ...]:
        """Return who is there by the first ``number`` entries of the log."""
        return self._fold(range(self.seats), self.changes[:number])

    # -- transitions --------------------------------------------------------------------------------------------

    def may_append(self, kind: str, seat: int, incarnation: int) -> bool:
        """Whether an entry would tell something new: each loss is declared once, each join follows a loss."""
        if kind == JOINED:
            return seat not in self._present and incarnation == self._incarnations[seat] + 1
        return seat in self._present and incarnation == self._incarnations[seat]

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
        self._incarnations[change.seat] = change.incarnation
        self._present = self._fold(self._present, [change])

    @property
    def without_step(self) -> Change | None:
        """The first entry of which it is not known from which step it holds."""
        return self.changes[len(self._from)] if len(self._from) < len(self.changes) else None

    def step_for(self, horizons: list[int]) -> int:
        """Return from which step :attr:`without_step` may hold, by the horizons of all seats."""
        return max([*horizons, self._from[-1] - 1 if self._from else 0]) + 1

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
            self._lists.append((step, self.after(number)))

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
            later = [(start, self.after(n)) for n, start in enumerate(self._from, start=1) if n > number]
            self._lists = [(0, self.after(number)), *later]
        return self.after(number)

    @staticmethod
    def _fold(present: tuple[int, ...] | range, changes: list[Change]) -> tuple[int, ...]:
        seats = set(present)
        for change in changes:
            (seats.add if change.kind == JOINED else seats.discard)(change.seat)
        return tuple(sorted(seats))
