"""Set-ups with outer steps in benchmarks/exchange and benchmarks/network: whole periods, peaks, names; no training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.exchange.__main__ import RARE, make_setups
from benchmarks.network import report, torchft_loop
from benchmarks.network.schemes import HOOKED, OUTER, OUTER_SETUPS, TORCHFT, make_strategy
from benchmarks.network.setups import outer_setups
from benchmarks.network.torchft_loop import by_layers
from benchmarks.shared.ddp_hooks import HookedDDP
from benchmarks.shared.meters import peak_rate
from benchmarks.shared.rows import append
from benchmarks.shared.side_by_side import Plan
from benchmarks.shared.workloads import perceptron
from lightning_gossip import DiLoCoStrategy, ElasticGossipStrategy


@pytest.mark.parametrize(
    ("steps", "warm_up", "whole"), [(16, 8, (32, 64)), (32, 64, (32, 64)), (33, 8, (64, 64)), (128, 100, (128, 100))]
)
def test_blocks_have_whole_periods_after_two_to_warm_up(steps: int, warm_up: int, whole: tuple[int, int]) -> None:
    plan = Plan(steps=steps, warm_up=warm_up, cool_down=5).whole(32)
    assert (plan.steps, plan.warm_up, plan.cool_down) == (*whole, 5)


def test_rare_exchanges_are_compared_with_blocks_of_their_length() -> None:
    setups, plan = make_setups(), Plan(steps=16, warm_up=8)
    rare = [setup for name, setup in setups.items() if f"{RARE}" in name]
    assert len(rare) == 7
    for setup in rare:
        assert setup.plan(plan).steps % RARE == 0
        assert setups[setup.reference].plan(plan) == setup.plan(plan)
    assert setups["matching"].plan(plan) == plan


def test_the_peak_of_what_was_sent() -> None:
    looks = [(0.0, 0), (1.0, 0), (2.0, 50), (3.0, 100), (4.0, 100), (5.0, 100), (6.0, 110)]
    assert peak_rate(looks, 2.0) == 50  # from 1 to 3
    assert peak_rate(looks, 4.0) == 25  # from 1 to 5
    assert peak_rate(looks, 6.0) == pytest.approx(110 / 6)
    assert peak_rate(looks, 7.0) == 0
    # a burst is no higher for having been seen in a moment
    assert peak_rate([(0.0, 0), (1.0, 0), (1.001, 100), (2.0, 100)], 0.5) == pytest.approx(100 / 1.001)


def test_network_setups_are_what_their_names_say() -> None:
    strategies = {name: make_strategy(name) for name in (*OUTER, *HOOKED)}
    for name, strategy in strategies.items():
        if name.startswith("elastic"):
            assert isinstance(strategy, ElasticGossipStrategy)
        elif name in OUTER:
            assert isinstance(strategy, DiLoCoStrategy)
            assert strategy.fragments == (4 if "fragments 4" in name else 1)
            assert (strategy.outer.lr, strategy.outer.momentum) == ((1, 0) if "LocalSGD" in name else (0.7, 0.9))
        else:
            assert isinstance(strategy, HookedDDP)
        if name in OUTER:
            assert strategy.hyperparameters["period"] == 32
            assert (f"delay {strategy.hyperparameters['delay']}" in name) == (strategy.hyperparameters["delay"] > 0)


def test_blocks_of_period_32_have_whole_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr(torchft_loop, "is_installed", lambda there=there: there)
        setups = {setup.name: setup.plan(Plan()) for setup in outer_setups(steps=64)}
        assert set(setups) == set(OUTER_SETUPS) - (set() if there else set(TORCHFT))
        for name, plan in setups.items():
            if "period 32" in name:
                assert (plan.steps, plan.warm_up) == (64, 64)


def test_fragments_are_dealt_by_layers() -> None:
    network = perceptron()
    parts = by_layers(network, 2)
    dealt = [id(p) for part in parts for p in part.parameters()]
    assert sorted(dealt) == sorted(id(p) for p in network.parameters())
    assert all(any(True for _ in part.parameters()) for part in parts)
    with pytest.raises(ValueError, match="at most 1, the layers of this network, got 2"):
        by_layers(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), 2)


def test_the_table_takes_what_has_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.setups_of("outer") == OUTER_SETUPS
    names = [name for name in OUTER_SETUPS if name not in TORCHFT]
    for round_ in range(2):
        for name in names:
            row = {"rate_mbit": 200.0, "ranks": 4, "cores": 2, "factor": 1.0, "setup": name, "round": round_}
            sent = {
                "step_max_ms": 9,
                "cpu_ms": 9,
                "payload_mb": "",
                "network_mb": 1,
                "peak_mb_s": 5 if "4" in name else 20,
            }
            append(tmp_path / "network_outer.csv", [row | {"step_ms": 10 if "none" in name else 15} | sent])
    report.print_tables(tmp_path, ["outer"])
    shown = capsys.readouterr().out
    assert "outer steps, 200 Mbit/s, 2 rounds" in shown
    assert "peak of 4 fragments to that of one: 0.25 (0.25–0.25)" in shown
    assert "torchft" not in shown
