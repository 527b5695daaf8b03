"""A small training, started by the tests that need real processes; each rank leaves what it saw in a JSON file."""

# a Trainer gets its attributes at run time, and what is an attribute of a module torch declares Tensor | Module
# mypy: disable-error-code="attr-defined, union-attr, operator"

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gossip
from lightning_gossip.strategies import surviving


class Blobs(pl.LightningModule):
    """Two classes, told apart by the sum of eight features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Fault(Callback):
    """Does something to one rank at one batch, and records who trains, and how each rank ended.

    ``paced`` is slow until the test has seen what it waits for and writes the file "enough"."""

    def __init__(self, kind: str, rank: int, batch: int, out: Path) -> None:
        self.kind, self.rank, self.batch, self.out = kind, rank, batch, out
        self.done = False
        self.training = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        (self.out / f"pid_{trainer.global_rank}").write_text(str(os.getpid()))
        if self.kind == "setup" and trainer.global_rank == self.rank:
            raise ValueError("boom in setup")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.training:
            self.training = True
            (self.out / f"training_{trainer.global_rank}").write_text(str(os.getpid()))
        if self.kind == "slow":
            time.sleep(0.05)
        if self.kind == "paced" and not (self.out / "enough").exists():
            time.sleep(0.3)
        if trainer.global_rank != self.rank or trainer.global_step < self.batch or self.done:
            return  # a count may skip some: where batches are dealt, ranks count on from the one that has most
        self.done = True
        if self.kind == "raise":
            raise ValueError("boom")
        if self.kind == "shard":
            os.kill(trainer.strategy._processes[0].pid, signal.SIGKILL)
        if self.kind == "hang":
            time.sleep(3600)
        if self.kind in ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, self.kind))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        ending = {"type": type(exception).__name__, "text": str(exception), "time": time.time()}
        (self.out / f"ending_{trainer.global_rank}.json").write_text(json.dumps(ending))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategy", nargs="+", default=["elastic_gossip"], help="one training after the other")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--fits", type=int, default=1, help="each after the first goes on for one more epoch")
    parser.add_argument("--timeout", type=float, default=0, help="seconds; 0 keeps the named strategy's default")
    parser.add_argument("--probability", type=float, default=1.0)
    parser.add_argument("--min-replicas", type=int)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--lost-after", type=float, default=30, help="seconds")
    parser.add_argument("--start-method", default="popen")
    parser.add_argument("--start-seconds", type=float, help="for all ranks to come; the package's own by default")
    parser.add_argument("--fault", default="none:0:0", help="kind:rank:batch")
    args = parser.parse_args()

    for name in args.strategy:
        train(name, args)


def train(name: str, args: argparse.Namespace) -> None:
    kind, rank, batch = args.fault.split(":")
    pl.seed_everything(1, verbose=False)
    x = torch.randn(512, 8)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    strategy: Any = name
    if args.timeout:
        strategy = lightning_gossip.ElasticGossipStrategy(
            timeout=timedelta(seconds=args.timeout),
            probability=args.probability,
            min_replicas=args.min_replicas,
            restarts=args.restarts,
            lost_after=timedelta(seconds=args.lost_after),
            start_method=args.start_method,
        )
    if args.start_seconds:
        vars(surviving)["START_TIMEOUT"] = timedelta(seconds=args.start_seconds)
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.nodes,
        strategy=strategy,
        max_epochs=args.epochs,
        logger=False,
        default_root_dir=args.out,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Fault(kind, int(rank), int(batch), args.out)],
    )
    module = Blobs()
    for _ in range(args.fits):
        trainer.fit(module, DataLoader(data, 16, shuffle=True), DataLoader(data, 64))
        trainer.fit_loop.max_epochs += 1
    [tested] = trainer.test(module, DataLoader(data, 64), verbose=False)
    result = {
        "accuracy": tested["accuracy"],
        "step": trainer.strategy.step,
        "state": {name: value.flatten().tolist() for name, value in module.state_dict().items()},
    }
    (args.out / f"result_{trainer.global_rank}.{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
