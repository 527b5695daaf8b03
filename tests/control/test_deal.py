"""The dealing of work, apart from Lightning: what each rank draws, whatever their speeds (design §11)."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from ranks import Rank, run_ranks
from torch.distributed import HashStore

from lightning_gossip.control.deal import AHEAD, Deck, Hand
from lightning_gossip.control.dealer import Dealer
from lightning_gossip.control.stop import RunStopped


class Counter:
    """The run's store."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


class Worker:
    """A rank whose questions are answered at once."""

    def __init__(self, deck: Deck, rank: int | None, counter: Counter) -> None:
        self.hand, self.counter = Hand(deck, rank), counter
        self.trained: list[int] = []
        self.told_last: int | None = None  # how many batches it was told that there are

    def ask(self) -> None:
        while self.hand.wants:
            self.hand.ask()
            self.hand.answer(self.counter.add())

    def begin(self) -> int | None:
        self.ask()
        number = self.hand.issue()
        self.ask()
        assert self.hand.knows_next
        if number is not None and self.hand.ended:
            self.told_last = len(self.hand.issued)
        return number


def run(deck: Deck, seconds: list[float], dies: dict[int, float] | None = None) -> tuple[list[Worker], list[float]]:
    """Let workers with so many seconds a batch go through a deck; return them, and when each was through."""
    counter = Counter()
    workers = [Worker(deck, rank, counter) for rank in range(len(seconds))]
    events = [(0.0, rank) for rank in range(len(seconds))]
    doing: dict[int, int] = {}
    ends = [0.0] * len(seconds)
    while events:
        now, rank = heapq.heappop(events)
        if now >= (dies or {}).get(rank, float("inf")):
            continue
        worker = workers[rank]
        if rank in doing:
            worker.trained.append(doing.pop(rank))
        if (number := worker.begin()) is None:
            ends[rank] = now
        else:
            doing[rank] = number
            heapq.heappush(events, (now + seconds[rank], rank))
    return workers, ends


@pytest.mark.parametrize("total", [4, 5, 17, 100, 403])
@pytest.mark.parametrize("seconds", [[1, 1, 1, 1], [3, 1, 1, 1], [1, 2.7, 1.3, 9]], ids=str)
def test_every_batch_comes_once_and_all_end_together(total: int, seconds: list[float]) -> None:
    workers, ends = run(Deck(total, (0, 1, 2, 3)), seconds)
    assert sorted(number for worker in workers for number in worker.trained) == list(range(total))
    assert all(worker.told_last == len(worker.trained) > 0 for worker in workers), "each knew its last one before it"
    assert max(ends) - min(ends) <= 2 * max(seconds), "the one that it has begun, and one more"
    ideal = total / sum(1 / s for s in seconds)
    if total >= 100:
        assert max(ends) <= ideal + 2 * max(seconds)


def test_a_rank_holds_no_more_than_it_needs_to_know_ahead() -> None:
    worker = Worker(Deck(100, (0, 1)), 0, Counter())
    worker.begin()
    assert worker.hand.held(0) == [0, 2, 3]
    assert len(worker.hand.held(1)) == AHEAD
    for _ in range(60):
        worker.begin()
    other = Worker(worker.hand.deck, 1, worker.counter)
    while other.hand.deck.size - worker.counter.count > 12:
        other.begin()
    for _ in range(2):
        worker.begin()
    assert len(worker.hand.held(len(worker.hand.issued))) == 1, "near the end one"


def test_a_lost_rank_loses_what_it_held_and_nothing_else() -> None:
    workers, _ = run(Deck(100, (0, 1, 2)), [1, 1.5, 1.1], dies={1: 20.0})
    left = [worker for rank, worker in enumerate(workers) if rank != 1]
    trained = sorted(number for worker in left for number in worker.trained)
    lost = workers[1]
    assert trained == sorted(set(range(100)) - set(lost.hand.issued) - set(lost.hand.held(len(lost.hand.issued))))
    assert 100 - len(trained) - len(lost.trained) <= 1 + AHEAD


@pytest.mark.parametrize("rank", [5, None], ids=["a seat that was empty", "a seat whose process began the epoch"])
def test_who_joins_finds_the_deck_and_draws_from_it(rank: int | None) -> None:
    deck, counter = Deck(30, (0, 1)), Counter()
    old, joined = Worker(deck, 0, counter), Worker(deck, rank, counter)
    Worker(deck, 1, counter)
    order = random.Random(0)
    seen: list[int | None] = []
    while not (old.hand.ended and joined.hand.ended):
        seen.append(order.choice([old, joined]).begin())
    numbers = [number for number in seen if number is not None]
    assert sorted([*numbers, 1]) == list(range(30)), "1 is in the hand of the rank that did nothing"


def test_who_joins_at_the_end_finds_nothing() -> None:
    deck, counter = Deck(4, (0, 1)), Counter()
    counter.count = 10
    late = Worker(deck, 2, counter)
    assert late.begin() is None
    assert late.hand.ended


@pytest.mark.parametrize("trained", [0, 1, 3])
def test_what_is_iterated_again_goes_on_with_what_was_held(trained: int) -> None:
    worker = Worker(Deck(9, (0,)), 0, Counter())
    first = [worker.begin() for _ in range(3)]
    worker.hand.issue_again(trained)
    rest = list(iter(worker.begin, None))
    assert [*first[:trained], *rest] == list(range(9))


@pytest.mark.parametrize("seed", range(20))
def test_a_resume_deals_what_nobody_has_trained(seed: int) -> None:
    """By other numbers of ranks, several times over, from any moment."""
    draw = random.Random(seed)
    total = draw.randint(8, 60)
    deck = Deck(total, tuple(range(draw.randint(1, 4))))
    trained: list[int] = []
    for _ in range(3):
        counter = Counter()
        workers = [Worker(deck, rank, counter) for rank in deck.members]
        counts = dict.fromkeys(deck.members, 0)
        for _ in range(draw.randint(0, total // 2)):
            rank = draw.choice(deck.members)
            if (number := workers[rank].begin()) is not None:
                trained.append(number)
                counts[rank] += 1
        for worker in workers:
            worker.ask()
        held = [number for rank, worker in enumerate(workers) for number in worker.hand.held(counts[rank])]
        rest = deck.rest(counter.count, held)
        resumed = Deck(total, tuple(range(draw.randint(1, 4))), rest["first"], tuple(rest["left"]))
        assert Deck.from_json(resumed.to_json()) == resumed
        deck = resumed
    workers, _ = run(deck, [1.0 + rank for rank in deck.members])
    trained += [number for worker in workers for number in worker.trained]
    assert sorted(trained) == list(range(total))


def test_ranks_of_one_pace_have_as_many_as_each_other_where_they_must() -> None:
    deck, counter = Deck(11, (0, 1, 2)), Counter()
    workers = [Worker(deck, rank, counter) for rank in range(3)]
    counts = [0, 0, 0]
    for step in range(5):
        for rank, worker in enumerate(workers):
            counts[rank] += worker.begin() is not None
            if step == 0:
                worker.hand.even_out()
    assert counts == [3, 3, 3]


def test_a_deck_that_is_smaller_than_its_members() -> None:
    workers, _ = run(Deck(10, (0, 1, 2, 3), first=9, left=(2,)), [1, 1, 1, 1])
    assert [worker.trained for worker in workers] == [[2], [9], [], []]


# -- with a store, in threads -----------------------------------------------------------------------------------------


class SlowStore(HashStore):
    """Takes its time to answer."""

    def add(self, key: str, amount: int) -> int:
        if amount:
            time.sleep(0.002)
        return super().add(key, amount)


def test_threads_of_unequal_speed_share_several_epochs() -> None:
    store = SlowStore()
    pauses = [0.012, 0.004, 0.004, 0.004]

    def body(rank: Rank) -> list[Any]:
        dealer = Dealer(lambda: store, rank.control)
        epochs = []
        dealer.shuffle()
        for epoch in range(3):
            deck = dealer.open(epoch, Deck(100, (0, 1, 2, 3), seed=rank.rank))
            numbers, waited = [], 0.0
            while True:
                begin = time.monotonic()
                number = dealer.next()
                waited += time.monotonic() - begin
                if number is None:
                    break
                numbers.append(number)
                time.sleep(pauses[rank.rank])
            epochs.append((numbers, time.monotonic(), deck.seed, waited))
            rank.control.meet(f"the end of epoch {epoch}")
        dealer.close()
        return epochs

    results = run_ranks(4, body)
    for epoch in range(3):
        numbers = [result[epoch][0] for result in results]
        assert sorted(itertools.chain(*numbers)) == list(range(100))
        assert len(numbers[0]) < min(map(len, numbers[1:])), "the slow one takes fewer"
        ends = [result[epoch][1] for result in results]
        assert max(ends) - min(ends) < 0.1, "two of its batches, and what a busy machine adds"
        assert len({result[epoch][2] for result in results}) == 1, "the seed of whoever opened it"


def test_a_rank_that_waits_for_the_store_sees_the_stop_word() -> None:
    class Silent(HashStore):
        def add(self, key: str, amount: int) -> int:
            if "count" in key:
                threading.Event().wait(2)
            return super().add(key, amount)

    store = Silent()

    def body(rank: Rank) -> None:
        dealer = Dealer(lambda: store, rank.control)
        dealer.shuffle()
        dealer.open(0, Deck(10, ()))
        if rank.rank == 0:
            rank.control.stop("error", "enough")
        begin = time.monotonic()
        try:
            dealer.next()
        finally:
            assert time.monotonic() - begin < 1.5
            dealer.close()

    results = run_ranks(2, body, expect_errors=True)
    assert all(isinstance(result, RunStopped) and "enough" in str(result) for result in results)


def test_a_deck_that_is_open_holds_for_all() -> None:
    store = HashStore()

    def body(rank: Rank) -> tuple[Deck, int]:
        dealer = Dealer(lambda: store, rank.control)
        dealer.shuffle()
        mine = Deck(10, (0, 1), mark=rank.rank)
        deck = dealer.open(3, mine)
        dealer.close()
        return replace(deck, mark=0), deck.mark

    (first, mark), (second, other) = run_ranks(2, body)
    assert first == second
    assert mark == other


def test_epochs_leave_no_decks_behind() -> None:
    store = HashStore()

    def body(rank: Rank) -> int:
        dealer = Dealer(lambda: store, rank.control)
        dealer.shuffle()
        for epoch in range(20):
            dealer.open(epoch, Deck(7, (0, 1)))
            while dealer.next() is not None:
                pass
            rank.control.meet(f"epoch {epoch}")
        before = store.num_keys()
        rank.control.meet("counted")
        dealer.close()
        return before

    assert max(run_ranks(2, body)) < 25


def test_who_joins_finds_the_present_decks_whatever_one_that_is_late_still_says() -> None:
    store = HashStore()

    def body(rank: Rank) -> list[int]:
        late, ahead, joiner = (Dealer(lambda: store, rank.control) for _ in range(3))
        late.shuffle()
        for _ in range(3):
            ahead.shuffle()
        ahead.open(0, Deck(9, (0,)))
        late.open(0, Deck(9, (0,)))
        numbers = [joiner.shuffle(), joiner.shuffle()]
        for dealer in (late, ahead, joiner):
            dealer.close()
        return numbers

    assert run_ranks(1, body) == [[3, 4]]
