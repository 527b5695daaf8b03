"""Many replicas and their clocks, against what can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.simulation import (
    TCP_SHARE,
    Clocks,
    Machine,
    Replicas,
    Setting,
    Uneven,
    all_reduce_step,
    growth,
    simulate,
)


def start(ranks: int, dimension: int = 8) -> torch.Tensor:
    return torch.randn(ranks, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("peers", ["matching", "uniform", "ring"])
def test_mixing_all_ranks_at_once_is_the_rule(peers: str) -> None:
    ranks, alpha, steps = 6, 0.3, 5
    setting = Setting(peers, alpha=alpha)
    replicas = Replicas(start(ranks), noise=0, rule=ElasticMixing(alpha))
    simulate(setting, ranks, steps, [replicas])
    expected = start(ranks)
    for step in range(1, steps + 1):
        choices = setting.schedule().choices(step, ranks)
        before = expected.clone()
        for rank in range(ranks):
            partners = {int(choices[rank])} | set(np.flatnonzero(choices == rank).tolist())
            for partner in partners:
                expected[rank] -= alpha * (before[rank] - before[partner])
    assert torch.allclose(replicas.values, expected, rtol=1e-12)
    assert torch.allclose(replicas.values.mean(dim=0), start(ranks).mean(dim=0)), "the mean stays"


def test_exponential_peers_agree_after_log2_rounds() -> None:
    replicas = Replicas(start(16), noise=0, rule=ElasticMixing(0.5))
    simulate(Setting("exponential"), 16, 4, [replicas])
    assert replicas.distances[2] > 0.1
    assert replicas.distances[3] < 1e-12


def test_a_delayed_exchange_is_applied_when_it_is_due() -> None:
    replicas = Replicas(start(2), noise=0, rule=ElasticMixing(0.5))
    simulate(Setting("matching", period=4, delay=2), 2, 8, [replicas])
    apart = [distance > 1e-12 for distance in replicas.distances]
    assert apart == [True] * 5 + [False] * 3, "posted at step 4, applied at the end of step 6"


@pytest.mark.parametrize(
    ("period", "delay", "expected"),
    [
        (1, 0, 2.0),  # a transfer of 2 s hides 1 s of computing
        (4, 0, 5 / 4),  # three steps of 1 s, one of 2 s
        (4, 1, 1.0),  # two steps are as long as the transfer
    ],
)
def test_clocks_of_two_ranks(period: int, delay: int, expected: float) -> None:
    machine = Machine(compute=1.0, payload=2.0 / 8, bandwidth=1 / TCP_SHARE, latency=0.0)
    assert machine.transfer == pytest.approx(2.0)
    clocks = Clocks(2, machine)
    simulate(Setting("matching", period=period, delay=delay), 2, 16 * period, [clocks])
    assert growth(clocks.means) == pytest.approx(expected, rel=0.02)


def test_a_rank_that_is_slow_for_good_sets_the_pace_of_all() -> None:
    machine = Uneven(compute=1.0, payload=0.0, bandwidth=1.0, latency=0.0, speeds=(3.0, 1.0, 1.0, 1.0))
    clocks = Clocks(4, machine)
    simulate(Setting("matching", period=8), 4, 1600, [clocks])
    assert growth(clocks.means) == pytest.approx(3.0, rel=0.01)
    assert np.ptp(clocks.now) < 8 * 8 * 3.0, "the others are some rounds ahead, not more and more"


def test_synchronous_training_waits_for_the_slowest() -> None:
    machine = Machine(compute=1.0, payload=0.0, bandwidth=1.0, latency=0.0, stall_probability=0.1)
    stalls = 1 + 2 * (1 - 0.9**4)
    assert all_reduce_step(machine, 4, steps=20_000) == pytest.approx(stalls, rel=0.02)
    assert stalls / machine.mean_step == pytest.approx(1.41, abs=0.005)


def test_ring_all_reduce_moves_twice_the_payload() -> None:
    machine = Machine(compute=0.0, payload=1.0 / 8, bandwidth=1 / TCP_SHARE, latency=0.01)
    assert math.isclose(all_reduce_step(machine, 4), 2 * 3 / 4 + 6 * 0.01)
