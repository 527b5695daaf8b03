"""NaN in one replica under LocalSGD and DiLoCo: in no mean; it goes back to the common start, or ends (design §10)."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor, nn

from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.exchange.stats import NotFinite
from lightning_gossip.rules.mixing import CHUNK
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.transport.all_reduce import LinkAllReduce

pytestmark = pytest.mark.faults

STEPS = 30


def model() -> dict[str, nn.Parameter]:
    return {
        "a.single": nn.Parameter(torch.linspace(-1, 1, CHUNK + 5)),
        "b.double": nn.Parameter(torch.linspace(-1, 1, 70, dtype=torch.float64)),
    }


def rounds_of(rank: Rank, mine: dict[str, nn.Parameter], **kwargs: Any) -> Rounds:
    reducer = LinkAllReduce(rank.links, rank.control)
    rounds = Rounds(rank.rank, rank.world_size, 4, OuterStep(0.7, 0.9), reducer, lambda: mine, **kwargs)
    rank.clock = lambda: rounds.step
    return rounds


def steps(rank: Rank, rounds: Rounds, mine: dict[str, nn.Parameter], count: int) -> None:
    for _ in range(count):
        rounds.begin()
        with torch.no_grad():
            for parameter in mine.values():
                parameter.add_(0.01 * (rank.rank - parameter))
        rounds.end()


def kept(rounds: Rounds) -> dict[str, Tensor]:
    state = rounds._state.state_dict()
    return state["starts"] | {f"momentum of {name}": value for name, value in state["velocities"].items()}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("wire_dtype", [None, torch.float16], ids=["whole", "16 bits"])
@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("name", ["a.single", "b.double"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_sick_one_goes_back_to_the_start_and_all_drop_the_round(
    value: float, name: str, delay: int, fragments: int, wire_dtype: Any
) -> None:
    """The rest of its replica is sick a step later, as it is in a training: one healing is enough for all of it."""

    def body(rank: Rank) -> Any:
        mine = model()
        rounds = rounds_of(rank, mine, delay=delay, fragments=fragments, wire_dtype=wire_dtype, nonfinite="heal")
        told: list[int] = []
        rounds.on_heal = lambda: told.append(rounds.step)
        steps(rank, rounds, mine, 8)
        if rank.rank == 2:
            with torch.no_grad():
                mine[name][-1] = value
            steps(rank, rounds, mine, 1)
            with torch.no_grad():
                for parameter in mine.values():
                    parameter.fill_(float("nan"))
        else:
            steps(rank, rounds, mine, 1)
        steps(rank, rounds, mine, STEPS - 9)
        rounds.settle()
        for parameter in mine.values():
            assert torch.isfinite(parameter).all()
            assert parameter.abs().max() < 10
        assert len(told) == rounds.stats.healed
        return rounds.stats.healed, rounds.stats.exchanges, kept(rounds)

    results = run_ranks(4, body)
    assert [healed for healed, _, _ in results] == [0, 0, 1, 0]
    assert len({exchanges for _, exchanges, _ in results}) == 1
    assert results[0][1] >= 6 - 1
    for _, _, common in results:
        assert all(torch.equal(value, results[0][2][name]) for name, value in common.items())
        assert all(torch.isfinite(value).all() for value in common.values())


def test_by_default_it_ends_its_rank_and_says_when() -> None:
    def body(rank: Rank) -> None:
        mine = model()
        rounds = rounds_of(rank, mine)
        steps(rank, rounds, mine, 6)
        if rank.rank == 1:
            with torch.no_grad():
                mine["b.double"][3] = float("nan")
        steps(rank, rounds, mine, 4000)

    errors = run_ranks(3, body, expect_errors=True)
    assert isinstance(errors[1], NotFinite)
    assert str(errors[1]) == "the replica of rank 1 is not finite at step 8 (found by rank 1)"
    for rank in (0, 2):
        assert "rank 1 stopped at step 8: NotFinite: the replica of rank 1 is not finite" in str(errors[rank])


def test_one_that_is_in_flight_is_dropped_after_a_resume_too() -> None:
    def body(rank: Rank) -> tuple[int, dict[str, Tensor]]:
        mine = model()
        rounds = rounds_of(rank, mine, delay=3, nonfinite="heal")
        steps(rank, rounds, mine, 7)
        if rank.rank == 1:
            with torch.no_grad():
                mine["a.single"][0] = float("nan")
        steps(rank, rounds, mine, 2)
        torch.save(rounds.state_dict(), file := io.BytesIO())
        file.seek(0)
        rank.links.reset(1)
        resumed = rounds_of(rank, mine, delay=3, nonfinite="heal")
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.in_flight
        steps(rank, resumed, mine, 12)
        assert all(torch.isfinite(parameter).all() for parameter in mine.values())
        return resumed.stats.healed, kept(resumed)

    results = run_ranks(3, body)
    assert [healed for healed, _ in results] == [0, 1, 0]
    for _, common in results:
        assert all(torch.equal(value, results[0][1][name]) for name, value in common.items())


def test_large_finite_drifts_are_finite() -> None:
    def body(rank: Rank) -> float:
        mine = {"p": nn.Parameter(torch.zeros(100))}
        rounds = Rounds(
            rank.rank, 2, 1, OuterStep(), LinkAllReduce(rank.links, rank.control), lambda: mine, nonfinite="error"
        )
        rounds.begin()
        with torch.no_grad():
            mine["p"].fill_(1e37)
        rounds.end()
        rounds.begin()
        rounds.end()
        return mine["p"][0].item()

    assert run_ranks(2, body) == [pytest.approx(1e37)] * 2, "the sum over all elements overflows, they do not"
