"""One rank, which ``python -m benchmarks.network`` starts in a network namespace."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.network.schemes import FILES, TIMEOUT
from benchmarks.network.setups import (
    LinkMeter,
    TrafficMeter,
    outer_setups,
    rate_setups,
    sleeping_setups,
    sleeping_task,
)
from benchmarks.shared.meters import InterfaceMeter, PeakMeter
from benchmarks.shared.options import make_parser
from benchmarks.shared.rows import append
from benchmarks.shared.side_by_side import Meter, Plan, Setup, Values, run_rank
from benchmarks.shared.workloads import TASKS

COLUMNS = ("step_ms", "step_max_ms", "cpu_ms", "payload_mb", "network_mb")
"""Measured, on the mean over the ranks: of a step; ``step_max_ms`` is the slowest rank's."""
LAST = {"outer": "peak_mb_s"}
"""A column more, where it is not ``link_use``."""
TASK = TASKS["mlp"]


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=tuple(FILES), required=True)
    parser.add_argument("--rate", type=float, default=0.0, help="Mbit/s of the links; 0 for no limit")
    parser.add_argument("--factor", type=float, default=1.0, help="how many times as long a slow step takes")
    parser.add_argument("--rounds", type=int, nargs="+", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    meters: Sequence[Meter] = (InterfaceMeter(ranks=1), TrafficMeter())
    setups: Sequence[Setup]
    if args.kind == "rates":
        setups, meters = rate_setups(args.rate, TASK.bytes), (*meters, LinkMeter(args.rate))
        model, batch = TASK.model(), TASK.batch()
    elif args.kind == "outer":
        setups, meters = outer_setups(), (*meters, PeakMeter())
        model, batch = TASK.model(), TASK.batch()
    else:
        setups = sleeping_setups()
        model, batch = sleeping_task(args.factor, straggler=0 if args.kind == "straggler" else None)
    columns = (*COLUMNS, LAST.get(args.kind, "link_use"))
    began = time.monotonic()

    def report(setup: str, round_: int, values: Values) -> None:
        ranks = dist.get_world_size()
        row: dict[str, Any] = {"rate_mbit": args.rate, "ranks": ranks, "cores": os.cpu_count(), "factor": args.factor}
        row |= {"setup": setup, "round": round_}
        append(args.out, [row | {name: values.get(name, "") for name in columns}])
        print(f"{time.monotonic() - began:4.0f} s, round {round_}: {setup} {values['step_ms']:.1f} ms", flush=True)

    run_rank(setups, model, batch, args.rounds, report, Plan(timeout=TIMEOUT), meters, args.seconds)


if __name__ == "__main__":
    main()
