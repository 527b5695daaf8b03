"""What a storm's processes hold, once a minute: does it grow?"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.faults.storm_schemes import PORT
from benchmarks.shared.namespaces import ENVIRONMENT, Network

EVERY = 60.0
"""Seconds from one look to the next."""

_KEYS = "import sys, torch.distributed as d; print(d.TCPStore(sys.argv[1], int(sys.argv[2])).num_keys())"


@dataclass(frozen=True)
class Holding:
    """What is held at one moment.

    Attributes:
        second: from the storm's beginning.
        processes: in all namespaces.
        memory_mib: anonymous and resident, of the rank that has most: pages of a program's files are shared, and only
            come in when they are first used.
        descriptors: of the rank that has most open.
        threads: of the rank that has most.
        keys: in the run's store.
        files: in the folder for temporary files, which is the run's own.
    """

    second: float
    processes: int
    memory_mib: float
    descriptors: int
    threads: int
    keys: int
    files: int


class Watch:
    """Looks at a run's processes from outside.

    Args:
        network: of the run.
        place: of its store.
        temporary: the folder for temporary files.
    """

    def __init__(self, network: Network, place: int, temporary: Path) -> None:
        self._network, self._place, self._temporary = network, place, temporary
        self._began = self._next = time.monotonic()
        self.seen: list[Holding] = []

    def look(self) -> None:
        """Look, if it is time; a machine that has none for it is looked at a minute later."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next += EVERY
        if (keys := self._keys()) is None:
            return
        processes = [pid for place in range(self._place + 1) for pid in self._network.processes(place)]
        ranks = [pid for place in range(self._place) for pid in self._network.processes(place)]
        found = [status for pid in ranks if (status := _status(pid)) is not None]
        self.seen.append(
            Holding(
                round(now - self._began, 1),
                len(processes),
                max((memory for memory, _, _ in found), default=0.0),
                max((descriptors for _, descriptors, _ in found), default=0),
                max((threads for _, _, threads in found), default=0),
                keys,
                sum(1 for _ in self._temporary.rglob("*")),
            )
        )

    def _keys(self) -> int | None:
        address = self._network.address(self._place)
        command = [sys.executable, "-c", _KEYS, address, str(PORT)]
        environment = dict(os.environ) | ENVIRONMENT
        with self._network.start(self._place, command, environment, stdout=subprocess.PIPE) as process:
            try:
                output, _ = process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                return None
        return int(output)


def _status(pid: int) -> tuple[float, int, int] | None:
    """Return anonymous resident MiB, open descriptors and threads of a process; None where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return int(status["RssAnon"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None


def growth(seen: Sequence[Holding]) -> dict[str, float]:
    """Return by how much each number grew: the last quarter's median less that of the second quarter."""
    quarter = len(seen) // 4
    early, late = seen[quarter : 2 * quarter], seen[-quarter:]
    names = [field.name for field in fields(Holding) if field.name != "second"]
    return {
        name: statistics.median(getattr(one, name) for one in late)
        - statistics.median(getattr(one, name) for one in early)
        for name in names
    }
