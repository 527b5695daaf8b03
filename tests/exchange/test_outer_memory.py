"""What an outer step keeps: two copies of the parameters that travel, and no more (design §12)."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn

from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.all_reduce import LinkAllReduce

ELEMENTS = 3_000_000
COPY = 4 * ELEMENTS  # bytes


def live_bytes() -> int:
    """Of all tensors that are alive in this process, views of one memory counted once."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # a tuple that another thread is building must not be in our hands when that goes on
    time.sleep(0.02)  # whoever waits for its turn with the old interval gets it now
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    sys.setswitchinterval(interval)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def copies_of(make: Callable[[Rank, dict[str, nn.Parameter]], Any]) -> float:
    """Return the copies of the parameters that two ranks keep, each, at most in three rounds, but for themselves."""
    barrier = threading.Barrier(2)
    seen: list[float] = []

    def body(rank: Rank) -> None:
        parameters = {"a": nn.Parameter(torch.zeros(ELEMENTS - 1000)), "b": nn.Parameter(torch.zeros(1000))}
        barrier.wait()
        if rank.rank == 0:
            gc.collect()
            seen.append(live_bytes())
        barrier.wait()
        clock = make(rank, parameters)
        for _ in range(6):
            clock.begin()
            barrier.wait()
            if rank.rank == 0:
                seen.append(live_bytes())
            barrier.wait()
            clock.end()
        clock.close()

    run_ranks(2, body)
    return (max(seen[1:]) - seen[0]) / 2 / COPY


def gossip(outer: OuterStep | None, wire_dtype: torch.dtype | None) -> float:
    return copies_of(
        lambda rank, parameters: rank.exchange(
            Schedule(period=2), ElasticMixing(0.5), parameters, delay=1, outer=outer, wire_dtype=wire_dtype
        )
    )


def all_reduced(outer: OuterStep, wire_dtype: torch.dtype | None) -> float:
    return copies_of(
        lambda rank, parameters: Rounds(
            rank.rank,
            2,
            2,
            outer,
            LinkAllReduce(rank.links, rank.control),
            lambda: parameters,
            delay=1,
            wire_dtype=wire_dtype,
        )
    )


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_gossip_keeps_two_copies_more(wire_dtype: torch.dtype | None) -> None:
    plain = gossip(None, None)
    assert plain > 0.9, "the snapshot at least is seen"
    assert gossip(OuterStep(0.7, 0.9), wire_dtype) < plain + 2.1


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_diloco_keeps_two_copies_beside_what_is_sent_and_received_and_local_sgd_one(
    wire_dtype: torch.dtype | None,
) -> None:
    assert 3.9 < all_reduced(OuterStep(0.7, 0.9), wire_dtype) < 4.1
    assert 2.9 < all_reduced(OuterStep(1.0, 0.0), wire_dtype) < 3.1
