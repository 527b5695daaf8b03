"""The run's store is killed, at any moment: each rank ends soon, and says why (design §10)."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from forked import Recorder, fit, regression
from lightning.pytorch.callbacks import ModelCheckpoint
from running import running
from test_joining import Rich
from test_surviving import Fault
from torch.utils.data import DataLoader

from lightning_gossip import DiLoCoStrategy, DownpourStrategy, ElasticGossipStrategy, LocalSGDStrategy

pytestmark = pytest.mark.faults

GONE = "the run's store is gone: the process that held it (rank 0's, or the launcher's) has ended"
OPTIONS: Any = {"start_method": "fork", "timeout": timedelta(seconds=60), "min_replicas": 1}
STRATEGIES: dict[str, Any] = {
    "elastic": lambda: ElasticGossipStrategy(**OPTIONS),
    "delayed": lambda: ElasticGossipStrategy(period=3, delay=2, **OPTIONS),
    "outer": lambda: LocalSGDStrategy(period=3, **OPTIONS),
    "fragments": lambda: DiLoCoStrategy(period=4, fragments=2, delay=1, **OPTIONS),
    "asynchronous": lambda: ElasticGossipStrategy(asynchronous=True, **OPTIONS),
    "downpour": lambda: DownpourStrategy(**OPTIONS),
}
MOMENTS: dict[str, dict[str, Any]] = {
    "the first batch": {"hook": "on_train_batch_start", "epoch": 0, "batch": 0},
    "the first step's end": {"hook": "on_train_batch_end", "epoch": 0, "batch": 0},
    "a step": {"hook": "on_train_batch_end", "epoch": 1, "batch": 2},
    "an epoch's end": {"hook": "on_train_epoch_end", "epoch": 1},
    "a validation": {"hook": "on_validation_batch_start", "epoch": 1},
    "a save": {"hook": "on_save_checkpoint", "epoch": 1},
    "the end": {"hook": "on_train_end", "epoch": 3},
}


def noting(strategy: Any, folder: Path) -> Any:
    """Return ``strategy``, which writes how each rank ends, and how long after the store."""
    end, launching = strategy.on_exception, os.getpid()

    def on_exception(error: BaseException) -> None:
        if os.getpid() == launching:
            return
        seconds = time.time() - float((folder / "killed").read_text())
        (folder / f"ending_{strategy.global_rank}").write_text(f"{seconds:.1f} {error}")
        end(error)

    strategy.on_exception = on_exception
    return strategy


def kill_store() -> None:
    """Kill the store of this process's run: whoever has its port among its arguments."""
    [store] = running(lambda process: {"store", os.environ["MASTER_PORT"]} <= set(process.cmdline()))
    store.kill()


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    ("strategy", "moment"),
    [
        pytest.param(name, moment, marks=[pytest.mark.long] if name != "elastic" and position else [])
        for name in STRATEGIES
        for position, moment in enumerate(MOMENTS)
    ],
)
def test_each_rank_names_it(tmp_path: Path, strategy: str, moment: str) -> None:
    def kill() -> None:
        (tmp_path / "killed").write_text(str(time.time()))
        kill_store()

    fault = Fault(2, act=kill, **MOMENTS[moment])
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
    with pytest.raises(RuntimeError):
        fit(
            tmp_path,
            Rich(),
            noting(STRATEGIES[strategy](), tmp_path),
            devices=3,
            train=DataLoader(regression(96), 4),
            val=DataLoader(regression(), 4),
            max_epochs=3,
            enable_checkpointing=True,
            callbacks=[fault, saver],
            recorder=Recorder(tmp_path),
        )
    endings = [path.read_text() for path in sorted(tmp_path.glob("ending_*"))]
    assert len(endings) == 3
    assert [ending.partition(" ")[2] for ending in endings] == [GONE] * 3
    assert max(float(ending.partition(" ")[0]) for ending in endings) < 20
