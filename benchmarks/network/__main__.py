"""Training over slow links: each rank in a network namespace of its own (root, iproute2; exits with 2 without).

    python -m benchmarks.network [--rates 200 1000 50]   # steps/s and link use at rates in Mbit/s
    python -m benchmarks.network --outer --rates 200     # outer steps, and what else there is for slow links
    python -m benchmarks.network --stalls                # every rank stalls now and then
    python -m benchmarks.network --straggler 3           # one rank takes 3 times as long, for good
    python -m benchmarks.network --table                 # of the rows that are there; --plot: their pictures

Four ranks train the MNIST perceptron of 2.9 million parameters under no communication, Lightning's DDP, elastic gossip
and Downpour, in blocks of steps that take turns (`shared/side_by_side.py`); each rank's uplink and downlink has the
rate. They share this host's processors. Downpour's server runs in rank 0's namespace: rank 0 reaches it over loopback,
the others over rank 0's link. With --stalls and --straggler a step sleeps instead of computing, as if each rank had a
processor of its own (a stalled rank on a shared one lends it to the others, which hides the loss), and links are not
limited. With --outer they train with outer steps, under DDP with torch's hooks, and with torchft in a plain loop.

Rows go to ``results/network*.csv``; rounds that are there are not measured again, so a run can be ended and continued.
Time to 97 % on MNIST is the updates to reach it, from ``python -m benchmarks.network.accuracy``, times the step's time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.network import report, torchft_loop
from benchmarks.network.schemes import FILES, TORCHFT
from benchmarks.shared.namespaces import ENVIRONMENT, Network, exiting
from benchmarks.shared.options import make_parser
from benchmarks.shared.ranks import environment, watch
from benchmarks.shared.rows import find, read, rounds_missing

RANKS = 4
RATES = (200.0, 1000.0, 50.0)
PORT = 29500
"""Of rank 0; nobody else is in its namespace."""
STALL_FACTOR = 3.0
"""How many times as long a step takes that stalls."""


def measure(kind: str, rate: float, factor: float, rounds: Sequence[int], out: Path, seconds: float) -> None:
    """Run ``rounds`` in namespaces; no round begins after ``seconds``.

    Raises:
        RuntimeError: if a rank failed.
        NetworkUnavailable: if there can be no namespaces.
    """
    out = out.resolve()  # the ranks begin where the package `benchmarks` is found
    options = ["--kind", kind, "--rate", f"{rate:g}", "--factor", f"{factor:g}", "--seconds", f"{seconds:g}"]
    options += ["--rounds", *map(str, rounds)]
    with Network(RANKS) as network:
        network.set_rate(rate)
        ranks = [
            network.start(
                rank,
                [sys.executable, "-m", "benchmarks.network.rank", str(out), *options],
                os.environ | environment(rank, RANKS, 1, network.address(0), PORT) | ENVIRONMENT,
                cwd=ROOT,
            )
            for rank in range(RANKS)
        ]
        watch(lambda: [process.poll() for process in ranks], 2 * seconds + 600)


def positive(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError(f"must be from 1 to 100,000 Mbit/s, got {text}")
    return value


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--rates", type=positive, nargs="+", default=list(RATES), help="Mbit/s")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--outer", action="store_true", help="instead: outer steps, hooks of DDP's, and torchft")
    kinds.add_argument("--stalls", action="store_true", help="instead: steps that stall")
    kinds.add_argument("--straggler", type=float, metavar="FACTOR", help="instead: one rank is slow, so many times")
    parser.add_argument("--rounds", type=int, default=8, help="of blocks, a rate")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no round begins")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    parser.add_argument("--plot", action="store_true", help="draw what is there and measure nothing")
    args = parser.parse_args()
    if args.straggler is not None and not 1 < args.straggler <= 100:
        parser.error(f"--straggler must be above 1 and at most 100, got {args.straggler:g}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    kind = "outer" if args.outer else "stalls" if args.stalls else "straggler" if args.straggler else "rates"
    if not (args.table or args.plot):
        run(kind, args)
    if args.plot:
        report.draw(args.out)
    else:
        report.print_tables(args.out, [kind] if not args.table else list(FILES))


def run(kind: str, args: argparse.Namespace) -> None:
    file = args.out / FILES[kind]
    end = time.monotonic() + args.seconds
    rates = args.rates if kind in ("rates", "outer") else [0.0]
    setups = report.setups_of(kind)
    if kind == "outer" and not torchft_loop.is_installed():
        setups = [name for name in setups if name not in TORCHFT]
        print(f"{torchft_loop.MISSING}: left out", file=sys.stderr)
    factor = {"rates": 1.0, "outer": 1.0, "stalls": STALL_FACTOR, "straggler": args.straggler}[kind]
    for rate in rates:
        here = {"rate_mbit": f"{rate:.4g}", "factor": f"{factor:.4g}", "ranks": RANKS}
        rounds = rounds_missing(find(read(file), here), setups, args.rounds)
        if not rounds or time.monotonic() >= end:
            continue
        with exiting():
            measure(kind, rate, factor, rounds, file, min(end - time.monotonic(), 86_400))


if __name__ == "__main__":
    main()
