"""Ports that nobody else on the machine comes by."""

from __future__ import annotations

import random
import socket

_BELOW = range(10_000, 32_000)
"""Below those that a system gives to whoever asks for any, or connects somewhere: such a one may be gone at once."""

_random = random.SystemRandom()  # tests seed the other ones


def free_port() -> int:
    """Return a port of this host on which a program that is started now can listen in a moment."""
    while True:
        port = _random.choice(_BELOW)
        with socket.socket() as sock:
            try:
                sock.bind(("", port))
            except OSError:
                continue
            return port
