"""The stop word: why a run ends before its time, and what that looks like in a program."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

T = TypeVar("T")

LOOK = 0.2
"""Seconds between looks at the stop word, and the longest for which a waiting thread does not look up."""


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its time.

    Attributes:
        kind: ``"error"``, ``"SIGTERM"`` or ``"SIGINT"``; ``"lost"`` where this rank alone ends, as the others have
            declared it lost and go on: it may join them anew.
        rank: that wrote it, -1 where nobody could (the store is gone).
        step: of that rank's exchange clock.
        cause: in words.
        lost: the rank whose loss was the cause, -1 where it was something else.
    """

    kind: str
    rank: int
    step: int
    cause: str
    lost: int = -1

    def __str__(self) -> str:
        return self.cause if self.rank < 0 else f"rank {self.rank} stopped at step {self.step}: {self.cause}"


class RunStopped(RuntimeError):
    """Another rank stopped; ``stop`` says which, when and why."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(str(stop))
        self.stop = stop


class SeatLost(RunStopped):
    """The others have declared this rank lost, and go on without it."""


def raise_stop(stop: Stop) -> NoReturn:
    """Raise what the stop looks like in a plain program: as this process' own error or signal would."""
    if stop.kind == "lost":
        raise SeatLost(stop)
    if stop.kind == "SIGINT":
        raise KeyboardInterrupt(str(stop))
    if stop.kind == "SIGTERM":
        raise SystemExit(143)
    raise RunStopped(stop)


class Stoppable:
    """Something of a rank that waits, and sees while it does that the run ends before its time.

    Args:
        rank: of this process.
        clock: returns the step at which this rank is, for messages.
        raise_stop: raises what a :class:`Stop` should look like in this program.
    """

    def __init__(self, rank: int, clock: Callable[[], int], raise_stop: Callable[[Stop], NoReturn]) -> None:
        self.rank = rank
        self.stopped: Stop | None = None
        self._clock = clock
        self._raise_stop = raise_stop
        self._closing = threading.Event()

    def stop_locally(self, kind: str, cause: str) -> None:
        """Let this rank's next :meth:`check` raise, without touching the store: for signal handlers."""
        if self.stopped is None:
            self.stopped = Stop(kind, self.rank, self._clock(), cause)

    def check(self) -> None:
        """Raise if some rank stopped.

        Raises:
            RunStopped: for an error; ``SystemExit`` and ``KeyboardInterrupt`` for signals (see ``raise_stop``).
        """
        if self.stopped is not None:
            self._raise_stop(self.stopped)

    def wait(self, event: threading.Event, deadline: float) -> bool:
        """Wait for ``event`` until ``deadline`` (of :func:`time.monotonic`); return whether it came.

        Raises:
            RunStopped: as :meth:`check`.
        """
        while not event.wait(min(LOOK, max(0.0, deadline - time.monotonic()))):
            self.check()
            if time.monotonic() >= deadline:
                return False
        return True

    def poll(self, look: Callable[[], T | None], deadline: float, longest: float = LOOK / 10) -> T | None:
        """Call ``look`` until it finds something, and return that; None at ``deadline`` (of :func:`time.monotonic`).

        The pause between looks grows to ``longest`` seconds.

        Raises:
            RunStopped: as :meth:`check`.
        """
        pause = 0.0001
        while (found := look()) is None:
            self.check()
            if time.monotonic() >= deadline:
                return None
            self._closing.wait(pause)
            pause = min(1.5 * pause, longest)
        return found

    def await_stop(self, seconds: float) -> Stop | None:
        """Return the stop word, giving it some seconds to arrive: a lost connection is often its consequence."""
        deadline = time.monotonic() + seconds
        while self.stopped is None and time.monotonic() < deadline:
            self._closing.wait(0.05)
        return self.stopped

    def check_cause(self, lost: int) -> None:
        """Raise as :meth:`check` where a rank is gone because some rank stopped, for another cause than that loss."""
        stop = self.await_stop(1.0)
        if stop is not None and stop.lost != lost:
            self.check()
