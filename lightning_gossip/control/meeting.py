"""What ranks know after a meeting, and of one another while they wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed import Store


class Process(NamedTuple):
    """One that came to a rank's seat: who comes to it once that one is lost is another.

    Attributes:
        rank: the seat.
        incarnation: how many came to it before.
    """

    rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.rank}.{self.incarnation}"

    @classmethod
    def of(cls, name: str) -> Process:
        """Return whom :meth:`__str__` names."""
        return cls(*map(int, name.split(".")))


@dataclass(frozen=True)
class Meeting:
    """What all ranks know after a meeting.

    Attributes:
        clock: the largest of the ranks' exchange clocks.
        skipped: whether some rank skipped a partner since the meeting before: their links are out of step.
        ending: whether some rank wants all to end training.
        number: of the meeting.
        members: the ranks that have met, by seniority: ascending, but that who joined later comes later.
        incarnations: of the members, see :mod:`~lightning_gossip.control.members`.
    """

    clock: int
    skipped: bool
    ending: bool
    number: int
    members: tuple[int, ...] = ()
    incarnations: tuple[int, ...] = ()


def tell_clock(store: Store, name: str, step: int) -> None:
    """Tell at which step the process of that name is."""
    store.set(f"clock/{name}", str(step))


def clocks_told(store: Store, names: Iterable[str]) -> list[int]:
    """Return the steps at which processes told last that they are; those that never did are left out."""
    keys = (f"clock/{name}" for name in names)
    return [int(store.get(key)) for key in keys if store.check([key])]


class Heartbeats:
    """For how long ranks have been silent, by this process' own clock."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[int, tuple[int, float]] = {}

    def silence(self, rank: int) -> float:
        """Return the seconds since the heartbeat of ``rank`` was last seen to change."""
        beat, now = self._store.add(f"alive/{rank}", 0), time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != beat:
            self._seen[rank] = (beat, now)
        return now - self._seen[rank][1]
