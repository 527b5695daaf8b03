"""Updates to 97 % validation accuracy on MNIST: ordinary training on this host, for times over slow links.

    python -m benchmarks.network.accuracy --data-dir DIR

The thesis' network and set-up (arXiv:1812.02407; `examples/mnist.py`) on 4 ranks, validated every 100 updates: under
DDP its model, under gossip the consensus model. Each set-up of `schemes.py` is trained until it gets there, once. One
row a validation in ``results/network_accuracy.csv``; set-ups that are there are not trained again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from classifier import Classifier
from image_data import SOURCES, DataNotFoundError, ImageData, prepare
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from models import mlp
from tensor_data import EVALUATION_BATCH, TensorLoader

from benchmarks import RESULTS
from benchmarks.network.schemes import ACCURACY, ACCURACY_FILE, GOSSIP, make_strategy
from benchmarks.shared.options import make_parser
from benchmarks.shared.ranks import fork_ranks
from benchmarks.shared.rows import append, find, read
from benchmarks.shared.trainer import make_trainer

RANKS = 4
EVERY = 100
"""Updates from one validation to the next."""
MOST = 8000
"""Updates after which a set-up is given up."""
LIMIT = 4 * 3600.0
"""Seconds after which it is, too."""
CHOICES = ("ddp", *GOSSIP)
SEED = 1234
"""The thesis' only one."""


class ShardedValidation(ImageData):
    """MNIST of the example; each rank validates on an even part of the set, for all have the same model."""

    def val_dataloader(self) -> TensorLoader:
        trainer: Any = self.trainer
        validation, rank = self._loaded().validation, trainer.global_rank
        return TensorLoader(validation.part(torch.arange(rank, len(validation.labels), RANKS)), EVALUATION_BATCH)


class UntilAccurate(Callback):
    """Ends training at :data:`ACCURACY`; at the end it writes a row a validation.

    Args:
        name: of the set-up.
        out: the file.
    """

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.out = name, out
        self.rows: list[dict[str, object]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = float(trainer.strategy.reduce(trainer.callback_metrics["val_accuracy"], reduce_op="mean"))
        if trainer.is_global_zero:
            self.rows.append({"setup": self.name, "updates": trainer.global_step, "accuracy": accuracy})
            print(f"{self.name}: {trainer.global_step} updates, validation accuracy {accuracy:.4f}", flush=True)
        if accuracy >= ACCURACY:
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            append(self.out, self.rows)


def train(setup: str, data_dir: Path | None, out: Path) -> None:
    """Train ``setup`` until it is accurate, on the rank that the environment names."""
    torch.set_num_threads(1)
    pl.seed_everything(SEED, verbose=False)
    options = argparse.Namespace(
        batch_size=32 * RANKS, data_shares="fixed", non_iid=None, seed=SEED,
        data_dir=data_dir, validation=8800, validate_on="held-out",
    )  # fmt: skip
    trainer = make_trainer(
        devices=RANKS,
        strategy=make_strategy(setup, evaluate="consensus", shared_memory=True),
        plugins=[TorchElasticEnvironment()],
        max_steps=MOST,
        val_check_interval=EVERY,
        callbacks=[UntilAccurate(setup, out)],
    )
    trainer.fit(Classifier(mlp(), lr=0.001, momentum=0.99, seed=SEED), ShardedValidation(options, "mnist"))


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--data-dir", type=Path, help="of torchvision's MNIST; downloaded by default")
    parser.add_argument(
        "--setups", nargs="+", choices=CHOICES, default=CHOICES, metavar="NAME", help=", ".join(CHOICES)
    )
    parser.add_argument("--out", type=Path, default=RESULTS / ACCURACY_FILE)
    args = parser.parse_args()
    try:
        prepare(SOURCES["mnist"], args.data_dir)
    except DataNotFoundError as error:
        parser.error(str(error))
    for setup in args.setups:
        if not find(read(args.out), {"setup": setup}):
            fork_ranks(RANKS, partial(train, setup, args.data_dir, args.out), LIMIT)


if __name__ == "__main__":
    main()
