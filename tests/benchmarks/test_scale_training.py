"""benchmarks/scale/training.py: real steps on a computed clock, as many on each rank as its pace allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.scale import training
from benchmarks.scale.training import Labelled, Sets
from benchmarks.shared.rows import append, read

BATCHES = 24
"""Of an epoch: 6 steps of 4 even ranks."""


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Sets:
    """Return random images, and put a small network in the place of the thesis'."""
    monkeypatch.setattr(training, "mlp", lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 10)))
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> Labelled:
        inputs = torch.randn(count, 1, 2, 2, generator=generator)
        return Labelled(inputs, torch.randint(10, (count,), generator=generator))

    return Sets(some(BATCHES * training.BATCH), some(10), some(2000))


@pytest.mark.parametrize(("setup", "share"), [("by step, even", 1), ("asynchronous, even", 1)])
def test_even_ranks_see_every_sample_once_an_epoch(data: Sets, setup: str, share: float) -> None:
    curve = training.train(setup, data, seed=0, epochs=3)
    assert [seen["samples"] for seen in curve] == [n * BATCHES * training.BATCH * share for n in (1, 2, 3)]


def test_a_slow_rank_takes_nothing_of_the_others_time(data: Sets) -> None:
    slow, alone = (
        training.train(f"asynchronous, {name}", data, seed=0, epochs=3) for name in ("one slow", "three alone")
    )
    steps = [seen["samples"] / training.BATCH for seen in (slow[-1], alone[-1])]
    assert steps == [18 * 3 + 6, 18 * 3]


def test_ranks_of_one_pace_exchange_alike(data: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pairs mix after the same steps by step and asynchronously; who gets which batch may differ."""
    monkeypatch.setattr(training, "PERIOD", 2)
    by_step, even = (
        training.train(name, data, seed=0, epochs=3)[-1] for name in ("by step, even", "asynchronous, even")
    )
    monkeypatch.setattr(training, "PERIOD", 1000)
    apart = training.train("by step, even", data, seed=0, epochs=3)[-1]
    assert by_step["distance"] == pytest.approx(even["distance"], rel=0.5)
    assert by_step["distance"] < 0.8 * apart["distance"]


def test_by_step_a_slow_rank_has_the_curve_of_even_ranks_stretched(tmp_path: Path) -> None:
    for seed in (0, 1):
        rows = [
            {"setup": "by step, even", "seed": seed, "epochs": 7, "epoch": n, "accuracy": n + seed, "distance": 1.0}
            for n in range(1, 8)
        ]
        append(tmp_path / "rows.csv", rows)
    times, values = training.curves(read(tmp_path / "rows.csv"), "accuracy")["by step, one slow"]
    assert times.tolist() == [3, 6]
    np.testing.assert_array_equal(values, [[1, 2], [2, 3]])
