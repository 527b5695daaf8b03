"""One training under Downpour, or by a single process, and how accurate the server's model is, or that one's."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from classifier import Classifier
from lightning.pytorch.callbacks import ModelCheckpoint
from shares import make_sampler
from tensor_data import EVALUATION_BATCH, Labelled, Sets, TensorLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.shared.rows import Row, append, read
from benchmarks.shared.trainer import make_trainer
from lightning_gossip import DownpourStrategy
from lightning_gossip.strategies.checkpoint import AtomicCheckpointIO


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        sets: training, validation and test set.
        network: with its initial weights.
        shares: of the training set: ``"whole"``, ``"fixed"``, see ``examples/shares.py``.
        batch: of a worker.
        workers: 1 for a single process without Downpour.
        n_push: steps from one push to the next, and from one pull to the next.
        lr: of a worker.
        momentum: Nesterov's.
        schedule: of the learning rate, given the optimizer; stepped at every validation, by its loss.
        epochs: of each worker.
        checks: validations an epoch, evenly spread.
        seed: of the order of samples and dropout.
        curve: whether the model is validated, and a checkpoint saved after every epoch.
        timeout: for which a silent worker is waited for.
        folder: of the checkpoint from which an interrupted training goes on.
    """

    sets: Sets
    network: nn.Module
    shares: str
    batch: int
    workers: int
    n_push: int
    lr: float
    momentum: float
    schedule: Callable[[torch.optim.Optimizer], Any] | None
    epochs: int
    checks: int
    seed: int
    curve: bool
    timeout: timedelta
    folder: Path

    def run(self) -> tuple[dict[str, float], list[Row]]:
        """Train; return what the model is worth at the end, and the points of the curve."""
        strategy: Any = "auto"
        if self.workers > 1:
            strategy = DownpourStrategy(self.n_push, self.n_push, timeout=self.timeout, start_method="fork")
        points = self.folder / "curve.csv"
        data = Data(self.sets, self.shares, self.batch, self.seed)
        every = max(1, len(data.loader(0, self.workers)) // self.checks)
        model = Watched(points, every, self.network, self.lr, self.momentum, self.seed, schedule=self.schedule)
        saves = ModelCheckpoint(self.folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        trainer = make_trainer(
            devices=self.workers,
            strategy=strategy,
            max_epochs=self.epochs,
            val_check_interval=every,
            limit_val_batches=None if self.curve else 0,
            callbacks=[saves] if self.curve else [],
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=self.curve,
        )
        last = self.folder / "last.ckpt"
        if last.exists() and torch.load(last, weights_only=True, mmap=True)["epoch"] + 1 >= self.epochs:
            shutil.rmtree(self.folder)  # the server ended with what the last epoch made: once more
        begin = time.perf_counter()
        trainer.fit(model, data, ckpt_path=last if last.exists() else None)
        result = {"seconds": time.perf_counter() - begin}
        # what was measured after the last complete checkpoint was trained, and measured, once more
        curve = list({row["steps"]: row for row in read(points)}.values())
        # what `fit` left in this process is the server's model, with all that all workers made
        model.eval()
        return result | evaluate(model.network, self.sets), curve


class Watched(Classifier):
    """A classifier whose validation measures it on both sets exactly, each rank on its slice, and keeps a curve.

    Args:
        points: CSV file, to which rank 0 appends one row a validation.
        every: steps from one validation to the next.
        classifier: see :class:`Classifier`.
    """

    def __init__(self, points: Path, every: int, *classifier: Any, **more: Any) -> None:
        super().__init__(*classifier, **more)
        self.points, self.every = points, every
        self.pushes = self.staleness = 0
        self.seconds = self.cpu_seconds = 0.0  # until the checkpoint from which this training goes on
        self.begin = (0.0, 0.0)
        self.sums = torch.zeros(2, 3, dtype=torch.float64)

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        if self.schedule is not None:
            configured["lr_scheduler"] |= {"interval": "step", "frequency": self.every}
        return configured

    def on_train_start(self) -> None:
        self.begin = (time.perf_counter(), time.process_time())

    def so_far(self) -> dict[str, float]:
        """Return seconds and this process' processor time of this training."""
        return {
            "seconds": self.seconds + time.perf_counter() - self.begin[0],
            "cpu_seconds": self.cpu_seconds + time.process_time() - self.begin[1],
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["watched"] = {"pushes": self.pushes, "staleness": self.staleness, **self.so_far()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["watched"].items():
            setattr(self, name, value)

    def on_train_batch_end(self, *args: Any) -> None:
        stats = getattr(self.trainer.strategy, "downpour_stats", None)
        if stats is not None and stats.pushes != self.pushes:
            self.pushes = stats.pushes
            self.staleness += stats.staleness

    def on_validation_epoch_start(self) -> None:
        self.sums.zero_()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.sums[dataloader_idx] += measure(self.network, *batch)

    def on_validation_epoch_end(self) -> None:
        so_far = self.so_far()
        own = torch.tensor([so_far["cpu_seconds"], self.pushes, self.staleness], dtype=torch.float64)
        trainer: Any = self.trainer
        total = trainer.strategy.reduce(torch.cat([self.sums.flatten(), own]), reduce_op="sum").tolist()
        validation_loss, validation_right, validation, test_loss, test_right, test, cpu_seconds, pushes, staleness = (
            total
        )
        self.log("val_loss", validation_loss / validation)
        if not trainer.is_global_zero:
            return
        steps = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        point = {
            "epoch": round(steps / trainer.num_training_batches, 2),
            "steps": steps,
            "pushes": round(pushes),
            "staleness": staleness / max(pushes, 1),
            "worker_lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": so_far["seconds"],
            "cpu_seconds": cpu_seconds / trainer.world_size,
            "validation_loss": validation_loss / validation,
            "validation_accuracy": validation_right / validation,
            "test_loss": test_loss / test,
            "test_accuracy": test_right / test,
        }
        append(self.points, [point], digits=6)
        print(
            f"    epoch {point['epoch']:g}: test accuracy {point['test_accuracy']:.4f}, {point['seconds']:.0f} s",
            flush=True,
        )


@torch.no_grad()
def measure(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of losses, the number of right answers, and that of samples; shape ``(3,)``."""
    logits = network(inputs)
    right = (logits.argmax(dim=1) == labels).sum()
    loss = cross_entropy(logits, labels, reduction="sum")
    return torch.tensor([loss.item(), right.item(), len(labels)], dtype=torch.float64)


def evaluate(network: nn.Module, sets: Sets) -> dict[str, float]:
    """Return mean loss and accuracy on validation and test set, each as ``<set>_loss`` and ``<set>_accuracy``."""
    result: dict[str, float] = {}
    for name, part in (("validation", sets.validation), ("test", sets.test)):
        sums = [measure(network, *batch) for batch in TensorLoader(part, EVALUATION_BATCH)]
        loss, right, samples = torch.stack(sums).sum(0).tolist()
        result |= {f"{name}_loss": loss / samples, f"{name}_accuracy": right / samples}
    return result


class Data(pl.LightningDataModule):
    """Each rank's share of the training set, and its slices of validation and test set."""

    def __init__(self, sets: Sets, shares: str, batch: int, seed: int) -> None:
        super().__init__()
        self.sets, self.shares, self.batch, self.seed = sets, shares, batch, seed

    def _ranks(self) -> tuple[int, int]:
        trainer: Any = self.trainer
        return trainer.global_rank, trainer.world_size

    def train_dataloader(self) -> Any:
        return self.loader(*self._ranks())

    def loader(self, rank: int, world_size: int) -> TensorLoader:
        """Return the training batches of a rank."""
        sampler = make_sampler(self.shares, self.sets.train.labels, rank, world_size, self.seed)
        return TensorLoader(self.sets.train, self.batch, sampler)

    def val_dataloader(self) -> Any:
        rank, world_size = self._ranks()
        slices = (Labelled(*(t.tensor_split(world_size)[rank] for t in part)) for part in self.sets[1:])
        return [TensorLoader(part, EVALUATION_BATCH) for part in slices]
