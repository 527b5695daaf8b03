"""What Downpour costs a training step: the time that `Trainer.fit` spends in its calls, as a share of the step.

    python -m benchmarks.downpour.step [--steps 200] [--n-push 5] [--optimizer sgd-fused]

The thesis' MNIST network (2.9 million float32 parameters) on random data of MNIST's shape, batch
32 a rank, plain SGD in torch's default implementation or its fused one (which the examples use); ranks and the server's
shard share this host's cores. One row a repetition in ``results/downpour_step.csv``, each a training of its own; those
that are there already are not measured again.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import RESULTS
from benchmarks.shared.machine import cores
from benchmarks.shared.options import make_parser
from benchmarks.shared.quartiles import in_words
from benchmarks.shared.rows import append, find, read
from benchmarks.shared.trainer import make_trainer
from benchmarks.shared.workloads import Model, perceptron
from lightning_gossip import DownpourStrategy

RANKS = (2, 4)
OPTIMIZERS = ("sgd", "sgd-fused")
BATCH = 32
WARM = 20
"""Steps before those that are measured."""


@dataclass
class Row:
    """One setting and what came of it: milliseconds are means over steps and ranks, but for the median step."""

    ranks: int
    optimizer: str
    shards: int
    n_push: int
    n_pull: int
    steps: int
    cores: int
    repetition: int
    step_ms: float = 0.0
    step_median_ms: float = 0.0
    call_ms: float = 0.0
    call_share: float = 0.0
    wait_share: float = 0.0
    pushes: int = 0
    pulls: int = 0


def mnist_model(fused: bool = False) -> Model:
    """Return the thesis' MNIST network with plain SGD."""
    return Model(perceptron(), partial(torch.optim.SGD, lr=0.002, fused=fused))


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
        trainer = make_trainer(
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
            callbacks=[Stopwatch(Path(folder))],
        )
        sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=size // row.ranks)
        trainer.fit(mnist_model(fused=row.optimizer == "sgd-fused"), DataLoader(data, BATCH, sampler=sampler))
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
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--steps", type=int, default=200, help="measured, a rank")
    parser.add_argument("--n-push", type=int, default=5)
    parser.add_argument("--n-pull", type=int, default=None, help="as --n-push by default: one round trip for both")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS / "downpour_step.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n_pull = args.n_push if args.n_pull is None else args.n_pull
    names = [field.name for field in fields(Row)]
    given = names[: names.index("repetition") + 1]
    for repetition in range(args.repetitions):
        for ranks in RANKS:
            setting = (ranks, args.optimizer, args.shards, args.n_push, n_pull, args.steps, cores())
            row = Row(*setting, repetition)
            if not find(read(args.out), {name: getattr(row, name) for name in given}):
                append(args.out, [asdict(measure(row))])
    for ranks in RANKS:
        setting = (ranks, args.optimizer, args.shards, args.n_push, n_pull, args.steps, cores())
        rows = find(read(args.out), dict(zip(given, setting, strict=False)))
        print(f"{ranks} ranks, {args.optimizer}, {len(rows)} repetitions:")
        for name in ("step_median_ms", "call_ms", "call_share", "wait_share"):
            print(f"    {name} {in_words([float(row[name]) for row in rows], '.4g')}", flush=True)


if __name__ == "__main__":
    main()
