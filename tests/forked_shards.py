"""Shards of a parameter server that are forked from the test: torch is imported already, they serve at once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from typing import Any, NoReturn

from lightning_gossip.parameter_server import __main__ as shard_command


class ForkedShard:
    """What `ShardProcess` starts, in a fork of the test, which has torch imported already.

    Takes `subprocess.Popen`'s place.
    """

    def __init__(self, command: list[str], **_: Any) -> None:
        stdin, write = os.pipe()
        read, stdout = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            serve(command[2:], stdin, stdout)  # after the interpreter, and how it runs a module
        os.close(stdin)
        os.close(stdout)
        self.stdin, self.stdout = os.fdopen(write, "w"), os.fdopen(read)

    def wait(self, timeout: float = 60) -> int:
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a shard", timeout)
            else:
                time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def serve(arguments: list[str], stdin: int, stdout: int) -> NoReturn:
    """Be ``python -m lightning_gossip.parameter_server`` with its own ends of two pipes."""
    code = 1
    try:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        logging.getLogger().handlers.clear()  # pytest's write to descriptors that are somebody else's from here on
        os.closerange(3, 1024)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")  # none of pytest's
        sys.argv = arguments
        code = shard_command.main()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - told; this process ends here
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
