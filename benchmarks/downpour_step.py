"""What Downpour costs a training step: the time that `Trainer.fit` spends in its calls, as a share of the step.

    python benchmarks/downpour_step.py [--steps 200] [--n-push 5]

The thesis' MNIST network (784-1024-1024-1024-10, 2.9 million float32 parameters) on random data of MNIST's shape, batch
32 a rank, SGD; ranks and the server's shard share this host's cores. One row a number of ranks in
``results/downpour_step.csv``; those that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gossip import DownpourStrategy

RESULTS = Path(__file__).parent / "results" / "downpour_step.csv"
RANKS = (2, 4)
BATCH = 32
WARM = 20
"""Steps before those that are measured."""


@dataclass
class Row:
    """One setting and what came of it: milliseconds are means over steps and ranks, but for the median step."""

    ranks: int
    shards: int
    n_push: int
    n_pull: int
    steps: int
    cores: int
    step_ms: float = 0.0
    step_median_ms: float = 0.0
    call_ms: float = 0.0
    call_share: float = 0.0
    wait_share: float = 0.0
    pushes: int = 0
    pulls: int = 0


class Network(pl.LightningModule):
    """The thesis' MNIST network."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (784, 1024, 1024, 1024, 10)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.002)


class Stopwatch(Callback):
    """Writes each rank's step times and the seconds of them that Downpour took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begin = 0.0
        self.seen: dict[str, Any] = {"step": [], "call": [], "wait": []}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if batch_idx > WARM:
            stats = trainer.strategy.downpour_stats
            self.seen["step"].append(now - self.begin)
            self.seen["call"].append(stats.call_seconds)
            self.seen["wait"].append(stats.wait_seconds)
            self.seen["pushes"], self.seen["pulls"] = stats.pushes, stats.pulls
        self.begin = now

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(self.seen, self.folder / f"rank_{trainer.global_rank}.pt")


def measure(row: Row) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        size = row.ranks * BATCH * (row.steps + WARM + 1)
        data = TensorDataset(torch.randn(4096, 784), torch.randint(10, (4096,)))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=row.ranks,
            strategy=DownpourStrategy(
                n_push=row.n_push,
                n_pull=row.n_pull,
                shards=row.shards,
                evaluate="replica",
                timeout=timedelta(minutes=2),
                start_method="fork",
            ),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Stopwatch(Path(folder))],
        )
        sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=size // row.ranks)
        trainer.fit(Network(), DataLoader(data, BATCH, sampler=sampler))
        ranks = [torch.load(Path(folder) / f"rank_{rank}.pt") for rank in range(row.ranks)]
    steps, calls, waits = ([t for rank in ranks for t in rank[key]] for key in ("step", "call", "wait"))
    row.step_ms = 1000 * statistics.mean(steps)
    row.step_median_ms = 1000 * statistics.median(steps)
    row.call_ms = 1000 * statistics.mean(calls)
    row.call_share = sum(calls) / sum(steps)
    row.wait_share = sum(waits) / sum(steps)
    row.pushes, row.pulls = (sum(rank[key] for rank in ranks) for key in ("pushes", "pulls"))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="measured, a rank")
    parser.add_argument("--n-push", type=int, default=5)
    parser.add_argument("--n-pull", type=int, default=None, help="as --n-push by default: one round trip for both")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n_pull = arguments.n_push if arguments.n_pull is None else arguments.n_pull
    given = [field.name for field in fields(Row)][:6]
    for ranks in RANKS:
        row = Row(ranks, arguments.shards, arguments.n_push, n_pull, arguments.steps, os.cpu_count() or 1)
        there = list(csv.DictReader(arguments.out.open())) if arguments.out.exists() else []
        if any(all(old[key] == str(getattr(row, key)) for key in given) for old in there):
            continue
        done = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in asdict(measure(row)).items()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(done))
            if not there:
                writer.writeheader()
            writer.writerow(done)
        print(", ".join(f"{key} {value}" for key, value in done.items()), flush=True)


if __name__ == "__main__":
    main()
