"""Updates to 97 % validation accuracy on MNIST: ordinary training on this host, for `network.py`'s times.

    python benchmarks/network_accuracy.py --data-dir DIR

The thesis' network and set-up (arXiv:1812.02407; `examples/mnist.py`) on 4 ranks, validated every 100 updates: under
DDP its model, under gossip the consensus model. Each set-up of `network.py` is trained until it gets there, once. One
row a validation in ``results/network_accuracy.csv``; set-ups that are there are not trained again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from classifier import Classifier
from image_data import SOURCES, DataNotFoundError, ImageData, prepare
from lightning.pytorch.callbacks import Callback
from models import mlp
from tensor_data import EVALUATION_BATCH, TensorLoader

from benchmarks import RESULTS
from benchmarks.network.schemes import ACCURACY, ACCURACY_FILE, GOSSIP, make_strategy
from benchmarks.shared.rows import append, find, read

RANKS = 4
EVERY = 100
"""Updates from one validation to the next."""
MOST = 8000
"""Updates after which a set-up is given up."""
CHOICES = ("ddp", *GOSSIP)
SEED = 1234
"""The thesis' only one."""


class ShardedValidation(ImageData):
    """MNIST of the example; each rank validates on an even part of the set, for all have the same model."""

    def val_dataloader(self) -> TensorLoader:
        validation, rank = self._loaded().validation, self.trainer.global_rank
        return TensorLoader(validation.part(torch.arange(rank, len(validation.labels), RANKS)), EVALUATION_BATCH)


class UntilAccurate(Callback):
    """Ends training at :data:`ACCURACY`; at the end it writes a row a validation.

    Args:
        setup: its name.
        out: the file.
    """

    def __init__(self, setup: str, out: Path) -> None:
        self.setup, self.out = setup, out
        self.rows: list[dict[str, object]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = float(trainer.strategy.reduce(trainer.callback_metrics["val_accuracy"], reduce_op="mean"))
        if trainer.is_global_zero:
            self.rows.append({"setup": self.setup, "updates": trainer.global_step, "accuracy": accuracy})
            print(f"{self.setup}: {trainer.global_step} updates, validation accuracy {accuracy:.4f}", flush=True)
        if accuracy >= ACCURACY:
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            append(self.out, self.rows)


def train(setup: str, data_dir: Path | None, out: Path) -> None:
    """Train ``setup`` until it is accurate; its ranks are processes that Lightning starts."""
    pl.seed_everything(SEED, verbose=False)
    options = argparse.Namespace(
        batch_size=32 * RANKS, data_shares="fixed", non_iid=None, seed=SEED,
        data_dir=data_dir, validation=8800, validate_on="held-out",
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=make_strategy(setup, evaluate="consensus", shared_memory=True),
        max_steps=MOST,
        val_check_interval=EVERY,
        callbacks=[UntilAccurate(setup, out)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(mlp(), lr=0.001, momentum=0.99, seed=SEED), ShardedValidation(options, "mnist"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="of torchvision's MNIST; downloaded by default")
    parser.add_argument(
        "--setups", nargs="+", choices=CHOICES, default=CHOICES, metavar="NAME", help=", ".join(CHOICES)
    )
    parser.add_argument("--train", choices=CHOICES, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--out", type=Path, default=RESULTS / ACCURACY_FILE)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.data_dir, args.out)
        return
    try:
        prepare(SOURCES["mnist"], args.data_dir)
    except DataNotFoundError as error:
        parser.error(str(error))
    data = [] if args.data_dir is None else ["--data-dir", str(args.data_dir)]
    for setup in args.setups:
        rows = find(read(args.out), {"setup": setup})
        if rows:
            continue
        run([sys.executable, "-m", "benchmarks.network.accuracy", "--train", setup, "--out", str(args.out), *data])


def run(command: Sequence[str]) -> None:
    """Run a training in a process of its own, which ends with this one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        if process.wait():
            sys.exit(f"network_accuracy.py: a training ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait(timeout=60)


if __name__ == "__main__":
    main()
