"""Which processes run: they come and go while one looks."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import psutil

GONE = (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError)


def running(where: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Return the processes of which ``where`` holds; one that ends while it is looked at is none of them."""
    found = []
    for process in psutil.process_iter():
        with suppress(*GONE):
            if process.status() != psutil.STATUS_ZOMBIE and where(process):
                found.append(process)
    return found


def is_running(pid: int) -> bool:
    with suppress(*GONE):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def members(session: int) -> list[psutil.Process]:
    """Return the processes of a session."""
    return running(lambda process: os.getsid(process.pid) == session)


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(*GONE):
            process.kill()
