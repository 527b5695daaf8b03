"""The tables and plots of arXiv:1812.02407 over again: its rows by the examples of ours, beside its numbers.

    python -m benchmarks.thesis --table mnist-alpha0.5-w4 --data-dir ../shared/data
    python -m benchmarks.thesis --rows EG-4-0.031,GS-4-0.031 --seeds 1235,1236 --data-dir ../shared/data
    python -m benchmarks.thesis --plots-only     # from the committed results, without training

A row is one run of ``examples/mnist.py`` or ``cifar10.py``, whose command line is printed. Rows in
``results/thesis_<experiment>.csv`` are not run again; one that was stopped goes on from its last epoch. The ResNet-18
rows of CIFAR-10 need a GPU a worker, or share one (``--share-device``).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import EXAMPLES, RESULTS, ROOT
from benchmarks.shared.options import at_least, listed, make_parser
from benchmarks.shared.processes import exit_on
from benchmarks.shared.processes import run as run_command
from benchmarks.shared.ranks import run_as_nodes
from benchmarks.thesis import results as thesis_results
from benchmarks.thesis.checks import check
from benchmarks.thesis.plots import draw
from benchmarks.thesis.results import Key
from benchmarks.thesis.rows import EXPERIMENTS, METHODS, SEED, TABLES, Experiment, Row, parse
from benchmarks.thesis.table import as_markdown


class RowFailed(Exception):
    """A row whose run ended badly."""


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__spec__, __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", choices=TABLES, help="all rows of a table")
    what.add_argument("--rows", type=listed(parse), metavar="ID,ID", help="rows by their ids, of --experiment")
    what.add_argument("--plots-only", action="store_true", help="draw and check what is there, of all experiments")
    add = parser.add_argument
    add("--experiment", choices=EXPERIMENTS, default="mnist", help="of --rows")
    add("--seeds", type=listed(int), default=[SEED], help="the thesis' by default")
    add("--epochs", type=at_least(1), help="in place of the thesis'; stands in the results")
    add("--data-dir", type=Path, help="of the examples; without it they download the data")
    add("--work-dir", type=Path, default=ROOT / "logs" / "thesis", help="event files, checkpoints, output of the runs")
    add("--results", type=Path, default=RESULTS, help="folder of tables and plots")
    add("--share-device", action="store_true", help="all ranks of a row on one GPU, over gloo")
    add("--timeout", type=float, default=7200.0, help="of the examples, in seconds")
    return parser.parse_args()


def command(
    experiment: Experiment, row: Row, key: Key, work_dir: Path, data_dir: Path | None, timeout: float
) -> list[str]:
    """Return the command line that trains a row, and goes on with it where it was stopped."""
    _, seed, epochs = key
    options = ["--seed", f"{seed}", "--epochs", f"{epochs}", "--data-shares", "fixed", "--timeout", f"{timeout:g}"]
    if data_dir is not None:
        options += ["--data-dir", f"{data_dir}"]
    options += ["--log-dir", f"{work_dir}", "--run-id", run_id(key), "--summary", f"{summary_file(work_dir, key)}"]
    return [sys.executable, str(EXAMPLES / experiment.script), *row.options, *experiment.options, *options, "--resume"]


def run_id(key: Key) -> str:
    """Return the name of a row's run."""
    return "{}_seed{}_epochs{}".format(*key)


def summary_file(work_dir: Path, key: Key) -> Path:
    return work_dir / f"{run_id(key)}.json"


def train(experiment: Experiment, row: Row, key: Key, arguments: argparse.Namespace) -> None:
    """Run a row to its end and add it to the results.

    Raises:
        RowFailed: where the run's exit code is not 0.
    """
    work_dir = arguments.work_dir / experiment.name
    logs = work_dir / Path(experiment.script).stem / run_id(key)
    work_dir.mkdir(parents=True, exist_ok=True)
    thesis_results.cut_torn_event_files(logs)
    line = command(experiment, row, key, work_dir, arguments.data_dir, arguments.timeout)
    if arguments.share_device:
        line += ["--devices", "1", "--num-nodes", f"{row.workers}", "--process-group-backend", "gloo"]
    output = work_dir / f"{run_id(key)}.log"
    print(f"{run_id(key)}: {shlex.join(line)}", flush=True)
    with output.open("ab") as stream:
        if arguments.share_device:
            code = run_as_nodes(line, row.workers, stream, arguments.timeout)
        else:
            code = run_command(line, stream)
    if code != 0:
        raise RowFailed(f"{run_id(key)} ended with exit code {code}; its output is in {output}")
    summary = json.loads(summary_file(work_dir, key).read_text())
    result = as_line(row, key, summary)
    thesis_results.add(
        arguments.results, experiment.name, result, thesis_results.read_curve(logs, key, summary["bytes_sent_per_rank"])
    )
    print(", ".join(f"{name} {value}" for name, value in result.items()), flush=True)


def as_line(row: Row, key: Key, summary: dict[str, Any]) -> dict[str, object]:
    """Return a row of the results from the summary of its run."""
    accuracies = summary["test_accuracy"]
    of_row = [METHODS[row.method][0], row.workers, row.probability, row.period, row.alpha]
    spread = [accuracies[0], sum(accuracies) / len(accuracies), min(accuracies), max(accuracies)]
    figures = [round(value, 6) for value in [*spread, summary["consensus_test_accuracy"]]]
    rest = [round(summary["seconds"], 1), round(summary["bytes_sent_per_rank"]), summary["version"]]
    values = [row.id, *of_row, *key[1:], summary["updates"], *figures, *rest]
    return dict(zip(thesis_results.COLUMNS, values, strict=True))


@contextmanager
def only_one(work_dir: Path) -> Iterator[None]:
    """Keep a second run of this benchmark from working in the same folder.

    Raises:
        SystemExit: where there is one.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another run is at work in {work_dir}: give another --work-dir and --results")
        yield


def report(experiment: Experiment, folder: Path) -> None:
    """Draw the plots, write the table, and print it with the checks."""
    results = thesis_results.load(folder, experiment.name, experiment.reference)
    if results.rows.empty:
        return
    table = as_markdown(experiment, results)
    (folder / f"thesis_{experiment.name}.md").write_text(table)
    print(table)
    if experiment.name == "mnist":
        for outcome in check(results, experiment.epochs):
            print(outcome)
    draw(experiment, results, folder)


def check_gpus(experiment: Experiment, rows: Sequence[Row], share: bool) -> None:
    """End with a message where rows need more GPUs than there are."""
    needed, there = 1 if share else max(row.workers for row in rows), torch.cuda.device_count()
    if "cuda" in experiment.options and there < needed:
        needs = "rows need a GPU to share" if share else f"rows of {needed} workers need as many GPUs"
        sys.exit(f"{experiment.title}: {needs}, and torch sees {there}{'' if share else '; or give --share-device'}")


def run(experiment: Experiment, rows: Sequence[Row], arguments: argparse.Namespace) -> bool:
    """Run the rows that are missing, each in turn; whether all went well."""
    good = True
    with only_one(arguments.work_dir / experiment.name):
        for seed in arguments.seeds:
            for row in rows:
                key = (row.id, seed, arguments.epochs or experiment.epochs)
                if key in thesis_results.finished(arguments.results, experiment.name):
                    print(f"{run_id(key)}: there already", flush=True)
                    continue
                try:
                    train(experiment, row, key, arguments)
                except RowFailed as error:
                    good = False
                    print(f"{error}", file=sys.stderr, flush=True)
    report(experiment, arguments.results)
    return good


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, exit_on)
    if arguments.plots_only:
        for experiment in EXPERIMENTS.values():
            report(experiment, arguments.results)
        return
    name, ids = TABLES[arguments.table] if arguments.table else (arguments.experiment, [])
    rows = [parse(row_id) for row_id in ids] if arguments.table else arguments.rows
    check_gpus(EXPERIMENTS[name], rows, arguments.share_device)
    if not run(EXPERIMENTS[name], rows, arguments):
        sys.exit(1)


if __name__ == "__main__":
    main()
