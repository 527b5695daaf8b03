"""Threads beside training, of which none is in native code any more when the interpreter ends.

A daemon thread that comes back from native code while the interpreter ends is ended there and then, through frames of
C++ that do not allow it: the process aborts ("terminate called without an active exception", exit status 134), though
its training went well (CPython up to 3.13; https://github.com/python/cpython/issues/87135). One that is no daemon would
be waited for without limit. So at the interpreter's end those that still run are told to end, and get a moment for it.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable

from typing_extensions import override

GRACE = 3.0
"""Seconds that all of them have to come back from what they are at; gloo does not while it connects to nobody."""

_helpers: weakref.WeakSet[HelperThread] = weakref.WeakSet()


class HelperThread(threading.Thread):
    """A daemon thread, which runs from now on.

    Args:
        work: what it does.
        name: of the thread.
        ask_to_end: lets ``work`` end soon, wherever it is; called at most once, and does not wait.
    """

    def __init__(self, work: Callable[[], None], name: str, ask_to_end: Callable[[], object]) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self._ask_to_end: Callable[[], object] | None = ask_to_end
        _helpers.add(self)
        self.start()

    @override
    def run(self) -> None:
        try:
            super().run()
        finally:
            self._ask_to_end = None  # or it and its owner would keep each other, as with `work`, which Thread drops

    def ask_to_end(self) -> None:
        """Let it end soon."""
        if (ask := self._ask_to_end) is not None:
            ask()


@atexit.register
def _end_helpers() -> None:
    running = [helper for helper in _helpers if helper.is_alive()]
    for helper in running:
        helper.ask_to_end()
    deadline = time.monotonic() + GRACE
    for helper in running:
        helper.join(max(0.0, deadline - time.monotonic()))
