"""The all-reduce beside training: parts, ranks that leave early, ranks that are lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor, nn

from lightning_gossip.control.stop import RunStopped
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.transport.all_reduce import LinkAllReduce
from lightning_gossip.transport.halves import Halves, bytes_sent, part_bytes, part_of, room_bytes
from lightning_gossip.transport.header import Header, Kind
from lightning_gossip.transport.interface import PartnerLost


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 32])
@pytest.mark.parametrize("nbytes", [0, 8, 64, 72, 4096, 100_003])
def test_parts_cover_a_payload_once_and_cut_no_element(nbytes: int, ranks: int) -> None:
    parts = [part_of(nbytes, ranks, rank) for rank in range(ranks)]
    assert [byte for part in parts for byte in range(nbytes)[part]] == list(range(nbytes))
    assert all(part.start % 64 == 0 or part.start == nbytes for part in parts)
    assert all(part.stop - part.start <= part_bytes(nbytes, ranks) for part in parts)
    total = sum(bytes_sent(nbytes, ranks, rank) for rank in range(ranks))
    assert total == 2 * nbytes * (ranks - 1), "both halves of an all-reduce"


def rounds_of(rank: Rank, parameter: nn.Parameter, **kwargs: Any) -> Rounds:
    reducer = LinkAllReduce(rank.links, rank.control)
    period = kwargs.pop("period", 4)
    rounds = Rounds(
        rank.rank, rank.world_size, period, OuterStep(0.7, 0.9), reducer, lambda: {"a.p": parameter}, **kwargs
    )
    rank.clock = lambda: rounds.step
    return rounds


def steps(rank: Rank, rounds: Rounds, parameter: nn.Parameter, count: int, seconds: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(100 * rank.rank + rounds.step)
    for _ in range(count):
        rounds.begin()
        time.sleep(seconds)
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        rounds.end()


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("early", [0, 2, 3])
def test_when_a_rank_is_through_early_all_drop_the_rounds_that_are_left(early: int, delay: int) -> None:
    """The rank waits at the epoch's end; the others go on for two rounds and more, alone, and then all go on."""

    def body(rank: Rank) -> tuple[Tensor, int, bool]:
        parameter = nn.Parameter(torch.zeros(100))
        rounds = rounds_of(rank, parameter, delay=delay)
        steps(rank, rounds, parameter, 10 if rank.rank == early else 21 + rank.rank)
        rounds.arrive()
        meeting = rank.control.meet("the end of an epoch")
        rounds.align(meeting.clock)
        assert rounds.stats.exchanges + rounds.in_flight == 2, (
            "steps 4 and 8, which is still in flight on the early one"
        )
        if meeting.skipped:
            rounds.reset_links(meeting.number)
        steps(rank, rounds, parameter, 13)
        rounds.settle()
        return rounds.starts["a.p"].clone(), rounds.stats.exchanges, meeting.skipped

    results = run_ranks(4, body)
    for start, exchanges, skipped in results:
        assert torch.equal(start, results[0][0])
        assert exchanges == results[0][1] >= 5
        assert skipped


def test_a_slow_rank_is_waited_for() -> None:
    def body(rank: Rank) -> int:
        parameter = nn.Parameter(torch.zeros(100))
        rounds = rounds_of(rank, parameter, delay=2)
        steps(rank, rounds, parameter, 9, seconds=0.1 if rank.rank == 1 else 0.0)
        rounds.settle()
        return rounds.stats.exchanges

    assert run_ranks(3, body) == [2, 2, 2]


@pytest.mark.parametrize("delay", [0, 3])
def test_a_rank_that_fails_is_named_by_all(delay: int) -> None:
    def body(rank: Rank) -> None:
        parameter = nn.Parameter(torch.zeros(100))
        rounds = rounds_of(rank, parameter, delay=delay)
        steps(rank, rounds, parameter, 9 if rank.rank == 2 else 40)
        assert rank.rank == 2
        raise ValueError("no more data")

    errors = run_ranks(4, body, expect_errors=True)
    assert isinstance(errors[2], ValueError)
    for error in (errors[rank] for rank in (0, 1, 3)):
        assert isinstance(error, RunStopped)
        assert "rank 2 stopped at step 9: ValueError: no more data" in str(error)


def test_a_silent_rank_ends_the_wait_after_the_timeout() -> None:
    def body(rank: Rank) -> None:
        parameter = nn.Parameter(torch.zeros(100))
        rounds = rounds_of(rank, parameter)
        steps(rank, rounds, parameter, 5)
        if rank.rank == 2:
            while rank.control.stopped is None:
                time.sleep(0.1)
            return
        steps(rank, rounds, parameter, 10)

    began = time.monotonic()
    errors = run_ranks(3, body, timeout=timedelta(seconds=3), expect_errors=True)
    assert time.monotonic() - began < 15
    lost = [error for error in errors[:2] if isinstance(error, PartnerLost)]
    assert lost
    assert all(error.partner == 2 and "lost rank 2 in the all-reduce of step 8" in str(error) for error in lost)


class _Answers:
    """A link on which one job after the other ends as it is told."""

    def __init__(self, *futures: Future[None]) -> None:
        self.futures = list(futures)

    def submit(self, job: Callable[[], None]) -> Future[None]:
        return self.futures.pop(0)


def test_who_failed_is_blamed_before_those_that_are_through_or_are_waited_for() -> None:
    through, fails, waits = Future[None](), Future[None](), Future[None]()
    through.set_result(None)
    fails.set_exception(TimeoutError("it stayed silent"))
    header = Header(Kind.REDUCTION, 8, 400)
    halves = Halves(header, torch.empty(400), torch.empty(room_bytes(400, 4)), lambda *_: None, 1, (0, 1, 2, 3))
    links: Any = {0: _Answers(waits), 2: _Answers(through), 3: _Answers(fails)}
    assert halves.run(links, lambda _: None) == (3, fails.exception())
    assert halves.waits_for == 3
    waits.set_result(None)
    assert halves.waits_for == 3, "whoever looks once all jobs have ended"


def test_ranks_with_different_models_are_told() -> None:
    def body(rank: Rank) -> None:
        parameter = nn.Parameter(torch.zeros(100 + rank.rank))
        steps(rank, rounds_of(rank, parameter), parameter, 5)

    errors = run_ranks(2, body, expect_errors=True)
    assert any(isinstance(error, PartnerLost) and "expected Header" in str(error) for error in errors)
