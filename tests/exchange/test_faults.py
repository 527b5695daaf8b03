"""Links, control and exchanges when something goes wrong: every wait ends, and says why."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn
from torch.distributed import HashStore

from lightning_gossip.control.run import Control, RunStopped
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.interface import PartnerLost
from lightning_gossip.transport.link import Header, Kind, LinkError

SHORT = timedelta(seconds=1.5)


def step(rank: Rank, size: int = 4, peers: Any = "matching") -> None:
    exchange = rank.exchange(Schedule(peers), ElasticMixing(0.5), {"theta": nn.Parameter(torch.ones(size))})
    exchange.begin()
    exchange.end()


def test_a_silent_partner_is_named_with_the_step() -> None:
    def body(rank: Rank) -> None:
        if rank.rank == 0:
            step(rank)
        else:
            time.sleep(SHORT.total_seconds() + 2.5)  # beyond the timeout, without a word

    error, _ = run_ranks(2, body, timeout=SHORT, expect_errors=True)
    assert isinstance(error, PartnerLost)
    assert "rank 0 lost its partner rank 1 at step 1: it stayed silent for 1.5 s" in str(error)
    assert error.partner == 1


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_lost_partner_is_noticed_at_once_and_both_ranks_named(shared_memory: bool) -> None:
    def body(rank: Rank) -> float:
        parameters = {"theta": nn.Parameter(torch.ones(4))}
        exchange = rank.exchange(Schedule(), ElasticMixing(0.5), parameters, shared_memory)
        for _ in range(2):
            exchange.begin()
            exchange.end()
            if rank.rank == 1:
                exchange.close()  # links and outbox, as a killed process would
                time.sleep(3)
                return 0.0
        raise AssertionError("rank 0 did not notice")

    start = time.monotonic()
    error, _ = run_ranks(2, body, expect_errors=True)
    assert isinstance(error, PartnerLost)
    assert "rank 0 lost its partner rank 1 at step 2" in str(error)
    assert time.monotonic() - start < 8


def test_the_others_report_the_cause() -> None:
    def body(rank: Rank) -> None:
        if rank.rank == 3:
            raise ValueError("boom")
        if rank.rank == 2:
            step(rank, peers=Pairs())  # waits for rank 3
        while True:  # ranks 0 and 1 are busy with something else
            rank.control.check()
            time.sleep(0.01)

    errors = run_ranks(4, body, expect_errors=True)
    assert isinstance(errors[3], ValueError)
    for error in errors[:3]:
        assert isinstance(error, RunStopped)
        assert str(error) == "rank 3 stopped at step 0: ValueError: boom"


class Pairs:
    def choices(self, step: int, world_size: int) -> list[int]:
        return [1, 0, 3, 2]


def test_models_that_differ_are_noticed_by_the_header() -> None:
    errors = run_ranks(2, lambda rank: step(rank, size=4 + rank.rank), expect_errors=True)
    assert all(isinstance(error, PartnerLost) for error in errors)
    assert any("expected Header" in str(error) and "nbytes=" in str(error) for error in errors)


@pytest.mark.parametrize(
    "sent",
    [
        Header(Kind.SNAPSHOT, 2, 64, 7),  # another step
        Header(Kind.SNAPSHOT, 1, 128, 7),  # larger than the buffer: gloo would abort the process
        Header(99, 1, 64, 7),  # unknown kind
        Header(Kind.SNAPSHOT, 1, 64, 8),  # another layout
    ],
)
def test_a_header_that_does_not_fit_changes_nothing(sent: Header) -> None:
    expected = Header(Kind.SNAPSHOT, 1, 64, 7)

    def body(rank: Rank) -> Any:
        link = rank.links.to(f"rank{1 - rank.rank}")
        if rank.rank == 0:
            link.submit(lambda: link.send(sent, torch.ones(sent.nbytes, dtype=torch.uint8))).result(10)
            time.sleep(1)
            return None
        incoming = torch.zeros(64, dtype=torch.uint8)

        def receive() -> None:
            header = link.receive_header()
            if header != expected:
                raise LinkError(f"{header}")
            link.receive(incoming)

        with pytest.raises(LinkError, match="Header"):
            link.submit(receive).result(10)
        with pytest.raises(LinkError, match="is closed"):
            link.submit(receive).result(10)
        return incoming.sum().item()

    assert run_ranks(2, body)[1] == 0


def test_garbage_is_no_header() -> None:
    with pytest.raises(LinkError, match="no header of this version"):
        Header.from_tensor(torch.arange(8))
    header = Header(1, 2, 3, 4, 5, 6)
    assert Header.from_tensor(header.to_tensor()) == header


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
