"""Exchanges when something goes wrong: every wait ends, and says why."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn

from lightning_gossip.control.stop import RunStopped
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.interface import PartnerLost

SHORT = timedelta(seconds=1.5)


def step(rank: Rank, size: int = 4, peers: Any = "matching") -> None:
    exchange = rank.exchange(Schedule(peers), ElasticMixing(0.5), {"theta": nn.Parameter(torch.ones(size))})
    exchange.begin()
    exchange.end()


def test_a_silent_partner_is_named_with_the_step() -> None:
    given_up = threading.Event()

    def body(rank: Rank) -> None:
        if rank.rank == 0:
            try:
                step(rank)
            finally:
                given_up.set()
        else:
            given_up.wait(10)  # beyond the timeout, without a word

    error, _ = run_ranks(2, body, timeout=SHORT, expect_errors=True)
    assert isinstance(error, PartnerLost)
    assert "rank 0 lost its partner rank 1 at step 1: it stayed silent for 1.5 s" in str(error)
    assert error.partner == 1


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_lost_partner_is_noticed_at_once_and_both_ranks_named(shared_memory: bool) -> None:
    noticed = threading.Event()

    def body(rank: Rank) -> float:
        parameters = {"theta": nn.Parameter(torch.ones(4))}
        exchange = rank.exchange(Schedule(), ElasticMixing(0.5), parameters, shared_memory)
        for _ in range(2):
            try:
                exchange.begin()
                exchange.end()
            except PartnerLost:
                noticed.set()
                raise
            if rank.rank == 1:
                exchange.close()  # links and outbox, as a killed process would
                noticed.wait(10)
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
