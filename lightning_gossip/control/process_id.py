"""Whether a process of this host still runs: what proves a death at once, where a heartbeat takes its time."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from pathlib import Path


def own_process() -> str:
    """Return what names this process to the others: its host as processes see it, its number, and when it started."""
    return f"{_host()}|{os.getpid()}|{_started(os.getpid())}"


def host_of(process: str) -> str:
    """Return where ``process``, somebody's :func:`own_process`, runs: processes of one host see each other."""
    return process.rsplit("|", 2)[0]


def is_gone(process: str) -> bool:
    """Whether ``process``, somebody's :func:`own_process`, has ended; False where it can not be seen from here."""
    host, pid, started = process.rsplit("|", 2)
    return host == _host() and _started(int(pid)) != started


@lru_cache(maxsize=1)
def _host() -> str:
    """Name what shares process numbers: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}|{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}|no /proc"


def _started(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; empty where it has ended, whoever has yet to wait for it.

    Where there is no ``/proc``, only that the number is taken.
    """
    try:
        # the name, in parentheses, may hold anything
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZXx" else fields[18]
    except OSError:
        if Path("/proc/self").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "runs"
