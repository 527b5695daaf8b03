"""The run's control by itself: who meets, who stops and why; every wait ends."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from ranks import Rank, run_ranks
from torch.distributed import HashStore

from lightning_gossip.control.calls import Calls
from lightning_gossip.control.run import Control
from lightning_gossip.control.stop import RunStopped

SHORT = timedelta(seconds=1.5)


def test_a_slow_rank_is_waited_for_at_a_meeting_a_dead_one_is_not() -> None:
    def slow(rank: Rank) -> None:
        if rank.rank == 1:
            time.sleep(2 * SHORT.total_seconds())
        rank.control.meet("validation")

    run_ranks(3, slow, timeout=SHORT)

    store = HashStore()
    alive = Control(lambda: store, 0, 2, SHORT)
    with pytest.raises(RuntimeError, match="rank 0 waited at 'validation' for rank 1, which gave no sign of life"):
        alive.meet("validation")
    alive.close(grace=0)


def test_ranks_that_meet_for_different_reasons_are_told() -> None:
    errors = run_ranks(2, lambda rank: rank.control.meet(f"reason {rank.rank}"), expect_errors=True)
    assert any("the ranks disagree on what comes next" in str(error) for error in errors)
    assert all("'reason 0'" in str(error) and "'reason 1'" in str(error) for error in errors)


def test_the_first_stop_word_holds_and_wakes_everybody() -> None:
    def body(rank: Rank) -> float:
        if rank.rank == 0:
            time.sleep(0.3)
            rank.control.stop("error", "first")
            rank.control.stop("error", "second")
            return time.monotonic()
        with pytest.raises(RunStopped, match="rank 0 stopped at step 0: first"):
            rank.control.wait(threading.Event(), time.monotonic() + 10)
        return time.monotonic()

    told, *heard = run_ranks(4, body)
    assert max(heard) - told < 2


def test_signals_end_other_ranks_as_they_would_end_the_own() -> None:
    def body(rank: Rank) -> None:
        if rank.rank == 0:
            rank.control.stop("SIGINT", "it received SIGINT")
        else:
            rank.control.wait(threading.Event(), time.monotonic() + 10)

    _, error = run_ranks(2, body, expect_errors=True)
    assert isinstance(error, KeyboardInterrupt)


def test_what_was_done_with_the_others_is_not_called_for_again() -> None:
    """Also where a rank meets the others for it before its control thread has heard of their call."""
    store = HashStore()
    first, late = (Calls(rank, lambda: (0, 1), lambda: 3) for rank in range(2))
    for calls in (first, late):
        calls.note("a save")
    first.look(store)
    assert (first.called, late.called) == ("a save", None)
    for calls in (first, late):
        calls.finish("a save")
        calls.look(store)
        assert calls.called is None


def test_who_comes_first_to_a_meeting_calls_the_others() -> None:
    def body(rank: Rank) -> list[str | None]:
        lookout = rank.control.calls.lookout
        lookout.kept = True
        heard: list[str | None] = []
        for turn in range(6):
            if turn % 3 != rank.rank:
                heard.append(rank.control.poll(lambda: lookout.called_to, time.monotonic() + 5))
            rank.control.meet(f"turn {turn}")
            # whose turn is next may be at that meeting already
            assert lookout.called_to in (None, f"turn {turn + 1}")
        return heard

    for rank, heard in enumerate(run_ranks(3, body)):
        assert heard == [f"turn {turn}" for turn in range(6) if turn % 3 != rank]


def test_who_waits_for_all_is_seen_by_those_that_watch() -> None:
    def body(rank: Rank) -> None:
        lookout = rank.control.calls.lookout
        lookout.watched = "the end of an epoch"
        for epoch in range(3):
            assert not lookout.is_awaited("the end of an epoch")
            if rank.rank != epoch:
                seen = rank.control.poll(
                    lambda: lookout.is_awaited("the end of an epoch") or None, time.monotonic() + 5
                )
                assert seen
            rank.control.await_all("the end of an epoch", lambda reason: None)
            rank.control.meet("all have looked")

    run_ranks(3, body)


def test_meetings_leave_no_keys_behind() -> None:
    store = HashStore()

    def body(rank: Rank) -> None:
        for _ in range(50):
            rank.control.meet("again")

    def run(number: int, barrier: list[Control]) -> None:
        for _ in range(50):
            barrier[number].meet("again")

    controls = [Control(lambda: store, rank, 2, SHORT) for rank in range(2)]
    threads = [threading.Thread(target=run, args=(rank, controls)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert store.num_keys() < 20
    for control in reversed(controls):
        control.close(grace=1)
