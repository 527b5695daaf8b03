"""What a worker that is 5 x slower does to the others within an epoch: blocks with and without it, in turn, in one fit.

    python -m benchmarks.downpour.straggler [--settings sleep-downpour mnist-downpour ...]

Forked ranks train one epoch together, cut into blocks of time. In a *slow* block the last rank adds four times its own
usual step to every step. Blocks come in pairs: A/B, one of the two slow (first and second in turn), and A/A, neither:
what the machine's noise makes of no difference. The other ranks' mean step in each block is compared within a pair.

A model of slowness on one host must not hand the slow rank's core to the others. Hence two kinds of compute: ``sleep``,
3 ranks that only sleep 35 ms a step, so that the processors are never the limit; and ``mnist``, 2 ranks that train the
thesis' MNIST network on a core each. There the slow rank spins in place of its pause (its core stays as busy as
before), or sleeps (``mnist-downpour-idle``: the shard gets a core of its own, which flatters the ratio).
``sleep-elastic-gossip`` shows what the same benchmark says where partners do wait for one another.

One row a pair in ``results/downpour_straggler.csv``; a setting that has its rows is not run again.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from benchmarks import RESULTS
from benchmarks.downpour.step import BATCH, mnist_model
from benchmarks.shared.machine import cores
from benchmarks.shared.options import make_parser
from benchmarks.shared.quartiles import in_words
from benchmarks.shared.rows import append, find, read
from benchmarks.shared.trainer import make_trainer
from benchmarks.shared.workloads import Batch, Model, SameBatch, perceptron
from lightning_gossip import DownpourStrategy, ElasticGossipStrategy

FACTOR = 5
"""A slow step, in usual ones."""
STEP_SECONDS = 0.035
"""Of a step that sleeps."""
WARM_SECONDS = 4.0
"""Before the first block."""
SETTLE_SECONDS = 0.3
"""At the beginning of a block, in which steps are not counted: those of the block before are still answered."""
LIMIT = timedelta(minutes=2)


@dataclass(frozen=True)
class Setting:
    """``pause`` is how the slow rank spends its extra time: ``"sleep"`` or ``"spin"``."""

    strategy: str
    compute: str
    workers: int
    pause: str


SETTINGS = {
    "sleep-downpour": Setting("downpour", "sleep", 3, "sleep"),
    "mnist-downpour": Setting("downpour", "mnist", 2, "spin"),
    "mnist-downpour-idle": Setting("downpour", "mnist", 2, "sleep"),
    "sleep-elastic-gossip": Setting("elastic-gossip", "sleep", 3, "sleep"),
}


class Sleeper(Model):
    """Holds the MNIST network and sleeps in place of training it: every step sends as much, and needs no core."""

    def __init__(self) -> None:
        super().__init__(perceptron(), partial(torch.optim.SGD, lr=0.002))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        time.sleep(STEP_SECONDS)


class UntilTheEnd(SameBatch):
    """One random batch again and again, until the clock says ``end``."""

    def __init__(self) -> None:
        super().__init__((torch.randn(BATCH, 784), torch.randint(10, (BATCH,))))
        self.end = float("inf")

    def __iter__(self) -> Iterator[Batch]:
        return takewhile(lambda _: time.monotonic() < self.end, super().__iter__())


class Blocks(Callback):
    """Slows the last rank down in the slow blocks, and writes when each step of a rank began.

    Args:
        slow: whether a block is slow, for each.
        seconds: a block's length.
        pause: see :class:`Setting`.
        data: ends with the last block.
        folder: for ``rank_<k>.npy``: seconds since the first block began.
    """

    def __init__(self, slow: list[bool], seconds: float, pause: str, data: UntilTheEnd, folder: Path) -> None:
        self.slow, self.seconds, self.pause, self.data, self.folder = slow, seconds, pause, data, folder
        self.begin = 0.0
        self.starts: list[float] = []
        self.usual: deque[float] = deque(maxlen=200)  # steps without a pause
        self.paused = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.begin = trainer.strategy.broadcast(time.monotonic()) + WARM_SECONDS  # one clock for all processes
        self.data.end = self.begin + len(self.slow) * self.seconds

    def on_train_batch_start(self, *args: Any) -> None:
        now = time.monotonic() - self.begin
        if self.starts and not self.paused:
            self.usual.append(now - self.starts[-1])
        self.starts.append(now)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        block = int((time.monotonic() - self.begin) // self.seconds)
        last = trainer.global_rank == trainer.world_size - 1
        self.paused = last and 0 <= block < len(self.slow) and self.slow[block]
        if not self.paused:
            return
        end = time.monotonic() + (FACTOR - 1) * sum(self.usual) / len(self.usual)
        if self.pause == "sleep":
            time.sleep(end - time.monotonic())
        while time.monotonic() < end:
            pass

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        np.save(self.folder / f"rank_{trainer.global_rank}.npy", np.array(self.starts))


def plan(pairs: int, pairs_alike: int) -> tuple[list[str], list[bool]]:
    """Return the kind of each pair, evenly mixed, and whether each block is slow, two a pair."""
    total = pairs + pairs_alike
    kinds = ["A/A" if (i + 1) * pairs_alike // total > i * pairs_alike // total else "A/B" for i in range(total)]
    slow: list[bool] = []
    for kind, before in zip(kinds, np.cumsum([kind == "A/B" for kind in kinds]), strict=True):
        odd = bool(before % 2)
        slow += [False, False] if kind == "A/A" else [not odd, odd]
    return kinds, slow


def run(setting: Setting, slow: list[bool], seconds: float) -> NDArray[np.float64]:
    """Train through all blocks; return each rank's mean step in each in seconds, shape ``(ranks, blocks)``."""
    common: dict[str, Any] = {"evaluate": "replica", "start_method": "fork", "timeout": LIMIT}
    strategy = DownpourStrategy(**common) if setting.strategy == "downpour" else ElasticGossipStrategy(**common)
    data = UntilTheEnd()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            devices=setting.workers,
            strategy=strategy,
            max_epochs=1,
            callbacks=[Blocks(slow, seconds, setting.pause, data, Path(folder))],
        )
        trainer.fit(mnist_model() if setting.compute == "mnist" else Sleeper(), DataLoader(data, batch_size=None))
        starts = [np.load(Path(folder) / f"rank_{rank}.npy") for rank in range(setting.workers)]
    return np.array([[mean_step(rank, block * seconds, seconds) for block in range(len(slow))] for rank in starts])


def mean_step(starts: NDArray[np.float64], begin: float, seconds: float) -> float:
    """Return the mean length of the steps that lie within a block, in seconds."""
    inside = starts[(starts >= begin + SETTLE_SECONDS) & (starts < begin + seconds)]
    if len(inside) < 3:
        raise RuntimeError(f"a rank took {len(inside)} steps in a block of {seconds} s: give --seconds a larger value")
    return float((inside[-1] - inside[0]) / (len(inside) - 1))


def compare(kinds: list[str], slow: list[bool], steps: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return what each pair of blocks says, of mean steps of shape ``(ranks, blocks)``."""
    pairs = steps.reshape(len(steps), len(kinds), 2)
    rows = []
    for pair, kind in enumerate(kinds):
        first, second = pairs[:, pair].T
        # of two blocks alike, the second stands for the one with a slow worker
        without, with_ = (second, first) if slow[2 * pair] else (first, second)
        row = {"kind": kind, "pair": pair, "without_ms": without[:-1].mean(), "with_ms": with_[:-1].mean()}
        ratios = {"ratio": row["with_ms"] / row["without_ms"], "slow_worker_ratio": with_[-1] / without[-1]}
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in (row | ratios).items()})
    return rows


def print_summary(name: str, rows: list[dict[str, str]]) -> None:
    for kind in ("A/A", "A/B"):
        columns = {
            column: np.array([float(row[column]) for row in rows if row["kind"] == kind])
            for column in ("without_ms", "ratio", "slow_worker_ratio")
        }
        print(
            f"{name}, {kind}: the others' step {in_words(columns['without_ms'])} ms, with / without"
            f" {in_words(columns['ratio'])}; the slow worker's own {in_words(columns['slow_worker_ratio'])}",
            flush=True,
        )


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--pairs", type=int, default=14, help="of blocks, with and without the slow worker")
    parser.add_argument("--pairs-alike", type=int, default=6, help="of blocks, both without")
    parser.add_argument("--seconds", type=float, default=2.0, help="a block")
    parser.add_argument("--out", type=Path, default=RESULTS / "downpour_straggler.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds, slow = plan(args.pairs, args.pairs_alike)
    for name in args.settings:
        setting = SETTINGS[name]
        if not find(read(args.out), {"setting": name}):
            given = {"setting": name, "workers": setting.workers, "pause": setting.pause, "cores": cores()}
            given["block_seconds"] = args.seconds
            rows = compare(kinds, slow, 1000 * run(setting, slow, args.seconds))
            append(args.out, [given | row for row in rows], digits=5)
        print_summary(name, find(read(args.out), {"setting": name}))


if __name__ == "__main__":
    main()
