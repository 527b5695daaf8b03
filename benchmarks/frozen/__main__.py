"""A model with a large frozen base and a small part that trains, as with adapters: what a validation and a save cost.

    python -m benchmarks.frozen --label "0.1.0"
    python -m benchmarks.frozen --table     # what is there, without measuring

Two ranks on one host. Seconds are those of rank 0, memory is the peak of its resident set above what it was before, the
second validation and the second save of a training. Rows in ``results/frozen.csv`` are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gossip
from benchmarks import RESULTS
from benchmarks.shared import rows
from benchmarks.shared.options import listed, make_parser
from benchmarks.shared.processes import run
from benchmarks.shared.tables import show
from benchmarks.shared.trainer import make_trainer, quieten

FILE = "frozen.csv"
STRATEGIES = ("ddp", "elastic_gossip", "downpour")
WIDTH = 3536
"""Of a layer: 50 MB in float32."""


class Adapted(pl.LightningModule):
    """A frozen base of layers of 50 MB, and a linear layer over its output that trains."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(megabytes // 50))).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH // 50)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.adapter(self.base[0](batch[0])).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Meter(Callback):
    """Measures validations from outside all hooks, and saves at the ends of epochs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, list[tuple[float, float]]] = {"validation": [], "save": []}

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = _status("VmRSS"), time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.seen[what].append((seconds, _status("VmHWM") - before))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        run_loop: Callable[[], Any] = loop.run

        def run() -> Any:
            with self.measured("validation"):
                return run_loop()

        loop.run = run

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with self.measured("save"):
            trainer.save_checkpoint(self.folder / "last.ckpt")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 0:
            (self.folder / "seen.json").write_text(json.dumps(self.seen))


def _status(field: str) -> float:
    """Return a field of this process's memory, in MB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1000


def train(strategy: str, megabytes: int, folder: Path) -> None:
    quieten()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(16, WIDTH))
    named: Any = strategy if strategy == "ddp" else getattr(lightning_gossip, _CLASSES[strategy])()
    trainer = make_trainer(strategy=named, devices=2, max_epochs=3, callbacks=[Meter(folder)])
    trainer.fit(Adapted(megabytes), DataLoader(data, 4), DataLoader(data, 4))


_CLASSES = {"elastic_gossip": "ElasticGossipStrategy", "downpour": "DownpourStrategy"}


def measure(label: str, strategy: str, megabytes: int) -> dict[str, Any]:
    """Train once in processes of its own; return the row."""
    folder = Path(tempfile.mkdtemp(prefix="frozen_"))
    try:
        line = [sys.executable, "-m", "benchmarks.frozen", "--train", strategy, "--folder", str(folder)]
        os.environ["OMP_NUM_THREADS"] = "1"
        with (folder / "output").open("ab") as stream:
            code = run([*line, "--frozen", str(megabytes)], stream)
        if code != 0:
            sys.exit((folder / "output").read_text()[-3000:])
        seen = json.loads((folder / "seen.json").read_text())
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".ckpt", ".pt")]
        (validation, validation_mb), (save, save_mb) = seen["validation"][1], seen["save"][1]
        return {
            "label": label,
            "strategy": strategy,
            "frozen_mb": megabytes,
            "validation_s": validation,
            "validation_mb": validation_mb,
            "save_s": save,
            "save_mb": save_mb,
            "disk_mb": sum(path.stat().st_size for path in files) / 1e6,
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--label", help="of the version that is measured, such as its number")
    add("--strategies", type=listed(str), default=list(STRATEGIES))
    add("--frozen", type=int, default=200, metavar="MB")
    add("--results", type=Path, default=RESULTS, help="folder of the rows")
    add("--table", action="store_true", help="print what is there, and measure nothing")
    add("--train", help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.frozen, arguments.folder)
        return
    path = arguments.results / FILE
    for strategy in arguments.strategies if not arguments.table else ():
        given = {"label": arguments.label, "strategy": strategy, "frozen_mb": arguments.frozen}
        if not rows.find(rows.read(path), given):
            rows.append(path, [measure(arguments.label, strategy, arguments.frozen)], digits=3)
    there = rows.read(path)
    show("A validation and a save", list(there[0]), [list(row.values()) for row in there])


if __name__ == "__main__":
    main()
