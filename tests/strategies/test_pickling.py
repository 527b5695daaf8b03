"""A user's objects can be pickled and copied in mid-training, and what is written names nothing of this package."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import LEAN
from forked import Linear, fit, recorded, regression
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection, MetricTracker


class Measured(Linear):
    """Keeps its metrics in its hyperparameters too, as pytorch-forecasting's and chemprop's modules do."""

    def __init__(self, loss: Any = None, more: Any = None) -> None:
        super().__init__()
        self.loss = loss if loss is not None else MeanMetric()
        self.more = more if more is not None else MetricCollection({"mean": MeanMetric()})
        self.save_hyperparameters({"loss": self.loss, "more": self.more})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss.update(float(self.global_rank))

    def collate(self, rows: Any) -> Any:
        return torch.utils.data.default_collate(rows)


def strategies() -> list[Any]:
    from lightning_gossip import DownpourStrategy, ElasticGossipStrategy  # where this module is loaded there is none

    return [
        ElasticGossipStrategy(start_method="fork"),
        ElasticGossipStrategy(start_method="fork", evaluate="replica"),
        DownpourStrategy(start_method="fork"),
    ]


LOAD = """
import sys
sys.modules["lightning_gossip"] = None  # importing it fails
import torch
for path in sys.argv[1:]:
    torch.load(path, weights_only=False)
"""


class Writes(Callback):
    """Pickles and copies the module, its metrics and the callbacks in every hook in which somebody may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, pl_module, "train")

    def write(self, trainer: Any, module: Any, when: str) -> None:
        file = io.BytesIO()
        torch.save(module, file)
        others = [callback for callback in trainer.callbacks if isinstance(callback, (ModelCheckpoint,))]
        data = file.getvalue() + pickle.dumps(others)
        assert b"lightning_gossip" not in data
        torch.save(module, self.folder / f"{when}_{trainer.global_rank}.pt")
        twin = copy.deepcopy(module)
        assert twin.loss is not module.loss
        loaded = pickle.loads(pickle.dumps(others))
        assert all(callback._monitor_candidates.__self__ is callback for callback in loaded)
        assert all(callback.on_train_batch_end.__self__ is callback for callback in loaded)
        metric = pickle.loads(pickle.dumps(module.loss))
        assert metric.dist_sync_fn is None
        assert metric.distributed_available_fn is type(metric)().distributed_available_fn


@pytest.mark.one_in(3)
@pytest.mark.parametrize("number", range(3))
def test_modules_metrics_and_callbacks_are_written_in_mid_training(tmp_path: Path, number: int) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "saved", "last", monitor=None)
    by_steps = ModelCheckpoint(tmp_path / "by_steps", every_n_train_steps=5)
    fit(
        tmp_path, Measured(), strategies()[number], max_epochs=2, val=DataLoader(regression(), 8),
        callbacks=[Writes(tmp_path), EMAWeightAveraging(), checkpoint, by_steps], enable_checkpointing=True,
    )  # fmt: skip
    written = [str(tmp_path / f"{when}_{rank}.pt") for when in ("train", "validation") for rank in range(2)]
    paths = [str(tmp_path / "saved" / "last.ckpt"), *written]
    here = Path(__file__).parent
    environment = LEAN | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, LEAN["PYTHONPATH"])))}
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, env=environment)


@pytest.mark.long
def test_a_loaders_worker_that_is_spawned_with_the_modules_own_method(tmp_path: Path) -> None:
    class Loads(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            loader = DataLoader(
                regression(8), 4, collate_fn=pl_module.collate, num_workers=1, multiprocessing_context="spawn"
            )
            trainer.callbacks[-1].seen["rows"] = sum(len(x) for x, _ in loader)

    ranks = fit(tmp_path, Measured(), strategies()[0], max_epochs=1, callbacks=[Loads()])
    assert [rank["rows"] for rank in ranks] == [8, 8]


def test_copies_of_metrics_made_in_training_pool_the_ranks(tmp_path: Path) -> None:
    class Tracks(Measured):
        def __init__(self) -> None:
            super().__init__()
            self.tracker = MetricTracker(MeanMetric(), maximize=False)

        def on_validation_epoch_start(self) -> None:
            self.tracker.increment()  # copies

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.tracker.update(float(self.global_rank))

        def on_validation_epoch_end(self) -> None:
            recorded(self)["mean"] = float(self.tracker.compute())

    ranks = fit(tmp_path, Tracks(), strategies()[0], max_epochs=1, val=DataLoader(regression(), 8))
    assert [rank["mean"] for rank in ranks] == [0.5, 0.5]


def test_a_strategy_that_has_started_ranks_can_be_copied_and_pickled() -> None:
    from lightning_gossip import ElasticGossipStrategy
    from lightning_gossip.strategies.launchers import ReplicaSubprocessLauncher

    strategy = ElasticGossipStrategy(period=8, cluster_environment=LightningEnvironment())
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy._configure_launcher()
    launcher = strategy._launcher
    assert isinstance(launcher, ReplicaSubprocessLauncher)
    launcher.procs.append(subprocess.Popen(["true"]))  # as it does for a further rank
    try:
        twins: list[Any] = [copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))]
        for twin in twins:
            assert twin._launcher.procs == []
            assert twin._launcher.report.__self__ is twin
        assert len(launcher.procs) == 1
    finally:
        launcher.procs[0].wait(10)
