"""The stop word: why a run ends before its time, and what that looks like in a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn


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
    """Another rank stopped; :attr:`stop` says which, when and why."""

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
