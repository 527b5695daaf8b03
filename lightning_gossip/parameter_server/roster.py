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
        self._empty_since = time.monotonic()

    def join(self, worker: int, setup: Setup) -> Shard:
        """Note that ``worker`` came, and return the shard.

        Raises:
            ProtocolError: if its set-up is not that of the workers before it.
        """
        with self._lock:
            if not 0 <= worker < setup.workers:
                raise ProtocolError(f"worker {worker} is none of {setup.workers}")
            if self.shard is None:
                self.shard = Shard(setup)
            elif self.shard.setup != setup:
                raise ProtocolError(f"worker {worker} was set up differently: {_difference(self.shard.setup, setup)}")
            self._present[worker] += 1
            self._gone.discard(worker)
            return self.shard

    def leave(self, worker: int) -> None:
        """Note that a link of ``worker`` ended."""
        with self._lock:
            self._present[worker] -= 1
            if not self._present[worker]:
                del self._present[worker]
                self._gone.add(worker)
            self._empty_since = time.monotonic()

    def status(self) -> Status:
        """Return how far the shard is."""
        with self._lock:
            lead = "present" if self._present[0] else "gone" if 0 in self._gone else "absent"
        shard = self.shard
        return Status(0, False, lead) if shard is None else Status(shard.training, shard.ready, lead)

    def everybody_left(self) -> bool:
        """Return whether every worker came and left."""
        with self._lock:
            return self.shard is not None and len(self._gone) == self.shard.setup.workers

    def deserted_for(self) -> float:
        """Return for how many seconds nobody of those that came has been there; 0 before the first came."""
        with self._lock:
            deserted = self.shard is not None and not self._present
            return time.monotonic() - self._empty_since if deserted else 0.0


def _difference(ours: Setup, theirs: Setup) -> str:
    mine, other = ours.to_json(), theirs.to_json()
    return ", ".join(f"{name} {other[name]} instead of {mine[name]}" for name in mine if mine[name] != other[name])
