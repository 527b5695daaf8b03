"""Runs whose work is dealt on demand: rows that say which they are, and ranks that record what they trained."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from forked import Linear, Recorder, recorded, regression
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gossip import DownpourStrategy

TIMEOUT = timedelta(seconds=30)

SLOW = (0.06, 0.02, 0.02, 0.02)
"""Seconds of a step of four ranks, one of which is slow."""


class Plain:
    """Iterable, and nothing else."""

    def __iter__(self) -> Any:
        return iter(DataLoader(Numbered(16), 2))


class Rows(IterableDataset[Any]):
    def __init__(self, rows: int = 24) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        data = Numbered(self.rows)
        return (data[index] for index in range(self.rows))


class Numbered(Dataset[Any]):
    """Rows that say which they are."""

    def __init__(self, rows: int) -> None:
        self.data = regression(rows)

    def __getitem__(self, index: int) -> Any:
        return (*self.data[index], index)

    def __len__(self) -> int:
        return len(self.data)


class Walk(Linear):
    """Records which samples this rank trained in each epoch, and when the epoch was over for it.

    Args:
        rows: of the training set.
        pauses: seconds of each rank's step, in the order of the ranks.
        loader: options of the loader.
    """

    def __init__(self, rows: int = 96, pauses: tuple[float, ...] = (), **loader: Any) -> None:
        super().__init__()
        self.rows, self.pauses = rows, pauses
        self.loader = {"batch_size": 2, "shuffle": True} | loader

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        epochs = recorded(self).setdefault("epochs", {})
        epochs.setdefault(self.trainer.current_epoch, []).append(torch.as_tensor(index).flatten().tolist())
        if self.pauses:
            time.sleep(self.pauses[self.trainer.global_rank])
        if recorded(self).get("first") is None:
            recorded(self)["first"] = self.trainer.num_training_batches
        ends = recorded(self).setdefault("ends", {})
        ends[self.trainer.current_epoch] = time.monotonic()
        lasts = recorded(self).setdefault("lasts", {})
        lasts[self.trainer.current_epoch] = self.trainer.is_last_batch
        return super().training_step((torch.atleast_2d(x), torch.atleast_1d(y)), batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(Numbered(self.rows), **self.loader)

    def val_dataloader(self) -> Any:
        return DataLoader(regression(8), 2)


class Watcher(Recorder):
    """Records the counts at which this rank validated and saved."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen |= {"validated": [], "saved": []}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen["validated"].append((trainer.current_epoch, trainer.global_step))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.seen["saved"].append(checkpoint["global_step"])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["global_step"], self.seen["epoch"] = trainer.global_step, trainer.current_epoch
        super().on_fit_end(trainer, pl_module)


def downpour(**kwargs: Any) -> DownpourStrategy:
    options: dict[str, Any] = {"n_push": 2, "n_pull": 2, "start_method": "fork", "timeout": TIMEOUT}
    return DownpourStrategy(**options | kwargs)


def train(
    folder: Path,
    module: pl.LightningModule,
    strategy: Any = None,
    devices: int = 4,
    callbacks: Any = (),
    ckpt_path: Any = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy or downpour(),
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        num_sanity_val_steps=0,
        callbacks=[*callbacks, Watcher(folder)],
        **kwargs,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(devices)]


def samples(results: list[dict[str, Any]], epoch: int) -> list[int]:
    return sorted(index for result in results for batch in result["epochs"].get(epoch, ()) for index in batch)


def batches(results: list[dict[str, Any]], epoch: int) -> list[int]:
    return [len(result["epochs"].get(epoch, ())) for result in results]


def alike(results: list[dict[str, Any]], *names: str) -> None:
    for name in ("validated", "saved", "global_step", "epoch", *names):
        assert all(result[name] == results[0][name] for result in results), (name, results)
