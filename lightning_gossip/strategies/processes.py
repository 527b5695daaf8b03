"""Processes that a launcher has started: how they ended, when they are started again, and that none is left behind."""

from __future__ import annotations

import logging
import pickle
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

POLL = 0.2
"""Seconds between looks at the children."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
"""Seconds from a process' end to its next start: at first, and at the most."""


class Restarts:
    """Which processes are started again, and when: each so often, after a pause that doubles every time.

    Args:
        limit: of restarts of one process.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: Counter[int] = Counter()
        self._when: dict[int, float] = {}

    def note(self, index: int) -> None:
        """Note that a process has failed just now."""
        if self._counts[index] < self._limit:
            self._when[index] = time.monotonic() + min(_FIRST_PAUSE * 2 ** self._counts[index], _LONGEST_PAUSE)
            self._counts[index] += 1

    def due(self) -> list[int]:
        """Return those that are to be started now, each once."""
        due = [index for index, when in self._when.items() if time.monotonic() >= when]
        for index in due:
            del self._when[index]
        return due


@dataclass(frozen=True)
class AsIndex:
    """A function that takes a process' index first, for the process of that index alone."""

    function: Callable[..., None]
    index: int

    def __call__(self, _: int, *args: Any) -> None:
        """Call it for that process."""
        self.function(self.index, *args)


def start_again(commands: Sequence[Any], environment: Mapping[str, str], index: int) -> subprocess.Popen:
    """Run the script again for a further local rank, as Lightning does."""
    return subprocess.Popen(commands[index], env={**environment, "LOCAL_RANK": str(index + 1)})


def how_ended(code: int) -> str:
    """Return in words what a process' exit code says."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def traceback_of(error_file: str) -> str:
    """Return the traceback that a process of :mod:`torch.multiprocessing` left, on lines of its own; empty for none."""
    try:
        with open(error_file, "rb") as file:
            return f"\n{pickle.load(file)}"
    except (OSError, EOFError):
        return ""


def grace_of(timeout: float) -> float:
    """Return the seconds that processes get to end by themselves: all have to be gone within twice the timeout."""
    return min(timeout / 2, 30.0)


def end_processes(procs: Sequence[Any], grace: float) -> None:
    """Wait up to ``grace`` seconds for ``procs`` to end, then kill those that have not.

    Args:
        procs: of :mod:`subprocess` or :mod:`multiprocessing`.
        grace: seconds.
    """
    deadline = time.monotonic() + grace
    pause = threading.Event()
    while any(alive(proc) for proc in procs) and time.monotonic() < deadline:
        pause.wait(POLL / 4)
    for proc in procs:
        if alive(proc):
            log.error("process %s has not ended within %.0f s; killing it", proc.pid, grace)
            proc.kill()


def alive(proc: Any) -> bool:
    """Whether a process of :mod:`subprocess` or :mod:`multiprocessing` has not ended."""
    return proc.poll() is None if isinstance(proc, subprocess.Popen) else proc.is_alive()
