"""Text under schemes that exchange rarely: loss against updates, bytes sent, and wall time on slow links.

    python -m benchmarks.text                                 # all rows, three seeds
    python -m benchmarks.text --rows ddp,diloco-25 --seeds 0  # some
    python -m benchmarks.text --table                         # of the rows that are there; --plot draws them

The model of ``examples/gpt.py`` on the sources of Python's standard library, one budget of text for all schemes; each
rank keeps a contiguous stretch of it. Ranks are processes of this host, and links are not limited: training is
measured in updates and bytes, and the time on links of 200 Mbit/s is computed (`links.py`) from
that of a step, which ``python -m benchmarks.text.step`` measures. Rows in ``results/text.csv`` are not trained again;
curves are in ``results/text_curves.csv``.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from language_model import SIZES

import lightning_gossip
from benchmarks import RESULTS
from benchmarks.shared.options import at_least, listed, make_parser, one_of
from benchmarks.shared.ranks import fork_ranks
from benchmarks.shared.rows import append, find, read
from benchmarks.text.report import against_diloco, draw, load, table, tried
from benchmarks.text.schemes import ROWS, Row
from benchmarks.text.training import EVERY, Point, Setting, as_columns, train

MINUTES = 60.0
"""Of a training at most."""


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--rows", type=listed(one_of(ROWS)), default=list(ROWS), metavar="ID,ID", help=f"some of {','.join(ROWS)}")
    add("--seeds", type=listed(int), default=[0, 1, 2], help="of weights, order of the text, partners")
    add("--model", choices=tuple(SIZES), default="nano")
    add("--lr", type=float, default=None, help="AdamW's; None: the example's for the model")
    add("--steps", type=at_least(2 * EVERY), default=600, help=f"updates; a multiple of {2 * EVERY}")
    add("--batch", type=at_least(1), default=64, help="windows an update, over all ranks")
    add("--context", type=at_least(2), default=64, help="bytes of a window")
    add("--seconds", type=float, default=float("inf"), help="after which no training begins; run again to continue")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    add("--table", action="store_true", help="print what is there and train nothing")
    add("--plot", action="store_true", help="draw what is there and train nothing")
    args = parser.parse_args()
    if args.steps % (2 * EVERY):
        parser.error(f"--steps must be a multiple of {2 * EVERY}, got {args.steps}")
    if args.context > SIZES[args.model].context:
        parser.error(f"--context is at most {SIZES[args.model].context} for {args.model}, got {args.context}")
    if uneven := [name for name in args.rows if args.batch % ROWS[name].ranks]:
        parser.error(f"--batch is over all ranks: {args.batch} is no multiple of those of {', '.join(uneven)}")
    return args


def run(row: Row, setting: Setting, out: Path) -> None:
    """Train a row and append it, and its curve."""
    key = {"id": row.id, "ranks": row.ranks, **asdict(setting)}

    def report(figures: dict[str, Any], points: list[Point]) -> None:
        append(out / "text_curves.csv", [key | as_columns(point) for point in points], digits=6)
        append(out / "text.csv", [key | figures | {"version": lightning_gossip.__version__}], digits=6)
        print(f"{row.id}, seed {setting.seed}: loss {figures['loss']:.4f}, {figures['seconds']:.0f} s", flush=True)

    setting.data().prepare_data()
    fork_ranks(row.ranks, lambda: train(row, setting, report), 60 * MINUTES)


def main() -> None:
    args = parse_arguments()
    end = time.monotonic() + args.seconds
    lr = SIZES[args.model].lr if args.lr is None else args.lr
    setting = Setting(args.model, lr, args.steps, args.batch, args.context, args.seeds[0])
    if args.plot or args.table:
        curves = load(args.out, setting, args.rows, args.seeds)
        if args.plot:
            draw(curves, args.out)
        else:
            print(table(curves), *against_diloco(curves), "", tried(args.out, setting), sep="\n")
    else:
        for seed, name in itertools.product(args.seeds, args.rows):
            if time.monotonic() >= end:
                return
            here = replace(setting, seed=seed)
            if not find(read(args.out / "text.csv"), {"id": name, **asdict(here)}):
                run(ROWS[name], here, args.out)


if __name__ == "__main__":
    main()
