"""Real `Trainer.fit` runs whose ranks come back (design §10)."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, regression
from lightning.pytorch.callbacks import Callback
from test_surviving import Fault, run, surviving
from torch.utils.data import DataLoader

pytestmark = pytest.mark.faults


class Pace(Callback):
    """Lets a step take its time."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


class OnceOnly(Fault):
    """A fault that hits the first process of a rank only."""

    def _hook(self, trainer: pl.Trainer, *arguments: Any) -> None:
        control: Any = trainer.strategy.control  # type: ignore[attr-defined]
        if control.incarnation == 0:
            super()._hook(trainer, *arguments)


@pytest.mark.parametrize("rank", [2, 0])
def test_a_rank_that_is_killed_comes_back(tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture) -> None:
    fault = OnceOnly(rank, hook="on_train_batch_end", batch=2)
    with caplog.at_level(logging.WARNING):
        seen = run(
            tmp_path,
            Pace(),
            fault,
            lost=(),
            strategy=surviving(restarts=1),
            train=DataLoader(regression(480), 4),
            max_epochs=4,
        )
    assert len(seen) == 4
    for other in seen:
        torch.testing.assert_close(other["state"], seen[0]["state"], rtol=0, atol=0)
        assert set(other["members"][-1]) == {0, 1, 2, 3}
    assert f"rank {rank} joined at step" in "".join(seen[1 if rank == 0 else 0]["changes"])


def test_bad_restarts_are_named() -> None:
    with pytest.raises(ValueError, match="`restarts` must be an integer of at least 0, got -1"):
        surviving(restarts=-1)
    with pytest.raises(ValueError, match="`restarts` must be 0 without `min_replicas`, got 2"):
        type(surviving())(restarts=2)
    assert Linear
