"""How members whose replicas have one start take in one that joins: all together, between the same two steps (§12).

Under gossip a donor takes in a guest at the end of any step of its own (``members``). Where all begin each round from
one start, the joiner has to have it too, and with it every round that was made: so all members have to count it from
the same step on, and the donor's snapshot has to lie right before that step. Both follow from a meeting.

=======================================  ==============================================================================
what                                     who does it, and what follows
=======================================  ==============================================================================
a process asks                           the first member that is whole calls for the taking in (``calls``): all
                                         members stop at the end of one step, soon, and go on where they disagree
they meet for it                         what is in flight has arrived on all, before that; clocks are one clock, c;
                                         what the log held then holds at every step
the first member that is whole by that   appends "joining", where it can serve its state here, and gives its word: the
log is the donor                         number of that entry, or 0
the others                               wait for the word, and let the log hold up to that entry: rounds from step
                                         c + 1 on count the joiner, on all alike, and meetings do
the donor                                copies its state, with the rounds in flight, which are all of steps up to c
                                         and count no joiner; and serves it beside training
the joiner                               loads it; its clock is c, its first step is c + 1. It is waited for in the
                                         first round from there on, as anybody is that is slow
=======================================  ==============================================================================

**Who dies, and when:**

=======================================  ==============================================================================
it dies                                  the others
=======================================  ==============================================================================
the donor, before the meeting            the next one is the donor; the call holds
the donor, at it, before its word        whoever reads that it is lost gives the word 0 in its place. Where "joining"
                                         stands in the log already, the joiner appends that it has left, asks again as
                                         the next incarnation, and rounds that count it meanwhile are dropped
the donor, after its word, before the    the same; rounds of those steps that count the joiner are dropped, up to the
joiner has its state                     next meeting at the latest, which comes when it is taken in again
the joiner, at any moment                it is declared lost: a round that counts it is dropped, as with any member
another member                           meetings and the word go on without it
the donor can not serve here             its word is 0, and it calls again when it can: an epoch's last step is none
                                         between two of the same epoch
=======================================  ==============================================================================
"""

from __future__ import annotations

from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.members import Change

TAKING_IN = "one that joins"
"""For what members meet, and call."""


def take_in_together(control: MemberControl, can_serve: bool) -> Change | None:
    """Take in one that asks, on all members alike, which have met for that and made no step since.

    Args:
        control: of this rank.
        can_serve: whether one could go on from this rank's present state.

    Returns:
        On the donor, the entry of the one whom it is to serve its state, as it is now; else None.

    Raises:
        RunStopped: as :meth:`MemberControl.check`.
    """
    entries: list[Change] = []

    def own() -> str:
        if can_serve and (entry := control.take_in()) is not None:
            entries.append(entry)
            return str(entry.number)
        return "0"

    if number := int(control.word_of(control.donor, own, otherwise="0")):
        control.hold(number)
    return next((entry for entry in entries if entry.number == number), None)
