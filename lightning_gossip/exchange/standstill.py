"""When a replica's parameters stand still, so that another thread may copy them.

They do from the end of a step, mixing included, to the update of the next one: while data is loaded, and during the
forward and backward pass. The update waits for a copy that is under way, and for nothing else.

===========  ==========================================  ==============================================================
state        from                                        who wants to copy
===========  ==========================================  ==============================================================
open         the start, and the end of each step         copies
shut         the optimizer's update                      waits until it is open
away         a meeting                                   is told so, and does without
===========  ==========================================  ==============================================================
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Standstill:
    """One replica's; the training thread opens and shuts it, others copy in it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._away = True
        self._copying = 0
        self.number = 0  # how often it was opened: what is copied under one number is equal

    def open(self) -> None:
        """Let others copy: nothing changes the parameters until it is shut."""
        with self._changed:
            if not self._open:
                self.number += 1
            self._open, self._away = True, False
            self._changed.notify_all()

    def shut(self) -> float:
        """Let nobody begin to copy; wait for whoever has begun, and return the seconds that it took."""
        start = time.perf_counter()
        with self._changed:
            self._open = False
            if not self._copying:
                return 0.0
            self._changed.wait_for(lambda: not self._copying)
        return time.perf_counter() - start

    def leave(self) -> None:
        """Let nobody copy, nor wait for it, until it is opened; wait for whoever has begun."""
        with self._changed:
            self._open, self._away = False, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._copying)

    @contextmanager
    def copying(self) -> Iterator[bool]:
        """Wait until it is open, and hold the parameters still; the value is False where this rank is away."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._away)
            may = self._open
            self._copying += may
        try:
            yield may
        finally:
            if may:
                with self._changed:
                    self._copying -= 1
                    self._changed.notify_all()
