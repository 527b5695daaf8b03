"""Iris on four ranks, of which rank 2 and then rank 0 are killed in mid-training, and started again.

python examples/faults.py

What a shell, or a cluster, does: a store that nobody's end takes along, and a process a rank. The others train on; who
comes back begins with the state of one that trains. It ends with the table of accuracies and the line of events.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from typing import Any

import lightning.pytorch as pl
from classifier import Classifier
from command_line import make_parser, parse
from iris import Iris, default_to_strategy
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import nn
from training import train_and_test

from lightning_gossip.control.store import VARIABLE, start_store

RANKS = 4
KILLED = (2, 0)
PATIENCE = 180.0
"""Seconds for anything that has to happen."""
PACE = 0.02
"""Seconds that a step takes at least: a process needs some to start."""


class Paced(Classifier):
    """Takes its time for a step, as a larger network does."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        time.sleep(PACE)


class Ranks:
    """A process a rank, whose output is printed as it comes, and looked at.

    Args:
        command: of a rank.
        environment: of all.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command, self._environment = command, environment
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._grown = threading.Condition()
        self._readers: list[threading.Thread] = []
        self.lines: list[str] = []

    def start(self, rank: int) -> None:
        """Start the process of ``rank``."""
        environment = self._environment | {"LOCAL_RANK": str(rank)}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(self._command, env=environment, text=True, **output)  # type: ignore[call-overload]
        self._processes[rank] = process
        self._readers.append(threading.Thread(target=self._read, args=(process,)))
        self._readers[-1].start()

    def kill(self, rank: int) -> None:
        """SIGKILL the process of ``rank``."""
        self._processes[rank].kill()
        self._processes[rank].wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            with self._grown:
                self.lines.append(line.strip())
                self._grown.notify_all()

    def await_line(self, part: str, begin: int = 0) -> int:
        """Wait until a line after the first ``begin`` holds ``part``; return how many there are then.

        Raises:
            SystemExit: where it does not come, or all have ended.
        """
        deadline = time.monotonic() + PATIENCE
        with self._grown:
            while not any(part in line for line in self.lines[begin:]):
                if time.monotonic() > deadline or all(p.poll() is not None for p in self._processes.values()):
                    sys.exit(f"nobody has said '{part}'")
                self._grown.wait(0.2)
            return len(self.lines)

    def end(self) -> int:
        """Wait for all; return the largest exit code."""
        codes = [process.wait() for process in self._processes.values()]
        for reader in self._readers:
            reader.join()
        return max(map(abs, codes))

    def kill_all(self) -> None:
        """Leave nothing behind."""
        for process in self._processes.values():
            process.kill()


def main() -> None:
    parser = make_parser(__doc__, epochs=60, batch_size=4, lr=None, momentum=None, log_every=10)
    parser.set_defaults(min_replicas=1, devices=RANKS)
    args = parse(parser, default_to_strategy)
    if "LOCAL_RANK" in os.environ:
        train(args)
    else:
        tend()


def train(args: argparse.Namespace) -> None:
    """Be a rank."""
    pl.seed_everything(args.seed, verbose=False)
    network = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    train_and_test(args, "faults", Paced(network, args.lr, args.momentum, args.seed), Iris(args))


def tend() -> None:
    """Start all ranks, kill some, start them again."""
    port = find_free_network_port()
    store = start_store(port)
    torchs = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), VARIABLE: "True", "OMP_NUM_THREADS": "1"}
    ranks = Ranks([sys.executable, "-u", *sys.argv], dict(os.environ) | torchs)
    try:
        for rank in range(RANKS):
            ranks.start(rank)
        seen = ranks.await_line("epoch 5/")
        for rank in KILLED:
            print(f"--- rank {rank} is killed, and started again", flush=True)
            ranks.kill(rank)
            ranks.start(rank)
            seen = ranks.await_line(f"rank {rank} joined", seen)
        code = ranks.end()
    finally:
        ranks.kill_all()
        store.wait()
    print("\nWhat happened:")
    for line in ranks.lines:
        if " go on" in line or "takes over" in line:
            print(f"  {line}")
    sys.exit(code)


if __name__ == "__main__":
    main()
