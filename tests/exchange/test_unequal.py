"""Ranks with unequal numbers of steps: partners skip who is done, and clocks meet afterwards."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Rank, Script, run_ranks
from torch import nn

from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.schedule import Schedule


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("peers", ["matching", "uniform"])
@pytest.mark.parametrize("rule", [ElasticMixing(0.5), PullMixing(), PushMixing()])
def test_a_rank_that_is_done_is_skipped_and_clocks_meet(rule: MixingRule, peers: str, delay: int) -> None:
    lengths = [(3, 7, 5, 7), (6, 2, 6, 6)]  # batches of each rank in two epochs

    def body(rank: Rank) -> tuple[list[int], np.ndarray]:
        parameter = nn.Parameter(torch.full((4,), float(rank.rank)))
        schedule = Schedule(peers, period=delay + 1)
        exchange = rank.exchange(schedule, rule, {"theta": parameter}, delay=delay)
        rank.clock = lambda: exchange.step
        clocks = []
        for epoch in lengths:
            for _ in range(epoch[rank.rank]):
                exchange.begin()
                exchange.end()
            clocks.append(exchange.step)
            exchange.arrive()
            meeting = rank.control.meet("the end of the epoch")
            exchange.align(meeting.clock)
            if meeting.skipped:
                exchange.reset_links(meeting.number)
        exchange.settle()
        return [*clocks, exchange.step], parameter.detach().numpy().copy()

    results = run_ranks(4, body)
    assert [clocks for clocks, _ in results] == [[3, 13, 13], [7, 9, 13], [5, 13, 13], [7, 13, 13]]
    final = np.stack([values for _, values in results])
    if isinstance(rule, ElasticMixing) or (peers == "matching" and isinstance(rule, PullMixing)):
        np.testing.assert_allclose(final.mean(axis=0), 1.5, rtol=1e-6)
    assert np.ptp(final[:, 0]) < 1.5, "replicas came together"


@pytest.mark.parametrize("shared_memory", [True, False])
def test_ranks_that_are_done_hold_nobody_up(shared_memory: bool) -> None:
    """Ranks 1 and 2 reach the meeting between receiving rank 0's snapshots and applying them; rank 0 takes a third."""
    schedule = Schedule(Script({2: (0, 1), 4: (0, 2), 6: (0, 3)}), period=2)
    batches = [7, 2, 4, 7]

    def body(rank: Rank) -> float:
        parameter = nn.Parameter(torch.full((4,), float(rank.rank)))
        exchange = rank.exchange(schedule, ElasticMixing(0.5), {"theta": parameter}, shared_memory, delay=1)
        for _ in range(batches[rank.rank]):
            exchange.begin()
            exchange.end()
        held = exchange.in_flight
        exchange.arrive()
        assert held == (rank.rank in (1, 2))
        assert exchange.in_flight == held, "it is not due yet"
        exchange.align(rank.control.meet("the end of the epoch").clock)
        exchange.settle()
        return parameter[0].item()

    assert run_ranks(4, body, timeout=timedelta(seconds=5)) == [2.125, 0.5, 1.25, 2.125]


def test_a_rank_that_wants_to_end_is_heard_of_until_all_have_met() -> None:
    def body(rank: Rank) -> Any:
        if rank.rank == 0:
            rank.control.meet("the end", ending=True)
        else:
            while not rank.control.asked_to_end:
                rank.control.check()
            rank.control.meet("the end")
        return rank.control.asked_to_end

    assert run_ranks(3, body) == [False] * 3
