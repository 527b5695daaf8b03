"""NaN in one replica: never in another; it is healed, or the run ends, as asked (design §10)."""

from __future__ import annotations

import pytest
import ranks
import torch
from ranks import Rank, run_ranks
from torch import nn

from lightning_gossip.exchange.stats import NotFinite
from lightning_gossip.rules.mixing import CHUNK, ElasticMixing, mix
from lightning_gossip.rules.schedule import Schedule

pytestmark = pytest.mark.faults


@pytest.fixture(params=[True, False], ids=["shared memory", "links"], autouse=True)
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SHARED_MEMORY", request.param)


def parameters(rank: int) -> dict[str, nn.Parameter]:
    return {
        "single": nn.Parameter(torch.full((2 * CHUNK + 5,), float(rank))),
        "double": nn.Parameter(torch.full((7,), float(rank), dtype=torch.float64)),
    }


@pytest.mark.parametrize("name", ["single", "double"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("peers", ["matching", "uniform"])
def test_what_is_not_finite_is_mixed_into_nobody_and_is_healed(name: str, value: float, peers: str) -> None:
    def body(rank: Rank) -> tuple[int, int]:
        mine = parameters(rank.rank)
        if rank.rank == 2:
            with torch.no_grad():
                mine[name][1] = value
        exchange = rank.exchange(Schedule(peers, seed=1), ElasticMixing(0.3), mine, nonfinite="heal")
        told = []
        exchange.on_heal = lambda: told.append(exchange.step)
        for _ in range(6):
            exchange.begin()
            exchange.end()
            if rank.rank != 2:
                assert all(torch.isfinite(p).all() for p in mine.values())
        assert all(torch.isfinite(p).all() for p in mine.values())
        assert len(told) == exchange.stats.healed
        return exchange.stats.healed, exchange.stats.exchanges

    results = run_ranks(4, body)
    assert [healed for healed, _ in results] == [0, 0, 1, 0]


def test_whoever_finds_it_says_whose_it_is_and_when() -> None:
    def body(rank: Rank) -> None:
        mine = parameters(rank.rank)
        exchange = rank.exchange(Schedule(), ElasticMixing(0.5), mine)
        for step in range(1, 4):
            if rank.rank == 1 and step == 3:
                with torch.no_grad():
                    mine["single"][0] = float("nan")
            exchange.begin()
            exchange.end()

    errors = run_ranks(2, body, expect_errors=True)
    found = [error for error in errors if isinstance(error, NotFinite)]
    assert found
    for error in found:
        assert str(error).startswith("the replica of rank 1 is not finite at step 3 (found by rank")
        assert (error.rank, error.step) == (1, 3)


def test_mixing_that_stops_leaves_targets_as_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5 * CHUNK, generator=generator)
    before, other = target.clone(), torch.randn(5 * CHUNK, generator=generator)
    other[10] = float("nan")  # in the last stretch that is mixed
    assert not mix([target], before.clone(), [other], 0.5, torch.empty(CHUNK))
    torch.testing.assert_close(target, before, rtol=0, atol=1e-6)


def test_large_finite_values_are_finite() -> None:
    target = torch.full((64,), 3e38)
    assert mix([target], target.clone(), [torch.zeros(64)], 0.5, torch.empty(32)), "their sum overflows, they do not"
    assert torch.equal(target, torch.full((64,), 1.5e38))
