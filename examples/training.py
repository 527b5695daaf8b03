"""Fit, test and report, the same for all examples."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist
from command_line import NO_REPLICAS
from image_data import DataNotFoundError
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from typing_extensions import override

import lightning_gossip
from lightning_gossip import GossipMonitor, RankTensorBoardLogger
from lightning_gossip.strategies.base import ReplicaStrategy
from lightning_gossip.strategies.checkpoint import AtomicCheckpointIO

T = TypeVar("T")

CHECKPOINT = "last"


class Costs(Callback):
    """Seconds of training on this rank, validations and checkpoints included, and bytes that it sent.

    Both are summed over the parts of a run that is resumed on as many ranks. Bytes are of payload: those that gossip or
    a worker of Downpour counts; for all-reduce they are computed, as a ring sends 2 N (n − 1) / n in each step, N the
    bytes of all gradients and n the number of ranks. Of a run that is resumed at its end both are those of its
    checkpoint: what follows it, such as a worker's last push, is not in them.
    """

    def __init__(self, strategy: str) -> None:
        self._strategy = strategy
        self._begin: float | None = None
        self._seconds = 0.0  # of the parts before
        self._stats: Any = None  # they outlive the strategy's connections
        self.bytes_sent = 0

    @property
    def seconds(self) -> float:
        """Up to now."""
        return self._seconds + (0.0 if self._begin is None else time.perf_counter() - self._begin)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count before the epoch's checkpoint is saved."""
        exchange = getattr(trainer.strategy, "exchange", None)
        self._stats = exchange.stats if exchange is not None else getattr(trainer.strategy, "downpour_stats", None)
        self._count_bytes(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds, self._begin = self.seconds, None

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count_bytes(trainer, pl_module)

    def _count_bytes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._stats is not None:
            self.bytes_sent = self._stats.bytes_sent
        elif self._strategy == "all-reduce":
            gradients = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
            ranks = trainer.world_size
            self.bytes_sent = round(2 * gradients * (ranks - 1) / ranks) * trainer.global_step

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "bytes_sent": self.bytes_sent}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds = state_dict["seconds"]
        self.bytes_sent = state_dict.get("bytes_sent", 0)  # older checkpoints have none


class EpochLines(Callback):
    """One line an epoch, of rank 0, where there is no terminal for a progress bar."""

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            seen = trainer.callback_metrics
            metrics = ", ".join(f"{name} {seen[name]:.4f}" for name in ("val_accuracy", "val_loss") if name in seen)
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {metrics} (rank 0)", flush=True)


def train_and_test(
    args: argparse.Namespace,
    name: str,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    metric: str = "test_accuracy",
) -> None:
    """Fit, test every replica and the consensus model on the whole test set, and report on rank 0.

    Args:
        args: of :func:`command_line.parse`.
        name: of the example, for the log folder.
        model: logs ``metric`` in its test step.
        data: gives each rank its share for training and the whole sets for validation and test.
        metric: what is reported of each replica and of the consensus model.
    """
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")  # of Lightning's own calls
    warnings.filterwarnings("ignore", message=".*sync_dist=True")  # each replica's metrics are its own
    prepare_before_launch(data)
    logger = RankTensorBoardLogger(args.log_dir, name=name, version=args.run_id)
    last = checkpoint_to_resume(args, logger)
    costs = Costs(args.strategy)
    trainer = make_trainer(args, logger, costs)
    trainer.fit(model, data, ckpt_path=last)
    [tested] = trainer.test(model, data, verbose=False)
    of_replicas = dict(zip(gather(trainer.global_rank), gather(tested[metric]), strict=True))
    bytes_sent = gather(costs.bytes_sent)
    if isinstance(trainer.strategy, ReplicaStrategy):
        trainer.strategy.adopt_consensus()
        trainer.logger = None  # the replicas' values stand under the module's own tags
        [tested] = trainer.test(model, data, verbose=False)
        logger.log_metrics({f"consensus/{tag}": value for tag, value in tested.items()}, step=trainer.global_step)
        logger.finalize("success")
    if not trainer.is_global_zero:
        return
    summary = {
        "example": name,
        "strategy": args.strategy,
        "strategy_arguments": getattr(trainer.strategy, "hyperparameters", {}),
        "options": {key: value for key, value in vars(args).items() if key != "strategy_object"},
        "world_size": trainer.world_size,
        "seed": args.seed,
        "epochs": args.epochs,
        "updates": trainer.global_step,
        "ranks": list(of_replicas),
        metric: list(of_replicas.values()),
        f"consensus_{metric}": tested[metric],
        "seconds": costs.seconds,
        "bytes_sent_per_rank": sum(bytes_sent) / len(bytes_sent),
        "version": lightning_gossip.__version__,
    }
    print_table(summary, metric)
    # not `trainer.log_dir`: that is a broadcast, and the other ranks are not here
    print(f"Curves of every rank: tensorboard --logdir {shlex.quote(logger.log_dir)}")
    if args.summary is not None:
        write_summary(args.summary, summary)


def checkpoint_to_resume(args: argparse.Namespace, logger: RankTensorBoardLogger) -> Path | None:
    """Return the last checkpoint of the run to go on with, None to begin one.

    Ends with a message and status 2 where a run would begin in the folder of another.
    """
    if args.run_id is None:
        return None
    folder = Path(logger.save_dir, logger.name, args.run_id)
    last = folder / "checkpoints" / f"{CHECKPOINT}.ckpt"
    if args.resume and last.exists():
        return last
    if args.resume:
        rank_zero_only(print)(f"Nothing to resume: there is no {last}. Run {args.run_id} begins anew.", flush=True)
    elif folder.is_dir() and any(folder.iterdir()):
        end_with(f"there is a run {args.run_id} in {folder}: go on with it by --resume, or give another --run-id")
    return None


def make_trainer(args: argparse.Namespace, logger: RankTensorBoardLogger, costs: Costs) -> pl.Trainer:
    """Return a Trainer that logs on every rank and keeps the last epoch's checkpoint in the run's folder."""
    on_terminal = sys.stderr.isatty()
    callbacks: list[Callback] = [costs]
    callbacks.append(TQDMProgressBar(refresh_rate=args.log_every) if on_terminal else EpochLines())
    if args.strategy not in NO_REPLICAS:
        callbacks.append(GossipMonitor(every_n_steps=args.log_every))
    callbacks.append(ModelCheckpoint(filename=CHECKPOINT, every_n_epochs=1, enable_version_counter=False))
    return pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=args.strategy_object,
        max_epochs=args.epochs,
        logger=logger,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_progress_bar=on_terminal,
        use_distributed_sampler=args.data_shares == "dealt",
        log_every_n_steps=args.log_every,
        num_sanity_val_steps=0,
    )


def prepare_before_launch(data: pl.LightningDataModule) -> None:
    """Download and decode while there is one process: an error then is one message, with status 2.

    Under torchrun or SLURM there are many from the start, and Lightning calls ``prepare_data`` on one of each node.
    """
    if not {"LOCAL_RANK", "SLURM_PROCID"} & os.environ.keys():
        try:
            data.prepare_data()
            data.setup("fit")
        except (DataNotFoundError, ValueError) as error:
            end_with(error)


def end_with(error: object) -> NoReturn:
    """End with a message and status 2, as for options that do not fit together."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    sys.exit(2)


def gather(value: T) -> list[T]:
    """Return the value of each rank, of those that are left."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def print_table(summary: dict[str, Any], metric: str) -> None:
    """Print ``metric``, a row a replica and one for the consensus model, and what the training cost."""
    values = summary[metric]
    table = Table()
    table.add_column("model")
    table.add_column(metric.replace("_", " "), justify="right")
    for rank, value in zip(summary["ranks"], values, strict=True):
        table.add_row(f"replica of rank {rank}", f"{value:.4f}", end_section=rank == summary["ranks"][-1])
    table.add_row("consensus", f"{summary[f'consensus_{metric}']:.4f}")
    print(f"{summary['example']}, {summary['strategy']}, {len(values)} replicas, {summary['epochs']} epochs")
    Console(file=sys.stdout).print(table)
    print(f"{summary['seconds']:.1f} s of training, {summary['bytes_sent_per_rank'] / 1e6:,.1f} MB sent a rank")


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write ``summary`` as JSON; a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(summary, indent=2, default=str) + "\n")
    os.replace(temporary, path)
