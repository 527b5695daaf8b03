"""Ranks as forked processes of this one, none of which outlives it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from types import FrameType
from typing import NoReturn

_GRACE = 15.0
"""Seconds that ranks get to end by themselves, once one of them has failed."""


def start_ranks(world_size: int, function: Callable[[], None], seconds: float) -> None:
    """Call ``function`` in ``world_size`` forked processes with torchrun's environment, and wait for them.

    Args:
        world_size: number of processes.
        function: what each does; it sees its rank in the environment.
        seconds: after which they are ended.

    Raises:
        RuntimeError: if one of them failed, or they took longer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, world_size, port, function)) for rank in range(world_size)]
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        for process in ranks:
            process.start()
        _watch(ranks, time.monotonic() + seconds)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
        for process in ranks:
            if process.pid is not None:
                process.join()
        signal.signal(signal.SIGTERM, before)


def _watch(ranks: list[multiprocessing.context.ForkProcess], deadline: float) -> None:
    """Wait until all have ended, or the time is up: of the whole, or of those left once one has failed."""
    failure = None
    while True:
        running = [process for process in ranks if process.is_alive()]
        if failure is None and (failed := [(rank, p.exitcode) for rank, p in enumerate(ranks) if p.exitcode]):
            failure = "rank {} ended with exit code {}".format(*failed[0])
            deadline = min(deadline, time.monotonic() + _GRACE)
        left = deadline - time.monotonic()
        if not running or left <= 0:
            break
        wait([process.sentinel for process in running], timeout=left)
    if failure is not None:
        raise RuntimeError(failure)
    if running:
        raise RuntimeError("the ranks took too long and were ended")


def _rank(rank: int, world_size: int, port: int, function: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    function()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _exit(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)
