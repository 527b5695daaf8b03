"""Groups of the members that have met: made at once or not at all, and given up where one of them is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store

CONNECT = timedelta(seconds=0.3)
"""For each of gloo's five attempts to connect the members of a group: nothing else wakes it in its constructor."""

_TAG = 2
"""Of messages that nobody sends."""


class MemberLost(RuntimeError):
    """A member was lost while the others made a group with it."""


class MeetingStore(Store):
    """The run's store while members make a group: who waits for one that is lost is told so.

    Args:
        store: the run's, on a connection that nobody blocks.
        is_lost: whether one of those who make the group is lost.
        timeout: of every wait.
    """

    def __init__(self, store: Store, is_lost: Callable[[], bool], timeout: timedelta) -> None:
        super().__init__()
        self._store = store
        self._is_lost = is_lost
        self._timeout = timeout
        self._pause = threading.Event()

    def set(self, key: str, value: str) -> None:
        """Set ``key``."""
        self._store.set(key, value)

    def add(self, key: str, value: int) -> int:
        """Add to the number at ``key``."""
        return int(self._store.add(key, value))

    def check(self, keys: list[str]) -> bool:
        """Whether all ``keys`` are there."""
        return bool(self._store.check(keys))

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, once it is there."""
        self.wait([key])
        return self._store.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until ``keys`` are there.

        Raises:
            MemberLost: if a member is lost, or does not come within the timeout.
        """
        deadline = time.monotonic() + (timeout or self._timeout).total_seconds()
        pause = 0.0005
        while not self._store.check(keys):
            if self._is_lost():
                raise MemberLost("a member was lost before it had joined the group")
            if time.monotonic() > deadline:
                raise MemberLost(f"a member did not join the group within {self._timeout.total_seconds():g} s")
            self._pause.wait(pause)
            pause = min(2 * pause, 0.02)


def give_up(group: Any, index: int, size: int) -> None:
    """Let every wait of a gloo group fail, here and at its neighbours: a receive that times out closes connections.

    Args:
        group: a ``ProcessGroupGloo``.
        index: of this process in it.
        size: of the group.
    """
    if size > 1:
        nothing = torch.empty(1, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            group.recv([nothing], (index + 1) % size, _TAG).wait(timedelta(milliseconds=1))
