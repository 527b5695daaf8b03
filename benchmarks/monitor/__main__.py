"""What GossipMonitor costs: blocks of steps with and without it, in turn, in one training of forked ranks.

    python -m benchmarks.monitor

First pairs of blocks that both go without (A/A: what the machine's noise makes of no difference), then pairs with and
without (A/B), the order within a pair alternating. A block is as long as the monitor's interval, so that every block
with it holds one step that is measured and logged. The model is the thesis' MNIST network; the data are random.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import RESULTS
from benchmarks.shared import machine
from benchmarks.shared.options import make_parser
from benchmarks.shared.quartiles import in_words
from benchmarks.shared.rows import write
from benchmarks.shared.trainer import make_trainer
from benchmarks.shared.workloads import Model, SameBatch, perceptron
from lightning_gossip import ElasticGossipStrategy, GossipMonitor, RankTensorBoardLogger
from lightning_gossip.exchange import clock as exchange

Times = NDArray[np.float64]
"""Seconds of each block, and those spent in the monitor and in measuring distances; shape ``(2, blocks)``."""
COLUMNS = ("kind", "pair", "without_ms", "with_ms", "ratio", "inside_monitor_ms")


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
        measure = exchange.mean_distance

        def timed(own: Sequence[Tensor], received: Sequence[Sequence[Tensor]]) -> float:
            start = time.perf_counter()
            distance = measure(own, received)
            self.inside[len(self.ends) - 1] += time.perf_counter() - start
            return distance

        exchange.mean_distance = timed

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
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
        trainer = make_trainer(
            devices=args.devices,
            strategy=ElasticGossipStrategy(start_method="fork", timeout=timedelta(minutes=1)),
            logger=RankTensorBoardLogger(folder, name="logs"),
            callbacks=[Switched(on, args.every_n_steps, Path(folder))],
            max_steps=(len(on) + 1) * args.every_n_steps,
            log_every_n_steps=args.every_n_steps,
        )
        trainer.fit(model, DataLoader(SameBatch(batch), batch_size=None))
        return np.mean([np.load(Path(folder) / f"{rank}.npy") for rank in range(args.devices)], axis=0)


def main() -> None:
    parser = make_parser(__spec__, __doc__)
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

    setting = f"{args.devices} ranks, batch {args.batch_size} a rank, every_n_steps {args.every_n_steps}"
    comment = f"{machine.in_words()}; {setting}; milliseconds a step, means over the ranks and a block"
    values = zip(kinds, range(len(kinds)), without, with_, with_ / without, cost, strict=True)
    write(args.out, COLUMNS, [dict(zip(COLUMNS, row, strict=True)) for row in values], digits=5, comment=comment)

    print(f"{machine.in_words()}; {setting}")
    for kind in dict.fromkeys(kinds):
        chosen = np.array([k == kind for k in kinds])
        print(f"{kind}: step without {in_words(without[chosen], '.1f')} ms")
        print(f"{kind}: ratio with / without {in_words((with_ / without)[chosen])}")
    chosen = np.array([k == "A/B" for k in kinds])
    print(f"inside the monitor and its measurement: {in_words((cost / with_)[chosen], '.2%')} of a step")


if __name__ == "__main__":
    main()
