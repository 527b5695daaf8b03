"""Which workers a shard knows, who is there, and when nobody is left to serve."""

from __future__ import annotations

import threading
import time
from collections import Counter

from lightning_gossip.parameter_server.protocol import ProtocolError, Setup, Status
from lightning_gossip.parameter_server.shard import Shard


class Roster:
    """The workers of one shard; the first one's set-up holds for all."""

    def __init__(self) -> None:
        self.shard: Shard | None = None
        self._lock = threading.Lock()
        self._present: Counter[int] = Counter()
        self._gone: set[int] = set()
        self._broken_off: set[int] = set()  # without a goodbye, where somebody may come in their place
        self._empty_since = time.monotonic()

    def join(self, worker: int, setup: Setup) -> Shard:
        """Note that the worker of that number came, and return the shard.

        Raises:
            ProtocolError: if its set-up is not that of the workers before it, or it was dropped.
        """
        with self._lock:
            if not setup.has(worker):
                raise ProtocolError(f"worker {worker} is none of {setup.workers}")
            if self.shard is None:
                self.shard = Shard(setup)
            elif self.shard.setup != setup:
                how = _difference(self.shard.setup, setup)
                raise ProtocolError(f"{setup.name_of(worker)} was set up differently: {how}")
            self.shard.welcome(worker)
            self._present[worker] += 1
            self._gone.discard(worker)
            self._broken_off.discard(worker)
            return self.shard

    def drop(self, worker: int, by: int) -> bool:
        """Note that the run goes on without ``worker``, by the word of another; return whether that is new.

        Raises:
            ProtocolError: where a lost worker ends the run, or the word is that of a worker that was dropped itself.
        """
        with self._lock:
            shard = self.shard
            fits = shard is not None and shard.setup.survives and shard.setup.has(worker)
            if shard is None or not fits or worker == by or by in shard.dropped:
                raise ProtocolError(f"worker {by} may not let worker {worker} be dropped")
            new = worker not in shard.dropped
            shard.drop(worker)
            return new

    def leave(self, worker: int, goodbye: bool = True) -> None:
        """Note that a link of ``worker`` ended, by a goodbye or else."""
        with self._lock:
            self._present[worker] -= 1
            if not self._present[worker]:
                del self._present[worker]
                may_return = not goodbye and self.shard is not None and self.shard.setup.survives
                (self._broken_off if may_return else self._gone).add(worker)
            self._empty_since = time.monotonic()

    def status(self) -> Status:
        """Return how far the shard is."""
        shard = self.shard
        with self._lock:
            worker = 0 if shard is None else shard.lead
            lead = "present" if self._present[worker] else "gone" if worker in self._gone else "absent"
        return Status(0, False, lead) if shard is None else Status(shard.training, shard.ready, lead)

    def everybody_left(self) -> bool:
        """Return whether every worker came and left, or was dropped, and nobody may come in their place."""
        with self._lock:
            if self.shard is None:
                return False
            left = self.shard.workers
            return left <= self._gone | self._broken_off and not (left and left <= self._broken_off)

    def serves(self) -> bool:
        """Return whether a worker is there that is not dropped."""
        with self._lock:
            shard = self.shard
            return shard is not None and any(worker not in shard.dropped for worker in self._present)

    def deserted_for(self) -> float:
        """Return for how many seconds nobody of those that came has been there; 0 before the first came."""
        with self._lock:
            deserted = self.shard is not None and not self._present
            return time.monotonic() - self._empty_since if deserted else 0.0


def _difference(ours: Setup, theirs: Setup) -> str:
    mine, other = ours.to_json(), theirs.to_json()
    return ", ".join(f"{name} {other[name]} instead of {mine[name]}" for name in mine if mine[name] != other[name])
