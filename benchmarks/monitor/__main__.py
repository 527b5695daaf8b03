"""What GossipMonitor costs: blocks of steps with and without it, in turn, in one training of forked ranks.

    python benchmarks/monitor.py

First pairs of blocks that both go without (A/A: what the machine's noise makes of no difference), then pairs with and
without (A/B), the order within a pair alternating. A block is as long as the monitor's interval, so that every block
with it holds one step that is measured and logged. The model is the thesis' MNIST network; the data are random.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from benchmarks import RESULTS
from benchmarks.shared.workloads import Model, SameBatch, perceptron
from lightning_gossip import ElasticGossipStrategy, GossipMonitor, RankTensorBoardLogger
from lightning_gossip.exchange import clock as exchange

Times = NDArray[np.float64]
"""Seconds of each block, and those spent in the monitor and in measuring distances; shape ``(2, blocks)``."""


class Switched(Callback):
    """Runs a monitor in some blocks of ``every_n_steps`` steps, and times all blocks but the first, which warms up.

    Args:
        on: whether the monitor runs, for each block after the first.
        every_n_steps: the monitor's, and a block's length.
        out: folder for each rank's times.
    """

    def __init__(self, on: list[bool], every_n_steps: int, out: Path) -> None:
        self.monitor = GossipMonitor(every_n_steps)
        self.on = [True, *on]  # its first step loads and opens what it needs
        self.length = every_n_steps
        self.out = out
        self.ends: list[float] = []
        self.inside = np.zeros(len(self.on))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.monitor.on_train_start(trainer, pl_module)
        self.ends.append(time.perf_counter())
        measure = exchange._mean_distance

        def timed(*args: Any) -> float:
            start = time.perf_counter()
            distance = measure(*args)
            self.inside[len(self.ends) - 1] += time.perf_counter() - start
            return distance

        exchange._mean_distance = timed

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        block = len(self.ends) - 1
        if self.on[block]:
            start = time.perf_counter()
            self.monitor.on_train_batch_end(trainer, *args)
            self.inside[block] += time.perf_counter() - start
        if trainer.strategy.step % self.length == 0:
            self.ends.append(time.perf_counter())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        np.save(self.out / f"{trainer.global_rank}.npy", np.stack([np.diff(self.ends), self.inside])[:, 1:])


def run(on: list[bool], args: argparse.Namespace) -> Times:
    """Train through all blocks and return the means over the ranks."""
    model = Model(perceptron(), partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True, fused=True))
    batch = (torch.randn(args.batch_size, 784), torch.randint(10, (args.batch_size,)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=args.devices,
            strategy=ElasticGossipStrategy(start_method="fork", timeout=timedelta(minutes=1)),
            logger=RankTensorBoardLogger(folder, name="logs"),
            callbacks=[Switched(on, args.every_n_steps, Path(folder))],
            max_steps=(len(on) + 1) * args.every_n_steps,
            log_every_n_steps=args.every_n_steps,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, DataLoader(SameBatch(batch), batch_size=None))
        return np.mean([np.load(Path(folder) / f"{rank}.npy") for rank in range(args.devices)], axis=0)


def quartiles(values: Times, form: str = "{:.3f}") -> str:
    """Return median and quartiles in words."""
    low, median, high = (form.format(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return f"{median} (quartiles {low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="of blocks, with and without")
    parser.add_argument("--pairs-alike", type=int, default=20, help="of blocks, both without")
    parser.add_argument("--every-n-steps", type=int, default=50)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32, help="of a rank")
    parser.add_argument("--out", type=Path, default=RESULTS / "monitor.csv")
    args = parser.parse_args()

    kinds = ["A/A"] * args.pairs_alike + ["A/B"] * args.pairs
    on = [kind == "A/B" and (pair + place) % 2 == 1 for pair, kind in enumerate(kinds) for place in (0, 1)]
    seconds, inside = run(on, args).reshape(2, len(kinds), 2) / args.every_n_steps * 1e3
    # the second of an A/A pair stands for "with"; in every other pair the one with the monitor comes first
    second = np.array([pair % 2 == 0 for pair in range(len(kinds))])
    without, with_ = np.where(second, seconds.T, seconds.T[::-1])
    cost = inside.sum(axis=1)

    machine = f"{os.cpu_count()} cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    setting = f"{args.devices} ranks, batch {args.batch_size} a rank, every_n_steps {args.every_n_steps}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        file.write(f"# {machine} of memory; {setting}; milliseconds a step, means over the ranks and a block\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "pair", "without_ms", "with_ms", "ratio", "inside_monitor_ms"])
        for row in zip(kinds, range(len(kinds)), without, with_, with_ / without, cost, strict=True):
            writer.writerow([f"{value:.5g}" if isinstance(value, float) else value for value in row])

    print(f"{machine}; {setting}")
    for kind in dict.fromkeys(kinds):
        chosen = np.array([k == kind for k in kinds])
        print(f"{kind}: step without {quartiles(without[chosen], '{:.1f}')} ms")
        print(f"{kind}: ratio with / without {quartiles((with_ / without)[chosen])}")
    chosen = np.array([k == "A/B" for k in kinds])
    print(f"inside the monitor and its measurement: {quartiles((cost / with_)[chosen], '{:.2%}')} of a step")


if __name__ == "__main__":
    main()
