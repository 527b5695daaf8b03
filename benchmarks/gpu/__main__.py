"""Try on one GPU what is said about CUDA: exactness, streams, speed, a profile, NCCL with one rank.

    python -m benchmarks.gpu                 # eight minutes at most; ends with status 2 where there is no GPU
    python -m benchmarks.gpu --rehearse      # the same on the CPU, small: what the tests do

The thesis' CIFAR-10 rows with ranks that share a GPU: ``python -m benchmarks.thesis --share-device``.
Checks and times are appended to ``gpu_checks.csv``, ``gpu_speed.csv`` and ``gpu_profile.csv`` in the results, and
printed. The exit status is 1 where a check does not hold or a part has failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products that come out the same twice

import torch

from benchmarks import RESULTS
from benchmarks.gpu import correctness, nccl, profiling, rows, speed, streams
from benchmarks.gpu.ranks import in_group, share_device
from benchmarks.shared.options import make_parser

PARTS = ("streams", "nccl", "correctness", "speed", "profile")
_SECONDS = 150.0
"""That one part may take."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--rehearse", action="store_true", help="on the CPU, with small models")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--ranks", nargs="+", type=int, default=[2, 4], help="of correctness; speed and profile take 2")
    add("--rounds", type=int, default=5, help="of speed, as many as its time allows")
    add("--seconds", type=float, default=45.0, help="of speed, for each model")
    add("--results", type=Path, default=RESULTS)
    add("--table", action="store_true", help="print what is in the results, and measure nothing")
    arguments = parser.parse_args(argv)
    if any(ranks < 2 for ranks in arguments.ranks):
        parser.error(f"--ranks must be at least 2 each, got {arguments.ranks}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.table:
        rows.print_tables(arguments.results)
        return 0
    if not arguments.rehearse and not has_gpu():
        print(
            "There is no GPU that torch can use: nothing was measured. `--rehearse` runs on the CPU.", file=sys.stderr
        )
        return 2
    device = torch.device("cpu") if arguments.rehearse else torch.device("cuda", 0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lightning-gossip-gpu-") as tempfile.tempdir:  # of all ranks, which fork
        failed = [part for part in arguments.parts if not run(part, arguments, device)]
    rows.print_tables(arguments.results)
    failed += rows.failures(arguments.results)
    print(f"\n{time.monotonic() - began:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "every check holds"))
    return 1 if failed else 0


def has_gpu() -> bool:
    """Ask a process of its own: this one must not touch CUDA before it forks."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run(part: str, arguments: argparse.Namespace, device: torch.device) -> bool:
    """Run one part in processes of its own; return whether it came to its end."""
    print(f"-- {part}", flush=True)
    began = time.monotonic()
    try:
        for world_size, function in _ranks_of(part, arguments, device):
            share_device(world_size, function, _SECONDS)
    except RuntimeError as error:
        print(f"FAILS  {part}: {error}", flush=True)
        return False
    print(f"-- {part}: {time.monotonic() - began:.0f} s", flush=True)
    return True


def _ranks_of(part: str, arguments: argparse.Namespace, device: torch.device) -> list[tuple[int, Callable[[], None]]]:
    """Return the groups of ranks of a part: how many, and what each of them does."""
    results, rehearse = arguments.results, arguments.rehearse
    if part == "streams":
        return [(1, partial(_check, partial(streams.all_checks, small=rehearse), device, results))]
    if part == "nccl":
        return [(1, partial(_check, nccl.all_checks, device, results))]
    if part == "correctness":
        checks = partial(_check, correctness.all_checks, device, results)
        return [(ranks, partial(in_group, checks)) for ranks in arguments.ranks]
    if part == "speed":
        return [(2, partial(_measure, model, arguments, device)) for model in speed.tasks(rehearse)]
    return [(2, partial(in_group, partial(_profile, model, arguments, device))) for model in speed.tasks(rehearse)]


def _check(checks: Callable[[torch.device], Iterator[rows.Check]], device: torch.device, results: Path) -> None:
    for check in checks(device):
        if int(os.environ["RANK"]) == 0:
            rows.add(results, rows.machine(device), check)


def _measure(model: str, arguments: argparse.Namespace, device: torch.device) -> None:
    file = speed.temporary_file()
    speed.measure(device, model, arguments.rehearse, arguments.rounds, arguments.seconds, file)
    if int(os.environ["RANK"]) == 0:
        speed.summarize(file, rows.machine(device), model, 2, arguments.results)


def _profile(model: str, arguments: argparse.Namespace, device: torch.device) -> None:
    profiling.run(device, model, arguments.rehearse, rows.machine(device), arguments.results)


if __name__ == "__main__":
    sys.exit(main())
