"""Test accuracy of the server's model under Downpour, beside that of a single process: Iris, MNIST, CIFAR-10.

    python -m benchmarks.downpour.accuracy mnist --data-dir DIR [--workers 1 2 3] [--seeds 1234 1235 1236] [--plot]

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
import shutil
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from image_data import DataNotFoundError
from tensor_data import Sets

import lightning_gossip
from benchmarks import RESULTS, ROOT
from benchmarks.downpour.experiments import EXPERIMENTS, Experiment
from benchmarks.downpour.plots import draw
from benchmarks.downpour.tables import gather, print_summary, table
from benchmarks.downpour.training import Training
from benchmarks.shared.machine import cores
from benchmarks.shared.options import at_least, make_parser
from benchmarks.shared.rows import Row, append, find, read

WORK_DIR = ROOT / "logs" / "downpour"


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


def make_options() -> argparse.ArgumentParser:
    """Return the parser: a command an experiment, each with defaults of its own."""
    parser = make_parser(__spec__, __doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="{" + ",".join(EXPERIMENTS) + "}")
    for name, experiment in EXPERIMENTS.items():
        add = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter).add_argument
        add("--workers", type=int, nargs="+", default=experiment.workers, help="1: a single process, without Downpour")
        add("--seeds", type=int, nargs="+", default=experiment.seeds, help="of data split, weights and order")
        add("--epochs", type=at_least(1), default=experiment.epochs, help="of a worker")
        add("--lr", type=float, default=experiment.lr, help="of the single process; a worker's is this / n_push")
        add("--momentum", type=float, default=experiment.momentum, help="Nesterov's")
        add("--n-push", type=int, default=experiment.n_push, help="and n_pull")
        add(
            "--checks",
            type=at_least(1),
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
    return parser


def checks_of(experiment: Experiment, workers: int, checks: int | None) -> int:
    """Return the validations an epoch, where ``--checks`` was left out, too."""
    return checks or (workers if experiment.schedule else 1)


def main() -> None:
    """Run what is missing of an experiment, and print what is there; or draw it."""
    parser = make_options()
    args = parser.parse_args()
    curves = args.out / f"downpour_{args.name}_curves.csv"
    try:
        if args.plot:
            show(args, curves)
        else:
            run(args, args.out / f"downpour_{args.name}.csv", curves)
    except (DataNotFoundError, NothingToDrawError) as error:
        parser.error(str(error))


class NothingToDrawError(Exception):
    """There are no rows such as were asked for."""


def show(args: argparse.Namespace, curves: Path) -> None:
    """Draw the rows of ``curves``, and print a table of what they come to.

    Raises:
        NothingToDrawError: without such rows.
    """
    experiment = EXPERIMENTS[args.name]
    rows = [
        row
        for row in find(read(curves), {"momentum": args.momentum})
        if int(row["checks"]) == checks_of(experiment, int(row["workers"]), args.checks)
        and int(row["epochs"]) >= args.epochs
    ]
    if not rows:
        raise NothingToDrawError(
            f"--plot draws the rows of {curves} with momentum {args.momentum:g} and at least {args.epochs} epochs, "
            "and there are none"
        )
    lines = gather(rows, experiment.lr)
    draw(args.name, lines, args.out)
    print(table(lines))


def run(args: argparse.Namespace, out: Path, curves: Path) -> None:
    """Train what is missing, and print what there is then.

    Raises:
        DataNotFoundError: if there is nothing to train on.
    """
    experiment = EXPERIMENTS[args.name]
    torch.set_num_threads(1)
    for seed in args.seeds:
        sets = experiment.load(seed, args.data_dir)
        for workers in args.workers:
            n_push = args.n_push if workers > 1 else 0
            checks = checks_of(experiment, workers, args.checks)
            given = asdict(Setting(workers, n_push, args.lr, args.momentum, args.epochs, checks, seed))
            if find(read(out), given):
                continue
            print(f"{args.name}: {given}", flush=True)
            folder = args.work_dir / "-".join([args.name, *(f"{key}{value}" for key, value in given.items())])
            result, points = train(experiment, Setting(**given), sets, timedelta(seconds=args.timeout), folder)
            if points:
                append(curves, [given | point for point in points])
                result |= {key: float(points[-1][key]) for key in ("seconds", "cpu_seconds", "staleness")}
            machine = {"cores": cores(), "version": lightning_gossip.__version__}
            append(out, [given | result | machine], digits=6)
            shutil.rmtree(folder, ignore_errors=True)  # there is none without checkpoints
    print_summary(read(out), [name for name in Setting.__annotations__ if name != "seed"])


if __name__ == "__main__":
    main()
