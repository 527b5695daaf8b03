"""A storm of faults over 8 small ranks: what is left of their work, and how soon the others, and the lost, go on.

    python -m benchmarks.faults.storm                    # needs root, iproute2; 10 minutes a run
    python -m benchmarks.faults.storm --schemes gossip --minutes 3
    python -m benchmarks.faults.storm --table            # what is there; --plot draws it

125 faults an hour, scaled to the run: a rank's process is killed and started again, stopped for two seconds, or cut off
for longer than it may be silent, each rank in a network namespace of its own, the store in a further one. The same
storm hits elastic gossip with members, asynchronous and by step, torchft 0.2's LocalSGD in a loop of its own (optional:
``pip install torchft==0.2.0``), and Lightning's DDP under ``torchrun --max-restarts`` from its last checkpoint; each
stands beside a run of its own without faults. What killed ranks are started again by is this program, and for DDP
torchrun. Rows in ``results/faults_storm.csv`` are not run again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.faults import storm_report as report
from benchmarks.faults.storm_leaks import Holding, Watch
from benchmarks.faults.storm_report import Fault, Step
from benchmarks.faults.storm_schemes import DEFAULT, LOST_AFTER, SCHEMES, WATCHED, Launch, launch_of
from benchmarks.network import torchft_loop
from benchmarks.shared.namespaces import ENVIRONMENT, Network, exiting
from benchmarks.shared.options import listed, make_parser, one_of

FAULTS_AN_HOUR = 125

STOPPED, CUT = 2.0, LOST_AFTER + 3
"""Seconds: of a stop, and of a cut."""

CALM = 20.0
"""Seconds without faults, at the beginning once all train, and at the end."""


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        scheme: one of :data:`SCHEMES`.
        ranks: their number.
        seconds: of training.
        pace: of a step, in seconds.
        faults: how many.
        seed: of the faults.
    """

    scheme: str
    ranks: int
    seconds: float
    pace: float
    faults: int
    seed: int

    def storm(self) -> list[Fault]:
        """Return the faults, by seconds from when all train; no two of them at once at one rank."""
        draw = random.Random(self.seed)
        span = (self.seconds - 2 * CALM) / max(1, self.faults)
        kinds = [("kill", "stop", "cut")[number % 3] for number in range(self.faults)]
        draw.shuffle(kinds)
        faults, last = [], -1
        for number, kind in enumerate(kinds):
            rank = draw.choice([rank for rank in range(self.ranks) if rank != last])
            last = rank
            faults.append(Fault(CALM + span * (number + 0.8 * draw.random()), kind, rank))
        return faults


class Run:
    """Processes of one run, in its network, and the faults that hit them."""

    def __init__(self, plan: Plan, network: Network, folder: Path) -> None:
        self._plan, self._network, self._folder = plan, network, folder
        self._launch: Launch = launch_of(plan.scheme, plan.ranks, plan.pace, folder, network.address(plan.ranks))
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._output = (folder / "output").open("ab")
        self.happened: list[Fault] = []

    def begin(self) -> float:
        """Start all; return when every rank has made a step, in seconds of the clock.

        Raises:
            RuntimeError: if they do not.
        """
        if self._launch.server is not None:
            self._start_process(self._plan.ranks, self._launch.server, {})
        for rank in self._launch.started:
            self._start(rank)
        deadline = time.monotonic() + 180
        while len({step.rank for step in report.steps_in(self._folder)}) < self._plan.ranks:
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all ranks train within 180 s; see {self._folder / 'output'}")
            time.sleep(0.1)
        return time.time()

    def _start(self, rank: int) -> None:
        environment = {"LOCAL_RANK": str(rank)} | self._launch.environment
        self._processes[rank] = self._start_process(rank, self._launch.command, environment)

    def _start_process(
        self, place: int, module: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        output: Any = {"stdout": self._output, "stderr": self._output}
        whole = {**os.environ, **ENVIRONMENT, "TMPDIR": str(self._folder / "temporary"), **environment}
        return self._network.start(place, [sys.executable, "-m", *module], whole, cwd=ROOT, **output)

    def hit(self, fault: Fault) -> None:
        """Let ``fault`` happen now; one that is to be cut off, and shares its links, is stopped for as long."""
        self.happened.append(Fault(time.time(), fault.kind, fault.rank))
        pid = self._pid(fault.rank)
        if pid is None:
            return  # it is starting
        if fault.kind == "kill":
            os.kill(pid, signal.SIGKILL)
            if self._launch.are_apart:
                self._processes[fault.rank].wait()
                self._start(fault.rank)
        elif fault.kind == "cut" and self._launch.are_apart:
            self._network.set_link(fault.rank, up=False)
            time.sleep(CUT)
            self._network.set_link(fault.rank, up=True)
        else:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED if fault.kind == "stop" else CUT)
            os.kill(pid, signal.SIGCONT)

    def _pid(self, rank: int) -> int | None:
        """Return the process of a rank, by the last one that has written down a step; None where it has ended."""
        last = max((path for path in (self._folder / "steps").glob(f"{rank}_*")), key=lambda p: p.name, default=None)
        pid = int(last.name.rpartition("_")[2]) if last is not None else 0
        return pid if pid and Path(f"/proc/{pid}/stat").exists() else None


@dataclass(frozen=True)
class Seen:
    """What a run was.

    Attributes:
        steps: that were made.
        faults: that happened, by seconds of the clock.
        began, ended: in seconds of the clock.
        held: once a minute, where a store's run was watched.
    """

    steps: list[Step]
    faults: list[Fault]
    began: float
    ended: float
    held: list[Holding]


def run(plan: Plan, folder: Path, watched: bool = False) -> Seen:
    """Train through the storm.

    Args:
        plan: what happens.
        folder: in which ranks write; emptied first.
        watched: whether to look at what the processes hold; of schemes that have a store.

    Raises:
        RuntimeError: if the ranks do not start.
        NetworkUnavailable: without root, or what it takes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "steps").mkdir(parents=True)
    (folder / "temporary").mkdir()
    with Network(plan.ranks + 1) as network:
        running = Run(plan, network, folder)
        began = running.begin()
        watch = Watch(network, plan.ranks, folder / "temporary")

        def wait(until: float) -> None:
            while (left := until - time.time()) > 0:
                if watched:
                    watch.look()
                time.sleep(max(0.0, min(1.0, left)))

        for fault in plan.storm() if plan.faults else ():
            wait(began + fault.when)
            running.hit(fault)
        wait(began + plan.seconds)
        ended = time.time()
        network.stop(grace=0)  # what they do at an end is no part of this
    return Seen(report.steps_in(folder), running.happened, began, ended, watch.seen)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--schemes", type=listed(one_of(SCHEMES)), default=list(DEFAULT), help=f"some of {','.join(SCHEMES)}")
    add("--ranks", type=int, default=8)
    add("--minutes", type=float, default=10.0, help="of a run")
    add("--pace", type=float, default=0.1, help="seconds that a step takes at least")
    add("--seed", type=int, default=1, help="of the faults")
    add("--work-dir", type=Path, default=ROOT / "logs" / "storm", help="what the ranks write")
    add("--results", type=Path, default=RESULTS, help="folder of the rows")
    add("--watch", action="store_true", help="what the processes of a gossip's run hold, once a minute, gets rows too")
    add("--table", action="store_true", help="print what is there, and run nothing")
    add("--plot", action="store_true", help="draw what is there, and run nothing")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    faults = round(FAULTS_AN_HOUR / 60 * args.minutes)
    if "torchft" in args.schemes and not torchft_loop.is_installed():
        sys.exit(torchft_loop.MISSING)
    if not (args.table or args.plot):
        for scheme in args.schemes:
            for count in (0, faults):
                plan = Plan(scheme, args.ranks, 60 * args.minutes, args.pace, count, args.seed)
                if not report.is_there(args.results, plan.scheme, count, args.minutes):
                    with exiting():
                        watched = args.watch and scheme in WATCHED
                        seen = run(plan, args.work_dir / f"{scheme}_{count}", watched)
                    report.keep_held(args.results, scheme, args.minutes, count, [asdict(held) for held in seen.held])
                    made = (seen.steps, seen.faults, seen.began, seen.ended)
                    report.keep(args.results, plan.scheme, args.minutes, count, args.ranks, *made)
    if args.plot:
        report.draw_all(args.results)
    report.show_table(args.results)


if __name__ == "__main__":
    main()
