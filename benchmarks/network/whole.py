"""Time of a whole training with one slow rank, to that with four even ones (root, iproute2; exits with 2 without).

    python -m benchmarks.network.whole --data-dir DIR     # all set-ups that are not there yet
    python -m benchmarks.network.whole --table            # of the rows that are there

MNIST with the thesis' network on 4 ranks, each in a namespace behind a link of 200 Mbit/s, for 5 epochs; a step takes
80 ms, and on rank 0 three times as long. Each set-up is trained once with even ranks and once with the slow one. With
fixed shares an epoch lasts until the slow rank is through its own: 3 times as long. With work that is dealt on demand
1.2 is possible, 4 shares at a speed of 3⅓. Every sample is counted in every epoch.

Rows go to ``results/network_whole.csv``; what is there is not trained again. DDP's 9,380 steps take over two hours.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from image_data import SOURCES, DataNotFoundError, prepare

from benchmarks import RESULTS, ROOT
from benchmarks.network.__main__ import PORT, RANKS, positive
from benchmarks.network.whole_setups import NAMES
from benchmarks.shared.namespaces import ENVIRONMENT, Network, exiting
from benchmarks.shared.options import at_least, make_parser
from benchmarks.shared.ranks import environment, watch
from benchmarks.shared.rows import Row, append, find, read
from benchmarks.shared.tables import show

FILE = "network_whole.csv"
LIMIT = 6 * 3600.0
"""Seconds after which a training is given up."""


def measure(options: dict[str, Any], rate: float, data_dir: Path | None) -> dict[str, Any]:
    """Train once in namespaces; return what rank 0 wrote.

    Raises:
        RuntimeError: if a rank failed.
        NetworkUnavailable: if there can be no namespaces.
    """
    with tempfile.TemporaryDirectory() as folder, Network(RANKS) as network:
        network.set_rate(rate)
        out = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.network.whole_rank", str(out)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", f"{value}"]
        if data_dir is not None:
            command += ["--data-dir", str(data_dir.resolve())]
        ranks = [
            network.start(
                rank,
                command,
                os.environ | environment(rank, RANKS, 1, network.address(0), PORT) | ENVIRONMENT,
                cwd=ROOT,
            )
            for rank in range(RANKS)
        ]
        watch(lambda: [process.poll() for process in ranks], LIMIT)
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def print_table(rows: list[Row]) -> None:
    """Print a row a set-up: its times with even ranks and with a slow one, beside what they led to."""
    shown = []
    for name in NAMES:
        even = find(rows, {"setup": name, "factor": 1.0})
        for row in find(rows, {"setup": name}):
            same = [e for e in even if all(e[key] == row[key] for key in ("rate_mbit", "epochs", "step", "samples"))]
            to_even = f"{float(row['seconds']) / float(same[0]['seconds']):.2f}" if same else ""
            gain = f"{100 * (float(row['accuracy']) - float(same[0]['accuracy'])):+.2f}" if same else ""
            shown.append(
                (
                    name, row["factor"], row["slow_rank"], row["epochs"], f"{float(row['seconds']):.1f}", to_even,
                    f"{100 * float(row['accuracy']):.2f}", gain, row["not_once"], row["batches_slow"],
                    row["batches_others"],
                )
            )  # fmt: skip
    head = (
        "set-up", "slow", "rank", "epochs", "s", "to even", "test %", "to even", "not once", "its batches", "others'",
    )  # fmt: skip
    show("Whole trainings", head, shown)


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--data-dir", type=Path, help="of torchvision's MNIST; downloaded by default")
    names = ", ".join(NAMES)
    parser.add_argument("--setups", choices=NAMES, nargs="+", default=NAMES, metavar="NAME", help=names)
    parser.add_argument("--rate", type=positive, default=200.0, help="Mbit/s")
    parser.add_argument("--factor", type=float, default=3.0, help="how many times as long the slow rank's step takes")
    parser.add_argument(
        "--slow-rank", type=int, choices=range(RANKS), default=0, help="rank 0 has Downpour's server beside it"
    )
    parser.add_argument("--epochs", type=at_least(1), default=5)
    parser.add_argument("--step", type=float, default=0.08, help="seconds of a step, communication not counted")
    parser.add_argument("--samples", type=at_least(1000), help="of the training set; all by default")
    parser.add_argument("--seed", type=at_least(0), default=1234)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="print what is there and train nothing")
    args = parser.parse_args()
    if not 1 < args.factor <= 100:
        parser.error(f"--factor must be above 1 and at most 100, got {args.factor:g}")
    if not 0 < args.step <= 10:
        parser.error(f"--step must be above 0 and at most 10 s, got {args.step:g}")
    if not args.table:
        try:
            prepare(SOURCES["mnist"], args.data_dir)
            run(args)
        except DataNotFoundError as error:
            parser.error(str(error))
    print_table(read(args.out / FILE))


def run(args: Any) -> None:
    """Train what is not there yet, each set-up with even ranks and with a slow one."""
    for name, factor in product(args.setups, (1.0, args.factor)):
        slow_rank = args.slow_rank if factor > 1 else 0
        options = {"setup": name, "factor": factor, "slow_rank": slow_rank}
        options |= {"epochs": args.epochs, "step": args.step, "seed": args.seed}
        if args.samples is not None:
            options["samples"] = args.samples
        if find(read(args.out / FILE), {"rate_mbit": args.rate} | options):
            continue
        print(f"{name}, rank {slow_rank} × {factor:g}", flush=True)
        with exiting():
            result = measure(options, args.rate, args.data_dir)
        row = {"rate_mbit": args.rate, "ranks": RANKS, "cores": os.cpu_count()} | options
        append(args.out / FILE, [row | {"samples": result.pop("samples")} | result], digits=6)


if __name__ == "__main__":
    main()
