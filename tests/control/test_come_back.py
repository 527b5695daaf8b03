"""Who is lost and comes back before anybody looks is another process: nobody takes it for the one that it waits for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from survivors import all_at_once, initial
from torch import nn
from torch.distributed import HashStore

from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.meeting import tell_clock
from lightning_gossip.control.member_control import MemberControl, Survival
from lightning_gossip.control.member_log import MemberLog
from lightning_gossip.control.members import JOINED, JOINING, LOST, Members
from lightning_gossip.exchange import partners
from lightning_gossip.exchange.asynchronous import AsynchronousExchange
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport import handover
from lightning_gossip.transport.header import Header, Kind
from lightning_gossip.transport.link import Links
from lightning_gossip.transport.link_transport import LinkTransport, end_of_rank
from lightning_gossip.transport.shared_memory import AVAILABLE, SLOTS

TIMEOUT = timedelta(seconds=20)


def control_of(store: HashStore, rank: int, size: int, incarnation: int = 0) -> MemberControl:
    survival = Survival(1, timedelta(seconds=10), f"host{rank}|{incarnation}|0")
    return MemberControl(lambda: store, rank, size, TIMEOUT, survival, incarnation)


def lost_and_back(store: HashStore, seat: int, size: int, by: int) -> None:
    """Let the log say that ``seat`` was lost, taken again, and is whole: all at once, for who reads it then."""
    log = MemberLog(Members(size), by, lambda change: None)
    log.append(store, LOST, seat, 0, 1, "cut off")
    log.append(store, JOINING, seat, 1, 1, f"from rank {by}")
    log.append(store, JOINED, seat, 1, 1, f"from rank {by}")


def test_who_finds_its_seat_empty_says_at_which_step_the_run_lost_it() -> None:
    store = HashStore()
    tell_clock(store, "0.0", 1203)
    tell_clock(store, "1.0", 1204)
    store.set("process/1.0", "host|1|0")
    assert claim_seat(store, 1, 2, Survival(1, timedelta(seconds=10), "host|2|0", lambda _: True)) == 1
    log = MemberLog(Members(2), 0, lambda change: None)
    log.read(store)
    assert str(log.last_change(1)) == "rank 1 lost at step 1,204 (its process is gone)"


def test_a_joiner_does_not_wait_for_a_donor_in_whose_place_another_has_come() -> None:
    store = HashStore()
    log = MemberLog(Members(3), 0, lambda change: None)
    log.append(store, LOST, 2, 0, 1, "it has ended")
    joiner = control_of(store, 2, 3, incarnation=1)
    try:
        log.append(store, JOINING, 2, 1, 1, "from rank 0")
        donor = joiner.await_donor()
        assert donor == (0, 0)
        lost_and_back(store, 0, 3, by=1)
        start = time.monotonic()
        assert handover.state_of(donor, joiner, store) is None
        assert time.monotonic() - start < TIMEOUT.total_seconds() / 2
        assert not joiner.is_lost(0, 1), "who came in its place is there"
    finally:
        joiner.close()


def test_who_joins_at_its_donors_second_life_knows_which_one_it_is() -> None:
    store = HashStore()
    lost_and_back(store, 0, 3, by=1)
    log = MemberLog(Members(3), 0, lambda change: None)
    log.append(store, LOST, 2, 0, 1, "it has ended")
    joiner = control_of(store, 2, 3, incarnation=1)
    try:
        log.append(store, JOINING, 2, 1, 1, "from rank 0")
        assert joiner.await_donor() == (0, 1)
    finally:
        joiner.close()


@pytest.mark.skipif(not AVAILABLE, reason="anonymous shared memory is Linux's")
def test_memory_that_was_lent_to_one_is_taken_back_once_another_has_come_in_its_place() -> None:
    store = HashStore()
    control = control_of(store, 0, 2)
    transport = LinkTransport(Links(store, end_of_rank(0), TIMEOUT), control)
    try:
        transport.room(8, 8)
        control._log.extend(store, 100)
        transport.post(Header(Kind.SNAPSHOT, 1, 8), [1], [1])
        assert transport._outbox is not None
        for slot in range(SLOTS):
            transport._outbox.lend(slot, 1, 1)
        transport.reset(1)  # as after a meeting that somebody has skipped an exchange before
        lost_and_back(store, 1, 2, by=0)
        room = ThreadPoolExecutor(1).submit(transport.room, 8, 8)
        assert room.result(timeout=5).nbytes == 8
    finally:
        transport.close()
        control.close()


@pytest.mark.parametrize("withdrawn", [False, True], ids=["asked", "withdrawn"])
def test_an_asynchronous_rank_turns_to_the_one_that_came_back(withdrawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its partner is cut off: no link breaks, and it is back before anybody looks."""
    if withdrawn:
        monkeypatch.setattr(partners, "PATIENCE", 0.05)
    store, over = HashStore(), threading.Event()

    def body(rank: int) -> None:
        control = control_of(store, rank, 2)
        parameter = nn.Parameter(torch.tensor(initial(rank)))
        exchange = AsynchronousExchange(
            rank, 2, Schedule("uniform"), ElasticMixing(0.5), control, store, lambda: {"theta": parameter}
        )
        mine: Any = exchange._partners
        try:
            if rank == 1:
                mine._decide = lambda visitor, number: time.sleep(3)  # it hears, and says nothing
                control.begin(10)
                over.wait(10)
                return
            control.begin(10)
            exchange.begin()
            assert exchange.in_flight
            exchange.end()
            if withdrawn:
                time.sleep(0.1)
                exchange.begin()
                assert not exchange.in_flight
                exchange.end()
            lost_and_back(store, 1, 2, by=0)
            while not control.is_lost(1, 0):
                time.sleep(0.01)
            exchange.begin()
            exchange.end()
            exchange.begin()
            assert exchange.in_flight, "it asks again"
            assert store.check(["door1.1/1"]), "the one that came back"
            assert not mine._silent
        finally:
            over.set()
            exchange.close()
            control.close()

    all_at_once(2, body)
