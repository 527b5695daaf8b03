"""What ranks that are killed cost in accuracy: MNIST, 4 ranks, 2 of them killed after the third of ten epochs.

    python -m benchmarks.faults --data-dir ../shared/data
    python -m benchmarks.faults --table     # what is there, without training

Beside the run that loses them for good: one to which they come back after the fifth, one that loses none, and one that
goes on from the third epoch's checkpoint with two ranks. The thesis' network and options (elastic gossip, probability
1/32, uniform partners), 32 images a rank and step.
Rows in ``results/faults_accuracy.csv`` are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.shared import rows
from benchmarks.shared.options import listed, make_parser
from benchmarks.shared.processes import run
from benchmarks.shared.tables import show

RUNS = ("unbroken", "two killed", "two from there", "two back")
FILE = "faults_accuracy.csv"
EPOCHS, WHEN, BACK = 10, 3, 5
MORTAL = {"two killed": f"2,3:{WHEN}", "two back": f"2,3:{WHEN}:{BACK}"}
ALLOWED = {"two killed": ("two from there", 0.3), "two back": ("unbroken", 0.3)}
"""How many points a run's consensus may be below another's."""


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--seeds", type=listed(int), default=[1234, 1235, 1236])
    add("--data-dir", type=Path, help="of the example; without it it downloads the data")
    add("--work-dir", type=Path, default=ROOT / "logs" / "faults", help="event files, checkpoints, output of the runs")
    add("--results", type=Path, default=RESULTS, help="folder of the rows")
    add("--table", action="store_true", help="print what is there, and train nothing")
    return parser.parse_args()


def train(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one run to its end; return its row.

    Raises:
        SystemExit: where it ends badly.
    """
    folder = arguments.work_dir / f"{name.replace(' ', '_')}_{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    if name == "two from there":
        fit(folder, seed, arguments, devices=4, epochs=WHEN)
        summary = fit(folder, seed, arguments, devices=2, epochs=EPOCHS)
    else:
        summary = fit(folder, seed, arguments, devices=4, epochs=EPOCHS, mortal=MORTAL.get(name))
    accuracies = summary["test_accuracy"]
    return {
        "run": name,
        "seed": seed,
        "replicas": len(accuracies),
        "updates": summary["updates"],
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "consensus": summary["consensus_test_accuracy"],
        "seconds": summary["seconds"],
    }


def fit(
    folder: Path, seed: int, arguments: argparse.Namespace, devices: int, epochs: int, mortal: str | None = None
) -> dict[str, Any]:
    """Run the example until its last epoch, from where it was; return its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "summary.json"
    line = [sys.executable, "-m", "benchmarks.faults.mortal", "--strategy", "elastic-gossip", "--peers", "uniform"]
    line += ["--probability", "0.03125", "--seed", f"{seed}", "--devices", f"{devices}", "--epochs", f"{epochs}"]
    line += ["--batch-size", f"{32 * devices}", "--log-dir", f"{folder}", "--run-id", "run", "--resume"]
    line += ["--summary", f"{summary}"]
    if arguments.data_dir is not None:
        line += ["--data-dir", f"{arguments.data_dir}"]
    if mortal is not None:
        line += ["--min-replicas", "1", "--restarts", "1"] if mortal.count(":") > 1 else ["--min-replicas", "1"]
    os.environ |= {"MORTAL": mortal or ":-1", "MORTAL_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("ab") as stream:
        code = run(line, stream)
    if code != 0:
        sys.exit(f"a run ended with exit code {code}; its output is in {folder / 'output'}")
    return dict(json.loads(summary.read_text()))


def report(results: Path) -> None:
    """Print what is there, and how far the runs with losses are from those beside which they stand."""
    there = rows.read(results / FILE)
    if there:
        show("MNIST, test accuracy", list(there[0]), [list(row.values()) for row in there])
    consensus = {(row["run"], row["seed"]): 100 * float(row["consensus"]) for row in there}
    for run_name, seed in consensus:
        other, allowed = ALLOWED.get(run_name, ("", 0.0))
        if (other, seed) in consensus:
            difference = consensus[run_name, seed] - consensus[other, seed]
            print(f"seed {seed}: {run_name}, {difference:+.2f} points to {other} (-{allowed:g} is allowed)")


def main() -> None:
    arguments = parse_arguments()
    if not arguments.table:
        there = {(row["run"], int(row["seed"])) for row in rows.read(arguments.results / FILE)}
        for seed in arguments.seeds:
            for name in RUNS:
                if (name, seed) not in there:
                    rows.append(arguments.results / FILE, [train(name, seed, arguments)])
    report(arguments.results)


if __name__ == "__main__":
    main()
