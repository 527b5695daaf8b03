"""Commands that a benchmark runs to their end, and that end with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import IO, NoReturn


def exit_on(signum: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal: end this process as usual, so that what it has to clean up is cleaned up."""
    sys.exit(128 + signum)


def run(command: Sequence[str], output: IO[bytes], grace: float = 60.0) -> int:
    """Run a command and return its exit code; where this process ends first, the command does.

    Args:
        command: program and arguments.
        output: of both its streams.
        grace: seconds that it gets to end after SIGTERM, before SIGKILL.
    """
    signal.signal(signal.SIGTERM, exit_on)
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(grace)
                except subprocess.TimeoutExpired:
                    process.kill()
