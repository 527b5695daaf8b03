"""The command line that all examples share: options, strategy, Trainer, and the table at the end."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lightning_gossip import (
    DownpourStrategy,
    ElasticGossipStrategy,
    GossipMonitor,
    GossipStrategy,
    RankTensorBoardLogger,
)
from lightning_gossip.schedule import SELECTORS

STRATEGIES = ("local", "none", "all-reduce", "gossip", "elastic-gossip", "downpour")
NO_REPLICAS = ("local", "all-reduce")
LOG_EVERY_N_STEPS = 10


class Nobody:
    """Peers that never choose: replicas that never talk."""

    def choices(self, step: int, world_size: int) -> NDArray[np.int64]:
        return np.full(world_size, -1)


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser of the options that all examples have; ``defaults`` override theirs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--strategy", choices=STRATEGIES, default="elastic-gossip", help="local: one process; none: never talk")
    add("--devices", type=int, default=4, help="replicas")
    add("--alpha", type=float, default=0.5, help="of elastic gossip")
    add("--variant", choices=("pull", "push"), default="pull", help="of gossip")
    add("--probability", type=float, default=1.0, help="to take part in a round, per rank or pair")
    add("--period", type=int, default=1, help="steps between rounds")
    add("--peers", choices=tuple(SELECTORS), default="matching", help="who exchanges with whom")
    add("--delay", type=int, default=0, help="steps from posting an exchange to applying it")
    add("--n-push", type=int, default=5, help="steps between pushes of downpour")
    add("--n-pull", type=int, default=5, help="steps between pulls of downpour")
    add("--shards", type=int, default=1, help="processes of downpour's parameter server")
    add("--epochs", type=int, default=20)
    add("--batch-size", type=int, default=128, help="over all devices")
    add("--lr", type=float, default=0.01, help="learning rate")
    add("--seed", type=int, default=1234, help="of data, initial weights and the schedule")
    add("--accelerator", default="cpu", help="cpu or cuda")
    add("--log-dir", default="logs", help="folder of the TensorBoard event files")
    add("--run-id", default=None, help="name of the run's folder; version_<n> by default")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options given, or end with a message and status 2 where they do not fit together."""
    args = parser.parse_args()
    for name, value in (("devices", args.devices), ("epochs", args.epochs), ("batch-size", args.batch_size)):
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.strategy == "local":
        args.devices = 1
    if args.batch_size % args.devices:
        parser.error(
            f"--batch-size is over all devices and must be a multiple of --devices:"
            f" {args.batch_size} is not divisible by {args.devices}"
        )
    try:
        args.strategy_object = make_strategy(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def make_strategy(args: argparse.Namespace) -> Any:
    """Return what ``Trainer(strategy=…)`` takes."""
    if args.strategy == "local":
        return "auto"
    if args.strategy == "all-reduce":
        return "ddp"
    if args.strategy == "none":
        return ElasticGossipStrategy(peers=Nobody(), evaluate="replica")
    if args.strategy == "downpour":
        return DownpourStrategy(n_push=args.n_push, n_pull=args.n_pull, shards=args.shards, evaluate="replica")
    common: dict[str, Any] = {
        "probability": args.probability,
        "period": args.period,
        "peers": args.peers,
        "delay": args.delay,
        "seed": args.seed,
        "evaluate": "replica",
    }
    if args.strategy == "gossip":
        return GossipStrategy(variant=args.variant, **common)
    return ElasticGossipStrategy(alpha=args.alpha, **common)


def train_and_test(
    args: argparse.Namespace, name: str, model: pl.LightningModule, data: pl.LightningDataModule
) -> None:
    """Fit, test every replica and the consensus model on the whole test set, and print the table on rank 0.

    Args:
        args: of :func:`parse`.
        name: of the example, for the log folder.
        model: logs ``test_accuracy`` in its test step.
        data: gives each rank its share for training and the whole sets for validation and test.
    """
    logger = RankTensorBoardLogger(args.log_dir, name=name, version=args.run_id)
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy_object,
        max_epochs=args.epochs,
        logger=logger,
        callbacks=[] if args.strategy in NO_REPLICAS else [GossipMonitor(every_n_steps=LOG_EVERY_N_STEPS)],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=LOG_EVERY_N_STEPS,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    accuracies = gather(tested["test_accuracy"], trainer.world_size)
    if hasattr(trainer.strategy, "adopt_consensus"):
        trainer.strategy.adopt_consensus()
    [tested] = trainer.test(model, data, verbose=False)
    if trainer.is_global_zero:
        print_table(args, accuracies, tested["test_accuracy"])
        # not `trainer.log_dir`: that is a broadcast, and the other ranks are not here
        print(f"Curves of every rank: tensorboard --logdir {shlex.quote(logger.log_dir)}")


def gather(value: float, world_size: int) -> list[float]:
    """Return the value of each rank."""
    if world_size == 1:
        return [value]
    values = [0.0] * world_size
    dist.all_gather_object(values, value)
    return values


def print_table(args: argparse.Namespace, accuracies: list[float], consensus: float) -> None:
    """Print test accuracy, a row a replica and one for the consensus model."""
    table = Table(title=f"Test accuracy, {args.strategy}, {args.devices} devices, {args.epochs} epochs")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    for rank, accuracy in enumerate(accuracies):
        table.add_row(f"replica of rank {rank}", f"{accuracy:.4f}", end_section=rank == len(accuracies) - 1)
    table.add_row("consensus", f"{consensus:.4f}")
    Console(file=sys.stdout).print(table)
