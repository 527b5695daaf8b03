"""How two ranks come to an exchange for which neither waits: the protocol of asynchronous gossip (design §11).

A rank *asks* another on a link of its own, on which that one only answers; so there are two links between two ranks
that ask each other. Everything here is one rank's side of it, as plain data and transitions: no thread, no link.

**Words**, on the link of the rank that asks (the *leader* of the exchange):

=========  =================  =========================================================================================
word       said by            it means
=========  =================  =========================================================================================
hello      the leader         nothing: the link is made before it is needed
ask        the leader         "my snapshot is taken: exchange it with me"
answer     the asked          "so is mine". And, where the asked one had asked the leader at the same time, the number
                              of that ask: it is void
busy       the asked          "I am in another exchange, or at a meeting": the leader may ask somebody else
crossed    the asked, lower   "I have asked you at the same time: that ask, of the lower rank, counts", or did. With its
                              number: where the leader has said busy to it before it asked, that means busy
go         the leader         "exchange them": both payloads follow, each way
void       the leader         "you were long silent, and I have turned to others": nothing was agreed
go         the leader         "exchange them": both payloads follow, each way
void       the leader         "you were long silent, and I have turned to others": nothing was agreed
payload    both               the snapshot
held       both               "I have yours whole": whoever holds the other's, and hears this, applies the exchange
=========  =================  =========================================================================================

**States of a rank** under elastic gossip, where a snapshot serves one exchange, and what it says to an ask of j:

==============  ===================================  ==================================================================
state           how it comes to it                   an ask of j
==============  ===================================  ==================================================================
idle            at the beginning; *applied*          answering j; at a meeting: busy
asking k        its own round, and it is idle        of k: crossed, or if k is lower, answer: answered k. Of another:
                                                     if that is lower, j waits until k has spoken, else busy
expecting k     k said crossed                       of k: answer: answered k; else busy
answering k     k asked: its snapshot is now taken   busy
answered k      it has answered                      busy
trading k       it said go, or heard it              busy
holding k       k's payload is whole: it says held   busy
agreed k        k said held                          busy, until it has applied the exchange at the end of its step
==============  ===================================  ==================================================================

Where k says busy, the first of those that wait has its exchange with this rank; where k answers, all that wait hear
busy. Where k says nothing for long (it is stopped, or not there yet), this rank *withdraws*, as if k had said busy, and
says void to what comes in the end. Who waits is lower than whom it waits for, so that nobody waits in a circle; and as
they wait in helper threads, training waits for nothing of all this.

**Who is gone, and when**, and what its partner does:

==========================  ===========================================================================================
while the partner is        the rank
==========================  ===========================================================================================
asking, expecting,          is idle again (or takes who waits): nothing was agreed, nothing is applied
answering, answered,
trading
holding                     lost for good: applies, for it has both snapshots, and no one else is left to disagree.
                            Where the link broke between two that live: idle, as the other end is most likely
agreed                      applies
==========================  ===========================================================================================

So both apply the same pair of snapshots, or neither. One case is left: the link of two that live breaks (they then give
up the other too) when one end has heard held and the other has not yet; the mean of the replicas moves by that, once.

*Pull* and *push* need no agreement: any number may ask, and the mean is not kept by these rules. The leader's side is
the same; the asked one answers whatever it is in (*busy* at a meeting), and only one payload travels: under pull the
asked one's, which changes nothing there, under push the leader's, which the asked one mixes at the end of its step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple


class Word(IntEnum):
    """What is said on a link; the kind of its header."""

    ASK = 32
    ANSWER = 33
    BUSY = 34
    CROSSED = 35
    PAYLOAD = 36
    HELD = 37
    GO = 38
    VOID = 39
    HELLO = 40


class Phase(Enum):
    """What a rank is at; see the table above."""

    IDLE = "idle"
    ASKING = "asking"
    EXPECTING = "expecting"
    ANSWERING = "answering"
    ANSWERED = "answered"
    TRADING = "trading"
    HOLDING = "holding"
    AGREED = "agreed"


class Say(NamedTuple):
    """A word to ``to``, on the link of ``leader``; ``number``: of the ask, or of the own one that crossed it."""

    to: int
    word: Word
    leader: int
    number: int = 0


class Step(NamedTuple):
    """What a transition leads to, and what is said."""

    side: Side
    says: tuple[Say, ...] = ()


@dataclass(frozen=True)
class Side:
    """One rank's side of its exchanges.

    What is heard of an exchange that is no more changes nothing: a link may bring it late.

    Attributes:
        rank: of this side.
        phase: what it is at.
        partner: with whom; -1 when idle.
        leads: whether the exchange is the one for which this rank asked.
        waiting: ranks that have asked, and are answered once ``partner`` has spoken.
        away: whether it is at a meeting, and takes part in nothing new.
        asks: how often it has asked: what is said to an ask of before, as *crossed* may be late, is not said to this.
        heard: by rank, the number of its last ask that was heard, or is void: that may come late too.
    """

    rank: int
    phase: Phase = Phase.IDLE
    partner: int = -1
    leads: bool = False
    waiting: tuple[int, ...] = ()
    away: bool = False
    asks: int = 0
    heard: tuple[tuple[int, int], ...] = ()

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def is_free(self) -> bool:
        """Whether it may ask."""
        return self.phase is Phase.IDLE and not self.away

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way with anybody: it is idle, or has only to apply."""
        return self.phase in (Phase.IDLE, Phase.AGREED)

    def is_with(self, partner: int, leads: bool) -> bool:
        """Whether it is in an exchange with ``partner`` over the link of this rank (``leads``), or of that one."""
        over_own = self.leads or self.phase is Phase.ASKING
        return self.partner == partner and self.phase is not Phase.IDLE and over_own == leads

    # -- this rank's own doing ----------------------------------------------------------------------------------

    def ask(self, partner: int) -> Step:
        """Ask; the snapshot is taken.

        Raises:
            ValueError: if it is not free.
        """
        if not self.is_free:
            raise ValueError(f"rank {self.rank} can not ask rank {partner}: it is {self}")
        side = replace(self, phase=Phase.ASKING, partner=partner, leads=True, asks=self.asks + 1)
        return Step(side, (Say(partner, Word.ASK, self.rank, side.asks),))

    def taken(self) -> Step:
        """Answer: the snapshot for which somebody asked is taken."""
        return self._answer(self.partner) if self.phase is Phase.ANSWERING else Step(self)

    def withdraw(self) -> Step:
        """Wait no more for what the other says to an ask."""
        return self._turn_to_waiting() if self.phase in (Phase.ASKING, Phase.EXPECTING) else Step(self)

    def decline(self) -> Step:
        """Take no snapshot for who asked: this rank is at a meeting."""
        if self.phase is not Phase.ANSWERING:
            return Step(self)
        return Step(self._idle(), (Say(self.partner, Word.BUSY, self.partner),))

    def applied(self) -> Side:
        """Be idle again, once the exchange that was agreed is applied."""
        return self._idle() if self.phase is Phase.AGREED else self

    def leave(self) -> Step:
        """Begin nothing new from now on: a meeting comes."""
        side = replace(self, away=True, waiting=())
        return Step(side, tuple(Say(rank, Word.BUSY, rank) for rank in self.waiting))

    def come_back(self) -> Side:
        """Take part again."""
        return replace(self, away=False)

    # -- what it hears --------------------------------------------------------------------------------------------

    def hear_ask(self, asker: int, number: int) -> Step:
        """Hear that ``asker`` asks, for the time of that number."""
        if number <= self._heard_of(asker):
            return Step(self, (Say(asker, Word.CROSSED, asker),))
        return self._having_heard(asker, number)._reply(asker)

    def _reply(self, asker: int) -> Step:
        if self.phase is Phase.EXPECTING and asker == self.partner:
            return self._answer(asker)
        if self.phase is Phase.ASKING:
            if asker == self.partner:
                if asker < self.rank:
                    return self._answer(asker, void=self.asks)
                return Step(self, (Say(asker, Word.CROSSED, asker, self.asks),))
            if asker < self.rank and not self.away:
                return Step(replace(self, waiting=(*self.waiting, asker)))
        if self.is_free:
            return Step(replace(self, phase=Phase.ANSWERING, partner=asker, leads=False))
        return Step(self, (Say(asker, Word.BUSY, asker),))

    def hear_reply(self, word: Word, sender: int, asks: int, number: int = 0) -> Step:
        """Hear what ``sender`` says to the ask of that number: answer, busy or crossed.

        With it comes the number of the sender's own ask that crossed it; 0 for none.
        """
        if word is Word.ANSWER:
            side = self._having_heard(sender, number)
            if self._asks_for(sender, asks):
                return side._lead(sender)
            return Step(side, (Say(sender, Word.VOID, self.rank),))
        if not self._asks_for(sender, asks):
            return Step(self)
        if word is Word.BUSY or number <= self._heard_of(sender):
            return self._turn_to_waiting()
        expecting = replace(self, phase=Phase.EXPECTING, leads=False, waiting=())
        return Step(expecting, self._busy_to_waiting())

    def hear(self, word: Word, sender: int, leader: int) -> Step:
        """Hear another word of ``sender``, on the link of ``leader``, which is this rank or that one."""
        leads = leader == self.rank
        if self.is_with(sender, leads):
            if word is Word.GO and self.phase is Phase.ANSWERED:
                return Step(replace(self, phase=Phase.TRADING), (Say(sender, Word.PAYLOAD, leader),))
            if word is Word.VOID and self.phase is Phase.ANSWERED:
                return Step(self._idle())
            if word is Word.PAYLOAD and self.phase is Phase.TRADING:
                return Step(replace(self, phase=Phase.HOLDING), (Say(sender, Word.HELD, leader),))
            if word is Word.HELD and self.phase is Phase.HOLDING:
                return Step(replace(self, phase=Phase.AGREED))
        return Step(self)

    def lose(self, rank: int) -> Step:
        """Learn that ``rank`` is lost for good."""
        without = replace(self, waiting=tuple(k for k in self.waiting if k != rank))
        if self.partner != rank or self.phase is Phase.AGREED:
            return Step(without)
        if self.phase is Phase.HOLDING:
            return Step(replace(without, phase=Phase.AGREED))
        return without._turn_to_waiting()

    def part(self, rank: int) -> Step:
        """Learn that the links with ``rank`` are broken, both, while both live."""
        side = replace(self, waiting=tuple(k for k in self.waiting if k != rank))
        if self.partner != rank or self.phase is Phase.AGREED:
            return Step(side)
        return side._turn_to_waiting()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _asks_for(self, partner: int, asks: int) -> bool:
        return self.phase is Phase.ASKING and (self.partner, self.asks) == (partner, asks)

    def _answer(self, asker: int, void: int = 0) -> Step:
        others = replace(self, waiting=tuple(k for k in self.waiting if k != asker))
        side = replace(self, phase=Phase.ANSWERED, partner=asker, leads=False, waiting=())
        return Step(side, (Say(asker, Word.ANSWER, asker, void), *others._busy_to_waiting()))

    def _lead(self, partner: int) -> Step:
        side = replace(self, phase=Phase.TRADING, waiting=())
        says = Say(partner, Word.GO, self.rank), Say(partner, Word.PAYLOAD, self.rank)
        return Step(side, (*says, *self._busy_to_waiting()))

    def _heard_of(self, rank: int) -> int:
        return dict(self.heard).get(rank, 0)

    def _having_heard(self, rank: int, number: int) -> Side:
        known = {**dict(self.heard), rank: max(number, self._heard_of(rank))}
        return replace(self, heard=tuple(sorted(known.items())))

    def _turn_to_waiting(self) -> Step:
        """Exchange with the first of those that wait, where there is one: the snapshot is there."""
        if self.waiting:
            return self._answer(self.waiting[0])
        return Step(self._idle())

    def _busy_to_waiting(self) -> tuple[Say, ...]:
        return tuple(Say(rank, Word.BUSY, rank) for rank in self.waiting)

    def _idle(self) -> Side:
        return replace(self, phase=Phase.IDLE, partner=-1, leads=False, waiting=())
