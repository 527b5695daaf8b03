"""Every interleaving of two and three ranks that ask one another: both apply an exchange or neither, nobody hangs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from lightning_gossip.exchange.agreement import Phase, Say, Side, Word

Channel = tuple[int, int, int]
"""Leader of the link, sender, receiver."""


@dataclass(frozen=True)
class World:
    """Some ranks, what is on the wire between them, and what they have applied so far.

    Attributes:
        sides: of the ranks; None for one that is dead.
        asks: whom each still asks, in its next rounds.
        wire: what is under way, in order, by channel.
        unreplied: numbers of asks that were not replied to, in order, by asker and asked.
        at: the exchange (leader, number of its ask) that each trades in, or has.
        applied: exchanges, by rank.
        deaths, leaves, breaks, withdrawals: how many may still come.
        unknown: pairs (rank, dead one) where the rank has not learned of the loss.
    """

    sides: tuple[Side | None, ...]
    asks: tuple[tuple[int, ...], ...]
    wire: tuple[tuple[Channel, tuple[tuple[Word, int], ...]], ...] = ()
    unreplied: tuple[tuple[tuple[int, int], tuple[int, ...]], ...] = ()
    at: tuple[tuple[int, int] | None, ...] = ()
    applied: tuple[frozenset[tuple[int, int]], ...] = ()
    deaths: int = 0
    leaves: int = 0
    breaks: int = 0
    withdrawals: int = 0
    unknown: frozenset[tuple[int, int]] = frozenset()
    one_sided: bool = False

    def channels(self) -> dict[Channel, tuple[tuple[Word, int], ...]]:
        return dict(self.wire)


def put(values: tuple, index: int, value: object) -> tuple:
    return (*values[:index], value, *values[index + 1 :])


def after(world: World, rank: int, side: Side, says: tuple[Say, ...] = ()) -> World:
    """The world once ``rank`` has come to ``side`` and said ``says``."""
    before = world.sides[rank]
    assert before is not None
    at = world.at
    if side.phase is Phase.TRADING and (before.phase, before.partner) != (Phase.TRADING, side.partner):
        leader = rank if side.leads else side.partner
        leading = side if side.leads else world.sides[leader]
        at = put(at, rank, (leader, leading.asks if leading else -1))
    wire = world.channels()
    for to, word, leader, number in says:
        if world.sides[to] is not None:
            channel = (leader, rank, to)
            wire[channel] = (*wire.get(channel, ()), (word, number))
    kept = tuple(sorted((channel, words) for channel, words in wire.items() if words))
    return replace(world, sides=put(world.sides, rank, side), at=at, wire=kept)


def drop(world: World, sender: int, receiver: int) -> World:
    return replace(world, wire=tuple((c, words) for c, words in world.wire if c[1:] != (sender, receiver)))


def moves(world: World) -> Iterator[World]:
    """Everything that may happen next."""
    for rank, side in enumerate(world.sides):
        if side is None:
            continue
        if side.is_free and world.asks[rank]:
            target, *rest = world.asks[rank]
            next_world = replace(world, asks=put(world.asks, rank, tuple(rest)))
            if (rank, target) in world.unknown or world.sides[target] is not None:
                unreplied = dict(world.unreplied)
                unreplied[rank, target] = (*unreplied.get((rank, target), ()), side.asks + 1)
                next_world = replace(next_world, unreplied=tuple(sorted(unreplied.items())))
                yield after(next_world, rank, *side.ask(target))
            else:
                yield next_world  # who is known to be lost is not asked
        if side.phase is Phase.ANSWERING:
            yield after(world, rank, *side.taken())
            if side.away:
                yield after(world, rank, *side.decline())
        if side.phase is Phase.AGREED:
            exchange = world.at[rank]
            assert exchange not in {None, *world.applied[rank]}, "applied twice"
            applied = put(world.applied, rank, world.applied[rank] | {exchange})
            yield after(replace(world, applied=applied), rank, side.applied())
        if world.withdrawals and side.phase in (Phase.ASKING, Phase.EXPECTING):
            yield after(replace(world, withdrawals=world.withdrawals - 1), rank, *side.withdraw())
        if world.leaves and not side.away:
            yield after(replace(world, leaves=world.leaves - 1), rank, *side.leave())
        if world.deaths:
            dead = replace(world, deaths=world.deaths - 1, sides=put(world.sides, rank, None))
            dead = replace(dead, wire=tuple((c, words) for c, words in dead.wire if c[2] != rank))
            others = {(k, rank) for k, other in enumerate(dead.sides) if other is not None}
            yield replace(dead, unknown=dead.unknown | others)
    for rank, lost in world.unknown:
        if (side := world.sides[rank]) is not None:
            known = replace(drop(world, lost, rank), unknown=world.unknown - {(rank, lost)})
            yield after(known, rank, *side.lose(lost))
    for channel, words in world.wire:
        (word, number), later = words[0], words[1:]
        leader, sender, receiver = channel
        side = world.sides[receiver]
        assert side is not None
        left = replace(world, wire=tuple((c, later if c == channel else on_it) for c, on_it in world.wire))
        left = replace(left, wire=tuple(item for item in left.wire if item[1]))
        if word in (Word.ANSWER, Word.BUSY, Word.CROSSED):
            unreplied = dict(world.unreplied)
            asks, *after_it = unreplied[receiver, sender]
            unreplied[receiver, sender] = tuple(after_it)
            left = replace(left, unreplied=tuple(sorted(pair for pair in unreplied.items() if pair[1])))
            yield after(left, receiver, *side.hear_reply(word, sender, asks, number))
        elif word is Word.ASK:
            yield after(left, receiver, *side.hear_ask(sender, number))
        else:
            yield after(left, receiver, *side.hear(word, sender, leader))
    if world.breaks:
        for a, b in {(min(c[1:]), max(c[1:])) for c, _ in world.wire}:
            one, other = world.sides[a], world.sides[b]
            if one is not None and other is not None:
                kept = tuple(pair for pair in world.unreplied if set(pair[0]) != {a, b})
                broken = replace(drop(drop(world, a, b), b, a), breaks=0, one_sided=True, unreplied=kept)
                broken = after(broken, a, *one.part(b))
                yield after(broken, b, *other.part(a))


def begin(asks: tuple[tuple[int, ...], ...], **may: int) -> World:
    size = len(asks)
    sides = tuple(Side(rank) for rank in range(size))
    nothing: tuple[frozenset[tuple[int, int]], ...] = (frozenset(),) * size
    return replace(World(sides, asks, at=(None,) * size, applied=nothing), **may)  # type: ignore[arg-type]


def walk(world: World) -> tuple[int, int, set[frozenset[tuple[int, int]]]]:
    """Go through every state; return their number, the endings', and the sets of exchanges with which it may end."""
    seen, frontier, ends, outcomes = {world}, [world], 0, set()
    while frontier:
        here = frontier.pop()
        onward = list(moves(here))
        # what may but need not come (a death, a meeting) is no way out for who waits
        forced = replace(here, deaths=0, leaves=0, breaks=0, withdrawals=0)
        if not list(moves(forced)):
            ends += 1
            check_end(here)
            outcomes.add(frozenset().union(*here.applied))
        for next_world in onward:
            if next_world not in seen:
                seen.add(next_world)
                frontier.append(next_world)
    return len(seen), ends, outcomes


def check_end(world: World) -> None:
    for rank, side in enumerate(world.sides):
        if side is not None:
            assert side.phase is Phase.IDLE, f"rank {rank} waits for ever: {world}"
            assert not side.waiting
    if world.one_sided:
        return
    for rank, applied in enumerate(world.applied):
        for exchange in applied:
            partners = [k for k, theirs in enumerate(world.applied) if k != rank and exchange in theirs]
            dead = any(side is None for side in world.sides)
            assert partners or dead, f"rank {rank} alone applied {exchange}: {world}"
    living = [world.applied[rank] for rank, side in enumerate(world.sides) if side is not None]
    if all(side is not None for side in world.sides):
        for exchange in frozenset().union(*living):
            assert sum(exchange in applied for applied in living) == 2


@pytest.mark.parametrize("leaves", [0, 1])
@pytest.mark.parametrize("deaths", [0, 1])
def test_two_that_always_ask_each_other(deaths: int, leaves: int) -> None:
    states, ends, outcomes = walk(begin(((1, 1), (0, 0)), deaths=deaths, leaves=leaves))
    assert ends
    assert states > 100
    assert max(len(exchanges) for exchanges in outcomes) >= 3
    if not deaths and not leaves:
        assert min(len(exchanges) for exchanges in outcomes) >= 1, "two that ask have an exchange"


@pytest.mark.parametrize(
    "asks",
    [
        ((1,), (2,), (0,)),  # in a circle
        ((2,), (0,), (1,)),
        ((1, 2), (0,), (1,)),
        ((2,), (2,), (0,)),
        ((1,), (0, 2), (0,)),
        pytest.param(((1, 2), (2, 0), (0, 1)), marks=pytest.mark.long),
    ],
)
def test_three_that_ask_in_every_order(asks: tuple[tuple[int, ...], ...]) -> None:
    _, ends, outcomes = walk(begin(asks))
    assert ends
    assert all(outcomes), "somebody always has an exchange"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("asks", [((1,), (2,), (0,)), ((1,), (0,), (1,)), ((2,), (2,), (0,))])
@pytest.mark.parametrize(("deaths", "leaves"), [(1, 0), (0, 1)])
def test_three_of_which_one_dies_or_leaves_at_any_moment(
    asks: tuple[tuple[int, ...], ...], deaths: int, leaves: int
) -> None:
    states, ends, _ = walk(begin(asks, deaths=deaths, leaves=leaves))
    assert ends
    assert states > 1000


@pytest.mark.parametrize("asks", [((1, 1), (0, 0)), ((1,), (2,), (0,)), ((1,), (0,), (1,)), ((2,), (2,), (0,))])
def test_who_waits_for_no_reply_any_more(asks: tuple[tuple[int, ...], ...]) -> None:
    states, ends, _ = walk(begin(asks, withdrawals=2))
    assert ends
    assert states > 500


@pytest.mark.parametrize("asks", [((1,), (0,)), ((1,), (0,), (1,))])
def test_a_link_that_breaks_leaves_nobody_waiting(asks: tuple[tuple[int, ...], ...]) -> None:
    walk(begin(asks, breaks=1))


def test_who_waits_is_taken_where_the_own_ask_fails() -> None:
    side, _ = Side(1).ask(2)
    side, says = side.hear_ask(0, 1)
    assert (says, side.waiting) == ((), (0,))
    side, says = side.hear_reply(Word.BUSY, 2, asks=1)
    assert says[0] == Say(0, Word.ANSWER, 0)
    assert (side.phase, side.partner, side.leads) == (Phase.ANSWERED, 0, False)


def test_a_reply_that_comes_late_is_not_taken_for_one_to_the_next_ask() -> None:
    """It may: who hears the ask that crossed its own first is through with it before it hears that they crossed."""
    side, _ = Side(1).ask(0)
    side, _ = side.hear_ask(0, 1)
    for word in (Word.GO, Word.PAYLOAD, Word.HELD):
        side, _ = side.hear(word, 0, leader=0)
    side, _ = side.applied().ask(0)
    late, says = side.hear_reply(Word.CROSSED, 0, asks=1)
    assert (late, says) == (side, ())


def test_an_ask_that_was_refused_is_not_expected() -> None:
    """Rank 0 asked while rank 1 was busy, and has not heard so when it hears that rank 1 asks."""
    side, _ = Side(1).ask(2)
    side, says = side.hear_reply(Word.ANSWER, 2, asks=1).side.hear_ask(0, 1)
    assert says == (Say(0, Word.BUSY, 0),)
    for word in (Word.PAYLOAD, Word.HELD):
        side, _ = side.hear(word, 2, leader=1)
    side, _ = side.applied().ask(0)
    assert side.hear_reply(Word.CROSSED, 0, asks=2, number=1).side.phase is Phase.IDLE
    assert side.hear_reply(Word.CROSSED, 0, asks=2, number=2).side.phase is Phase.EXPECTING


def test_an_ask_that_is_void_is_not_answered_when_it_comes_late() -> None:
    side, _ = Side(0).ask(1)
    side, _ = side.hear_reply(Word.ANSWER, 1, asks=1, number=4)
    for word in (Word.PAYLOAD, Word.HELD):
        side, _ = side.hear(word, 1, leader=0)
    side = side.applied()
    same, says = side.hear_ask(1, 4)
    assert (same, says) == (side, (Say(1, Word.CROSSED, 1),))
    assert side.hear_ask(1, 5).side.phase is Phase.ANSWERING


def test_an_answer_that_comes_after_a_withdrawal_is_void() -> None:
    side, _ = Side(0).ask(1)
    side, _ = side.withdraw()
    side, _ = side.ask(2)
    same, says = side.hear_reply(Word.ANSWER, 1, asks=1)
    assert says == (Say(1, Word.VOID, 0),)
    assert (same.phase, same.partner) == (Phase.ASKING, 2)


def test_who_is_not_free_does_not_ask() -> None:
    side, _ = Side(1).ask(2)
    with pytest.raises(ValueError, match=r"rank 1 can not ask rank 0"):
        side.ask(0)
