"""Votes of members on what they did together, and which all of them keep or none: the result of an all-reduce.

**In the store**, for each question: a key of every member that says yes, and the word, ``yes`` or ``no``, written once
by compare and set, so that all read the same.

==============================  =======================================================================================
a member                        writes
==============================  =======================================================================================
has what it takes               its ``yes``; from then on it never says no
has it not, and never will      the word ``no``, unless there is a word: then nobody keeps it, whoever said yes
finds all members' ``yes``,     the word ``yes``, unless there is a word
but for those that are lost
reads the word                  nothing; it keeps, or drops
reads ``yes``, and has it not   nothing: it was declared lost, and ends
==============================  =======================================================================================

A member may die at any of these points: its ``yes`` is there or it is lost, and whoever reads so writes the word in its
place. A word ``no`` may be that of a dead one; it holds. There is no word ``yes`` without the result on all that live
and take part, for whoever lives and has not said yes is waited for until it is declared lost.

Questions come one after another, in one order on all. Who says yes to one has read the words before it: once a word is
``yes``, everybody removes the keys that it wrote for earlier ones.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch.distributed import Store

from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.run import LOOK
from lightning_gossip.control.store import value_of

_ENDED = 2.0
"""Seconds between looks whether one that is waited for has ended without a word."""


@dataclass(frozen=True)
class Word:
    """What all do.

    Attributes:
        kept: whether they keep what the question is about.
        by: who said no; -1 where nobody did.
        why: it did, in words.
    """

    kept: bool
    by: int = -1
    why: str = ""

    def encoded(self) -> str:
        """Return the word as it stands in the store."""
        return "yes" if self.kept else f"no|{self.by}|{self.why}"

    @classmethod
    def decoded(cls, text: bytes) -> Word:
        """Return what :meth:`encoded` returned."""
        kind, *no = text.decode().split("|", 2)
        return cls(True) if kind == "yes" else cls(False, int(no[0]), no[1])


def awaited(members: Collection[int], lost: Collection[int]) -> tuple[int, ...]:
    """Return those of ``members`` with whose yes the word is ``yes``, ascending."""
    return tuple(sorted({*members} - {*lost}))


class Votes:
    """One rank's part in votes; used by one thread.

    Args:
        store: of the run, on a connection that nobody blocks.
        control: of this rank.
    """

    def __init__(self, store: Store, control: MemberControl) -> None:
        self.store = store
        self.control = control
        self._written: list[str] = []  # by this rank, for questions whose word was read

    def on(self, question: str, members: Mapping[int, int]) -> Vote:
        """Return the next vote; ``question`` is asked once in a run, of ``members``: by rank, which process of it."""
        return Vote(self, f"vote/{question}", members)

    def end(self, word: Word, written: list[str]) -> None:
        """Take the word on a question for which this rank wrote keys; remove those that nobody reads any more."""
        if word.kept:
            for key in self._written:
                self.store.delete_key(key)
            self._written.clear()
        self._written += written


class Vote:
    """One rank's vote on one question.

    Args:
        votes: of this rank.
        key: of the question.
        members: who votes: by rank, which process of it. One that comes to its seat later has no part in it.
    """

    def __init__(self, votes: Votes, key: str, members: Mapping[int, int]) -> None:
        self._votes = votes
        self._store, self._control = votes.store, votes.control
        self._key = key
        self._members = members
        self._written: list[str] = []
        self._pause = threading.Event()

    def look(self) -> Word | None:
        """Return the word, if there is one."""
        found = value_of(self._store, f"{self._key}/word")
        return None if found is None else Word.decoded(found)

    def say_no(self, why: str) -> Word:
        """Say that this rank has not what it takes; return the word that holds."""
        return self._end(Word(False, self._control.rank, why))

    def say_yes(self, gives_up: Callable[[], bool]) -> Word | None:
        """Say yes, and return the word once it is there; None where the run ends for this rank, or it ``gives_up``."""
        mine = self._yes(self._control.rank)
        self._store.set(mine, "1")
        self._written.append(mine)
        pause, again = 0.0001, time.monotonic() + _ENDED
        while (word := self.look()) is None:
            lost = [rank for rank, incarnation in self._members.items() if self._control.is_lost(rank, incarnation)]
            if self._control.stopped is not None or self._control.rank in lost or gives_up():
                return None
            waiting = awaited(self._members, lost)
            if self._store.check([self._yes(rank) for rank in waiting]):
                return self._end(Word(True))
            if time.monotonic() > again:
                self._control.declare_ended([rank for rank in waiting if not self._store.check([self._yes(rank)])])
                again = time.monotonic() + _ENDED
            self._pause.wait(pause)
            pause = min(1.5 * pause, LOOK / 10)
        self._votes.end(word, self._written)
        return word

    def _end(self, word: Word) -> Word:
        key = f"{self._key}/word"
        held = Word.decoded(self._store.compare_set(key, "", word.encoded()))
        self._votes.end(held, [*self._written, key])
        return held

    def _yes(self, rank: int) -> str:
        return f"{self._key}/yes/{rank}"
