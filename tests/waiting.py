"""The one way in which a test waits for what others bring about."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 20, look: float = 0.002) -> None:
    """Wait until ``condition`` holds; fail where it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to pass within {seconds:g} s"
        time.sleep(look)
