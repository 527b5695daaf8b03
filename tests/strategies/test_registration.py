"""The strategies' names in Lightning's registry, in whichever order it and the package are imported."""

from __future__ import annotations

import subprocess
import sys

import lightning.pytorch as pl
import pytest
from environments import LEAN

from lightning_gossip.strategies.registration import STRATEGIES, register_with_lightning

REPORT = """
import inspect
import sys
import lightning.pytorch as pl
import lightning.pytorch.strategies as strategies
registered = strategies.StrategyRegistry.available_strategies()
print(*(name for name in registered if name.partition("_")[0] in ("gossip", "elastic", "downpour")))
print("ddp" in registered, inspect.getsource(strategies)[:3] != "")
print([finder.family for finder in sys.meta_path if "lightning_gossip" in type(finder).__module__])
trainer = pl.Trainer(strategy="elastic_gossip_spawn", accelerator="cpu", devices=2, logger=False, barebones=True)
print(type(trainer.strategy).__name__, trainer.strategy._start_method)
"""
NAMES = [
    f"{name}{start}"
    for name in ("downpour", "elastic_gossip", "gossip")
    for start in ("", "_fork", "_notebook", "_spawn")
]


@pytest.mark.one_in(2)
@pytest.mark.processes
@pytest.mark.parametrize("imports", ["lightning_gossip, lightning.pytorch", "lightning.pytorch, lightning_gossip"])
def test_names_are_registered_in_whichever_order_the_two_are_imported(imports: str) -> None:
    """The finder that waited for Lightning is gone afterwards, and Lightning's source is found; one waits for the
    other name."""
    command = [sys.executable, "-c", f"import {imports}\n{REPORT}"]
    done = subprocess.run(command, env=LEAN, capture_output=True, text=True, timeout=120, check=True)
    names, lightnings, finders, made = done.stdout.splitlines()
    assert sorted(names.split()) == NAMES
    assert lightnings == "True True"
    assert finders == "['pytorch_lightning']"
    assert made == "ElasticGossipStrategy spawn"


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("start", ["", "_spawn", "_fork", "_notebook"])
def test_a_name_that_says_ddp_is_the_same_strategy(name: str, start: str) -> None:
    """For scvi-tools, which asks `"ddp" in strategy` before it places a sampler of its own."""
    registry = pl.strategies.StrategyRegistry
    one, other = registry.get(f"{name}{start}"), registry.get(f"ddp_{name}{start}")
    assert type(one) is type(other)
    assert type(one).__name__ == STRATEGIES[name]
    assert one._start_method == other._start_method


def waiting() -> int:
    return sum(getattr(finder, "family", "") == "lightning.pytorch" for finder in sys.meta_path)


def test_one_finder_waits_for_lightning_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delitem(sys.modules, "lightning.pytorch.strategies")
    assert waiting() == 0
    register_with_lightning()
    register_with_lightning()
    assert waiting() == 1
