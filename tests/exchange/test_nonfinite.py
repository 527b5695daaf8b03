"""NaN in one replica: never in another; it is healed, or the run ends, as asked (design §10)."""

from __future__ import annotations

import pytest
import ranks
import torch
from ranks import Rank, run_ranks
from torch import Tensor, nn

from lightning_gossip.exchange.stats import NotFinite
from lightning_gossip.rules.mixing import CHUNK, ElasticMixing, mix
from lightning_gossip.rules.outer import OuterStep
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


OUTER = OuterStep(0.7, 0.9)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["single", "double"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("peers", ["matching", "uniform"])
def test_with_an_outer_step_too(name: str, value: float, delay: int, peers: str) -> None:
    def body(rank: Rank) -> int:
        mine = parameters(rank.rank)
        schedule = Schedule(peers, period=2, seed=1)
        exchange = rank.exchange(
            schedule, ElasticMixing(0.3), mine, delay=delay, outer=OUTER, nonfinite="heal", wire_dtype=torch.float32
        )
        told = []
        exchange.on_heal = lambda: told.append(exchange.step)
        for step in range(1, 21):
            exchange.begin()
            with torch.no_grad():
                for parameter in mine.values():
                    parameter.add_(0.01 * rank.rank)
            if rank.rank == 2 and step == 5:
                with torch.no_grad():
                    mine[name][1] = value
            exchange.end()
            if rank.rank != 2:
                assert all(torch.isfinite(p).all() for p in mine.values())
        state = exchange.state_dict()["outer"]
        for tensors in (mine, state["starts"], state["velocities"]):
            assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        assert len(told) == exchange.stats.healed
        return exchange.stats.healed

    assert run_ranks(4, body) == [0, 0, 1, 0]


def test_the_sick_one_begins_at_its_partners_result_and_the_partner_makes_its_own_step() -> None:
    """As if it were alone, but for the rounding of what is undone."""

    def steps(exchange: object, mine: dict[str, nn.Parameter], sick: bool) -> dict[str, dict[str, Tensor]]:
        for step in range(1, 5):
            exchange.begin()  # type: ignore[attr-defined]
            with torch.no_grad():
                for parameter in mine.values():
                    parameter.add_(0.25 * step)
            if sick and step == 3:
                with torch.no_grad():
                    mine["single"][-1] = float("nan")  # of the last pieces: those before are mixed in, and undone
            exchange.end()  # type: ignore[attr-defined]
        state: dict[str, dict[str, Tensor]] = exchange.state_dict()["outer"]  # type: ignore[attr-defined]
        return state | {"theta": {name: parameter.detach().clone() for name, parameter in mine.items()}}

    def body(rank: Rank) -> dict[str, dict[str, Tensor]]:
        mine = parameters(rank.rank)
        exchange = rank.exchange(Schedule(period=4), ElasticMixing(0.5), mine, outer=OUTER, nonfinite="heal")
        return steps(exchange, mine, rank.rank == 1)

    def alone(rank: Rank) -> dict[str, dict[str, Tensor]]:
        mine = parameters(0)
        return steps(rank.exchange(Schedule(period=4), ElasticMixing(0.5), mine, outer=OUTER), mine, False)

    healthy, healed = run_ranks(2, body)
    [expected] = run_ranks(1, alone)
    for kept in ("theta", "starts", "velocities"):
        for name, value in expected[kept].items():
            torch.testing.assert_close(healthy[kept][name], value, rtol=0, atol=1e-6)
    for name, start in healthy["starts"].items():
        torch.testing.assert_close(healed["starts"][name], start, rtol=0, atol=1e-6)
        assert torch.equal(healed["theta"][name], healed["starts"][name])
        assert not healed["velocities"][name].any()


def test_with_an_outer_step_whoever_finds_it_says_whose_it_is() -> None:
    def body(rank: Rank) -> None:
        mine = parameters(rank.rank)
        exchange = rank.exchange(Schedule(), ElasticMixing(0.5), mine, outer=OUTER)
        for step in range(1, 4):
            if rank.rank == 1 and step == 3:
                with torch.no_grad():
                    mine["double"][0] = float("inf")
            exchange.begin()
            exchange.end()

    found = [error for error in run_ranks(2, body, expect_errors=True) if isinstance(error, NotFinite)]
    assert found
    assert all((error.rank, error.step) == (1, 3) for error in found)
