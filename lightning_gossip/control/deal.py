"""Work dealt on demand: every rank takes the next batch of an epoch when it has need of one (design §11).

The batches of an epoch are numbered, in the same order on all ranks. A *deck* says which of them are dealt; a *draw* is
a position in it. The first draws are handed out: the member at position i has draw i. All further ones are taken from a
counter in the run's store, by atomic adds. This file knows that as plain data and transitions, without a store and
threads: :mod:`.dealer` brings them together.

**States of a batch:**

=========  =============================================  ==========================================================
state      how it comes to it                             who knows
=========  =============================================  ==========================================================
in deck    at the beginning                               everybody: the counter has not reached it
held       handed out, or the counter has passed it       the rank that drew it
issued     its rank's loader was told to load it          that rank: still held by it until trained
trained    its rank has ended the batch's step            that rank
lost       its rank was lost while it held it             nobody; it is missing in this epoch
left       a checkpoint was saved while it was held       everybody, after a resume: the next deck begins with it
=========  =============================================  ==========================================================

**Events**, and what a rank does:

================================  =====================================================================================
event                             what it does
================================  =====================================================================================
it begins an epoch                writes the deck to the store, unless another has; takes what is there, and its draw
its loader asks for a batch       issues the next one that it holds, once it knows whether there is another after that:
                                  so the last batch of an epoch is known as such before its step
it holds too few                  asks the counter, beside training: it holds up to two that are not issued, so that
                                  the answer is there in time; near the end of the deck one
the counter is past the deck      has none after those that it holds
a loader is iterated anew in the  issues again what it holds, then goes on: nothing is lost with a loader that is
same epoch                        iterated twice, as Lightning does
it is lost                        what it holds is lost with it; the counter goes on for the others
a process joins in mid-epoch      finds the deck in the store, and has draws of the counter only: what was handed out to
                                  its seat is that of the process before it
a checkpoint is saved             all meet; what each holds and where the counter stands is the next deck, whoever
                                  and how many resume
================================  =====================================================================================
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

AHEAD = 2
"""Batches that a rank holds beyond those that it has issued: the answer to a question takes less than a step."""

TAIL = 3
"""Batches that a rank would still draw, at its pace, where it begins to hold one only."""


@dataclass(frozen=True)
class Deck:
    """Which batches of an epoch are dealt, and to whom the first of them.

    Attributes:
        total: batches of the epoch.
        members: ranks that each have one of the first draws.
        first: batches below this number were dealt before, in a run that this one goes on with.
        left: those of them that nobody has trained, ascending.
        seed: of the order.
        mark: tells batches apart that ought to be the same on all ranks.
    """

    total: int
    members: tuple[int, ...]
    first: int = 0
    left: tuple[int, ...] = ()
    seed: int = 0
    mark: int = 0

    @property
    def size(self) -> int:
        """Number of draws."""
        return len(self.left) + max(0, self.total - self.first)

    def number(self, draw: int) -> int | None:
        """Return which batch is at a draw; None past the deck."""
        if draw < len(self.left):
            return self.left[draw]
        return self.first + draw - len(self.left) if draw < self.size else None

    def draw_of(self, rank: int) -> int | None:
        """Return the draw that is handed out to ``rank``; None where it takes from the counter only."""
        return self.members.index(rank) if rank in self.members else None

    def draw_at(self, count: int) -> int:
        """Return the draw of the ``count``-th add to the counter, from 1."""
        return len(self.members) + count - 1

    def rest(self, count: int, held: Iterable[int]) -> dict[str, Any]:
        """Return what is left once the counter stands at ``count``: for :meth:`resumed`, as plain values.

        Args:
            count: adds to the counter.
            held: batches that were drawn and not trained, of all ranks.
        """
        drawn = min(self.size, len(self.members) + count)
        left = sorted({*held, *self.left[drawn:]})
        return {"first": min(self.total, self.first + max(0, drawn - len(self.left))), "left": left}

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Deck:
        """Return what :meth:`to_json` made text of."""
        values = json.loads(text)
        return cls(**values | {"members": tuple(values["members"]), "left": tuple(values["left"])})


class Hand:
    """What one rank has drawn from a deck.

    Args:
        deck: the same on all ranks.
        rank: of this process, whose draw it takes that is handed out; None where it was not there then.

    Attributes:
        issued: numbers of the batches that the loader was told to load, in this order.
        asking: whether a question to the counter is under way.
        exhausted: whether nothing is left in the deck for this rank.
    """

    def __init__(self, deck: Deck, rank: int | None) -> None:
        self.deck = deck
        self.issued: list[int] = []
        self.asking = False
        self.exhausted = False
        self._held: deque[tuple[int, int]] = deque()  # draw and number of those that are not issued
        self._end = deck.size
        self._last = -1  # draw that was taken last
        self._stride = len(deck.members)  # draws, by whomever, from one of this rank's to the next
        if rank is not None and (draw := deck.draw_of(rank)) is not None:
            self._take(draw)

    @property
    def wants(self) -> bool:
        """Whether it is time to ask the counter."""
        in_tail = self._end - 1 - self._last <= TAIL * self._stride
        return not self.asking and not self.exhausted and len(self._held) < (1 if in_tail else AHEAD)

    @property
    def knows_next(self) -> bool:
        """Whether it is known if there is another batch."""
        return bool(self._held) or self.exhausted

    @property
    def ended(self) -> bool:
        """Whether the batch that was issued last is the last one."""
        return self.exhausted and not self._held

    def ask(self) -> None:
        """Note that the counter is asked."""
        self.asking = True

    def answer(self, count: int) -> None:
        """Take the draw at which the counter's answer is."""
        self.asking = False
        self._take(self.deck.draw_at(count))

    def issue(self) -> int | None:
        """Return the number of the next batch, None where there is none; only where :attr:`knows_next`."""
        if not self._held:
            return None
        _, number = self._held.popleft()
        self.issued.append(number)
        return number

    def held(self, trained: int) -> list[int]:
        """Return the numbers of the batches drawn, but for the first ``trained`` that were issued."""
        return [*self.issued[trained:], *(number for _, number in self._held)]

    def issue_again(self, trained: int) -> None:
        """Begin to issue anew, with those that are not trained: their loader is given up."""
        again, self.issued = self.issued[trained:], []
        self._held.extendleft((-1, number) for number in reversed(again))

    def even_out(self) -> None:
        """End the deck where every member has as many as the others, if all draw at one pace."""
        self._end = len(self.deck.members) * (self.deck.size // len(self.deck.members))
        self._held = deque((draw, number) for draw, number in self._held if draw < self._end)
        self.exhausted = self.exhausted or self._last >= self._end - 1

    def _take(self, draw: int) -> None:
        self._stride = max(len(self.deck.members), draw - self._last)
        self._last = draw
        number = self.deck.number(draw)
        if number is None or draw >= self._end:
            self.exhausted = True
        else:
            self._held.append((draw, number))
