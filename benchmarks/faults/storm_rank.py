"""One rank of ``python -m benchmarks.faults.storm``: a small regression that writes down each of its steps.

Under gossip it is a process that the storm starts, and starts again; under DDP one of torchrun's workers, which go on
from the last checkpoint together.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.shared.options import make_parser
from lightning_gossip import ElasticGossipStrategy

FEATURES, BATCH = 16, 16
LOOK = 20
"""Steps from one look at the loss on held-out data to the next."""


def regression(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs of shape (rows, features) and what a fixed network, and some noise, make of them."""
    generator = torch.Generator().manual_seed(7)
    inner, outer = (torch.randn(shape, generator=generator) for shape in ((FEATURES, 32), (32, 1)))
    generator.manual_seed(seed)
    inputs = torch.randn(rows, FEATURES, generator=generator)
    noise = 0.1 * torch.randn(rows, 1, generator=generator)
    return inputs, torch.tanh(inputs @ inner / FEATURES**0.5) @ outer / 32**0.5 + noise


class Regression(pl.LightningModule):
    """A network of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_layers()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.layers(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.layers)


class Diary:
    """Lets a step last so long, and writes down when it ended, its number, and now and then the held-out loss.

    Args:
        folder: of one file a process.
        rank: whose.
        pace: seconds.
    """

    def __init__(self, folder: Path, rank: int, pace: float) -> None:
        self._pace = pace
        self._held_out = regression(2048, seed=2)
        self._file = (folder / "steps" / f"{rank}_{time.time():.3f}_{os.getpid()}").open("a", buffering=1)
        self._began = 0.0

    def begin(self) -> None:
        self._began = time.monotonic()

    def end(self, number: int, layers: nn.Module) -> None:
        loss = ""
        if number % LOOK == 0:
            with torch.no_grad():
                inputs, targets = self._held_out
                loss = f"{float(nn.functional.mse_loss(layers(inputs), targets)):.6g}"
        self._file.write(f"{time.time():.3f},{number},{loss}\n")
        time.sleep(max(0.0, self._pace - (time.monotonic() - self._began)))


class DiaryCallback(Callback):
    """Keeps a :class:`Diary` of a Trainer's steps.

    Args:
        folder, pace: of the diary.
    """

    def __init__(self, folder: Path, pace: float) -> None:
        self._folder, self._pace = folder, pace
        self._diary: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._diary = Diary(self._folder, trainer.global_rank, self._pace)

    def on_train_batch_start(self, *args: Any) -> None:
        self._diary.begin()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._diary.end(trainer.global_step, pl_module.layers)


def make_layers() -> nn.Sequential:
    """Return the network that all schemes train."""
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 1))


def make_optimizer(layers: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(layers.parameters(), lr=2e-3)


def data_of(ranks: int) -> TensorDataset:
    """Return the training data of all ranks."""
    return TensorDataset(*regression(ranks * BATCH * 1000, seed=1))


def make_rank_parser(spec: Any, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that each rank of a storm has."""
    parser = make_parser(spec, doc)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--pace", type=float, required=True, help="seconds that a step takes at least")
    return parser


def main() -> None:
    parser = make_rank_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--scheme", choices=("asynchronous", "gossip", "ddp"), required=True)
    add("--lost-after", type=float, required=True, help="seconds")
    add("--every", type=int, default=50, help="steps from one checkpoint of ddp to the next")
    args = parser.parse_args()
    pl.seed_everything(1, verbose=False)
    callbacks: list[Callback] = [DiaryCallback(args.folder, args.pace)]
    strategy: Any = "ddp"
    if args.scheme != "ddp":
        strategy = ElasticGossipStrategy(
            probability=1 / 8,
            asynchronous=args.scheme == "asynchronous",
            min_replicas=1,
            lost_after=timedelta(seconds=args.lost_after),
            timeout=timedelta(seconds=120),
        )
    else:
        callbacks.append(ModelCheckpoint(args.folder, every_n_train_steps=args.every, save_last=True, save_top_k=0))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=args.ranks,
        strategy=strategy,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=args.scheme == "ddp",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=args.folder,
    )
    last = args.folder / "last.ckpt"
    resumed = str(last) if args.scheme == "ddp" and last.exists() else None
    loader = DataLoader(data_of(args.ranks), BATCH, shuffle=True)
    trainer.fit(Regression(), loader, ckpt_path=resumed)


if __name__ == "__main__":
    main()
