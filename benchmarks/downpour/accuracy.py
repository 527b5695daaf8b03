"""Test accuracy of the server's model under Downpour, beside that of a single process: Iris, MNIST, CIFAR-10.

    python benchmarks/downpour.py --accuracy mnist --data-dir DIR [--workers 1 2 3] [--seeds 1234 1235 1236] [--plot]

A worker's learning rate is the single process' divided by n_push, as in the DistBelief project. With MNIST and CIFAR-10
every worker walks through the whole training set in each epoch, in an order of its own; with Iris each keeps one even
share of it, and the batch is divided too: either way an epoch has as many steps for a worker as for the single process.
Where the learning rate falls, on a plateau, it is reconsidered after each pass of all workers together over the
training set, as often as there are workers in an epoch: an epoch of three workers is three passes (``--checks 1``: once
an epoch, as the project did).
Samples of the training set are held out for what is decided in training (when the learning rate falls) or before it
(``--lr``, ``--momentum``); the test set decides nothing.

One row a run in ``results/downpour_<data>.csv``, its curve in ``results/downpour_<data>_curves.csv``; a run that is
there is not repeated, and an interrupted one goes on after its last complete epoch. ``seconds`` is wall-clock time, of
a machine that may have done other work; ``cpu_seconds`` a worker's own, its helper threads included. ``--plot`` draws
the curves that are there, and trains nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from image_data import DataNotFoundError, ImageData
from iris import Iris
from models import alexnet, mlp
from tensor_data import Sets
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import lightning_gossip
from benchmarks import RESULTS, ROOT
from benchmarks.downpour.tables import gather, print_summary, table
from benchmarks.downpour.training import Training
from benchmarks.shared.rows import Row, append, find, read

WORK_DIR = ROOT / "logs" / "downpour"


@dataclass(frozen=True)
class Experiment:
    """A network on a data set, and the defaults of the command line.

    Attributes:
        load: returns the sets, given the seed and ``--data-dir``.
        network: makes one.
        shares: of the training set, see ``examples/shares.py``.
        batch: of the single process.
        lr, momentum: of the single process' SGD.
        n_push: steps from one push to the next, and from one pull to the next.
        schedule: of the learning rate, given the optimizer; stepped at every validation.
        curves: whether the model is measured during training.
    """

    load: Callable[[int, Path | None], Sets]
    network: Callable[[], nn.Module]
    shares: str
    batch: int
    lr: float
    momentum: float
    n_push: int
    epochs: int
    workers: tuple[int, ...]
    seeds: tuple[int, ...]
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    curves: bool = True


@dataclass(frozen=True)
class Setting:
    """One run. ``lr`` is the single process', ``n_push`` 0 for it; ``checks`` are validations an epoch."""

    workers: int
    n_push: int
    lr: float
    momentum: float
    epochs: int
    checks: int
    seed: int


def load_iris(seed: int, data_dir: Path | None) -> Sets:
    return Iris(argparse.Namespace(seed=seed)).load()


def load_images(source: str, held_out: int, seed: int, data_dir: Path | None) -> Sets:
    options = argparse.Namespace(seed=seed, data_dir=data_dir, validation=held_out, validate_on="validation")
    data = ImageData(options, source)
    data.prepare_data()
    return data.load()


EXPERIMENTS = {
    "iris": Experiment(
        load=load_iris,
        network=lambda: nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)),
        shares="fixed",
        batch=4,
        lr=0.03,
        momentum=0.9,
        n_push=5,
        epochs=20,
        workers=(1, 2, 4),
        seeds=tuple(range(20)),
        curves=False,
    ),
    "mnist": Experiment(
        load=partial(load_images, "mnist", 5000),
        network=mlp,
        shares="whole",
        batch=64,
        lr=0.1,
        momentum=0.0,
        n_push=5,
        epochs=25,
        workers=(1, 3, 2),
        seeds=(1234,),
    ),
    "cifar10": Experiment(
        load=partial(load_images, "cifar10", 5000),
        network=alexnet,
        shares="whole",
        batch=64,
        lr=0.1,
        momentum=0.0,
        n_push=3,
        epochs=20,
        workers=(1, 3, 2),
        seeds=(1234, 1235, 1236),
        schedule=partial(ReduceLROnPlateau, patience=1, min_lr=1e-3),
    ),
}


def train(
    experiment: Experiment, setting: Setting, sets: Sets, timeout: timedelta, folder: Path
) -> tuple[dict[str, float], list[Row]]:
    """See :meth:`Training.run`."""
    pl.seed_everything(setting.seed, verbose=False)
    return Training(
        sets=sets,
        network=experiment.network(),
        shares=experiment.shares,
        batch=experiment.batch // (setting.workers if experiment.shares == "fixed" else 1),
        workers=setting.workers,
        n_push=setting.n_push,
        lr=setting.lr / max(setting.n_push, 1),
        momentum=setting.momentum,
        schedule=experiment.schedule,
        epochs=setting.epochs,
        checks=setting.checks,
        seed=setting.seed,
        curve=experiment.curves,
        timeout=timeout,
        folder=folder,
    ).run()


def main(arguments: Sequence[str]) -> None:
    """Run what is missing of an experiment, the first of ``arguments``, and print or draw what is there."""
    name = arguments[0] if arguments else ""
    if name not in EXPERIMENTS:
        raise SystemExit(f"--accuracy must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    experiment = EXPERIMENTS[name]
    parser = argparse.ArgumentParser(
        prog=f"downpour.py --accuracy {name}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=int, nargs="+", default=experiment.workers, help="1: a single process, without Downpour")
    add("--seeds", type=int, nargs="+", default=experiment.seeds, help="of data split, weights and order")
    add("--epochs", type=int, default=experiment.epochs)
    add("--lr", type=float, default=experiment.lr, help="of the single process; a worker's is this / n_push")
    add("--momentum", type=float, default=experiment.momentum, help="Nesterov's")
    add("--n-push", type=int, default=experiment.n_push, help="and n_pull")
    add(
        "--checks",
        type=int,
        default=None,
        help="validations an epoch; None: as many as workers where the learning rate falls on a plateau, else 1",
    )
    add("--data-dir", type=Path, default=None, help="as for the examples")
    add("--timeout", type=float, default=300, help="seconds for which a silent worker is waited for")
    add("--work-dir", type=Path, default=WORK_DIR, help="for checkpoints, from which an interrupted run goes on")
    add("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    add(
        "--plot",
        action="store_true",
        help="draw what is there of this momentum and of --epochs or more, print what it comes to; train nothing",
    )
    args = parser.parse_args(arguments[1:])
    if args.checks is not None and args.checks < 1:
        parser.error(f"--checks must be at least 1, got {args.checks}")

    def checks_of(workers: int) -> int:
        return args.checks or (workers if experiment.schedule else 1)

    out, curves = args.out / f"downpour_{name}.csv", args.out / f"downpour_{name}_curves.csv"
    if args.plot:
        from benchmarks.downpour.plots import draw

        rows = [
            row
            for row in find(read(curves), {"momentum": args.momentum})
            if int(row["checks"]) == checks_of(int(row["workers"])) and int(row["epochs"]) >= args.epochs
        ]
        if not rows:
            parser.error(
                f"--plot draws the rows of {curves} with momentum {args.momentum:g} and at least {args.epochs} epochs, "
                "and there are none"
            )
        lines = gather(rows, experiment.lr)
        draw(name, lines, args.out)
        print(table(lines))
        return
    torch.set_num_threads(1)
    for seed in args.seeds:
        try:
            sets = experiment.load(seed, args.data_dir)
        except DataNotFoundError as error:
            parser.error(str(error))
        for workers in args.workers:
            n_push = args.n_push if workers > 1 else 0
            given = asdict(Setting(workers, n_push, args.lr, args.momentum, args.epochs, checks_of(workers), seed))
            if find(read(out), given):
                continue
            print(f"{name}: {given}", flush=True)
            folder = args.work_dir / "-".join([name, *(f"{key}{value}" for key, value in given.items())])
            result, points = train(experiment, Setting(**given), sets, timedelta(seconds=args.timeout), folder)
            if points:
                append(curves, [given | point for point in points])
                result |= {key: float(points[-1][key]) for key in ("seconds", "cpu_seconds", "staleness")}
            machine = {"cores": os.cpu_count(), "version": lightning_gossip.__version__}
            append(out, [given | result | machine], digits=6)
            shutil.rmtree(folder, ignore_errors=True)  # there is none without checkpoints
    print_summary(read(out), [name for name in Setting.__annotations__ if name != "seed"])
