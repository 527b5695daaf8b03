"""How a process comes to its seat: as one of those of the beginning, or in the place of one that was lost.

The protocol is in ``members``; what a joiner does there once it has its seat, in ``member_control``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Store

from lightning_gossip.control.meeting import Heartbeats, Process, clocks_told
from lightning_gossip.control.member_control import OVER, RunOver, Survival
from lightning_gossip.control.member_log import MemberLog
from lightning_gossip.control.members import LOST, Members
from lightning_gossip.control.process_id import own_process
from lightning_gossip.control.run import HEARTBEAT, LOOK

_BEATS = 2
"""Signs of life by which a process is known to hold a seat."""


class SeatTaken(RuntimeError):
    """Another process holds the seat."""


def claim_seat(
    store: Store, rank: int, world_size: int, survival: Survival, check: Callable[[], None] = lambda: None
) -> int:
    """Return the incarnation as which this process may take part: 0 where it is the first that comes to its seat.

    Args:
        store: of the run, on a connection that nobody blocks.
        rank: the seat.
        world_size: number of seats.
        survival: see :class:`~lightning_gossip.control.member_control.Survival`.
        check: raises where this process should wait no longer.

    Raises:
        SeatTaken: if another process holds the seat, and lives.
        RunOver: if training is over.
    """
    claim = _Claim(store, rank, world_size, survival)
    pause = threading.Event()
    while (incarnation := claim.look()) is None:
        check()
        pause.wait(LOOK / 2)
    return incarnation


class _Claim:
    """Of one seat: what was seen of those that may hold it."""

    def __init__(self, store: Store, rank: int, world_size: int, survival: Survival) -> None:
        self._store = store
        self._rank = rank
        self._survival = survival
        self._process = survival.process or own_process()
        self._log = MemberLog(Members(world_size), rank, lambda change: None)
        self._heartbeats = Heartbeats(store)
        self._first = self._beats()
        self._began = time.monotonic()

    def look(self) -> int | None:
        """Return the incarnation that this process is; None where somebody has to be waited for."""
        store, rank = self._store, self._rank
        if store.check([OVER]):
            raise RunOver(store.get(OVER).decode())
        self._log.read(store)
        incarnation = self._log.incarnation(rank)
        if rank in self._log.present:
            if incarnation == 0 and self._take(0):
                return 0
            if cause := self._loss(incarnation):  # whoever trains may see it first, if anybody does
                self._log.append(store, LOST, rank, incarnation, self._clock_of_members(), cause)
                return self.look()
            self._refuse_living(incarnation)
            return None
        while not self._take(incarnation + 1):
            incarnation += 1
            if not self._has_ended(incarnation) and not self._is_silent():
                self._refuse_living(incarnation)
                return None
        return incarnation + 1

    def _take(self, incarnation: int) -> bool:
        """Claim the seat as ``incarnation``; return whether this process has it."""
        key = f"process/{self._rank}.{incarnation}"
        if self._store.check([key]):
            return False
        # this process may have been another incarnation before: the number makes it one claim
        return self._store.compare_set(key, "", self._process).decode() == self._process

    def _loss(self, incarnation: int) -> str:
        """Return why the process that holds the seat is lost; empty where it is not."""
        if self._has_ended(incarnation):
            return "its process is gone"
        limit = self._survival.lost_after.total_seconds()
        return f"no sign of life for {limit:g} s" if self._is_silent() else ""

    def _clock_of_members(self) -> int:
        """Return the step at which the run is, as far as one can tell that takes no part in it."""
        names = (str(Process(rank, self._log.incarnation(rank))) for rank in self._log.present)
        return max(clocks_told(self._store, names), default=0)

    def _has_ended(self, incarnation: int) -> bool:
        name = f"{self._rank}.{incarnation}"
        if self._store.check([f"gone/{name}"]):
            return True
        key = f"process/{name}"
        return self._store.check([key]) and self._survival.is_gone(self._store.get(key).decode())

    def _is_silent(self) -> bool:
        limit: timedelta = self._survival.lost_after
        return self._heartbeats.silence(self._rank) > limit.total_seconds()

    def _beats(self) -> int:
        return int(self._store.add(f"alive/{self._rank}", 0))

    def _refuse_living(self, incarnation: int) -> None:
        if self._beats() - self._first < _BEATS or time.monotonic() - self._began < _BEATS * HEARTBEAT / 2:
            return
        key = f"process/{self._rank}.{incarnation}"
        holder = self._store.get(key).decode() if self._store.check([key]) else "one that is still starting"
        _, _, process = holder.partition("|")
        raise SeatTaken(
            f"rank {self._rank} is there already, as process {process.replace('|', ', ') or holder}: a seat has one"
            " process. End that one first, or start this one for a rank that was lost"
        )
