"""The run's store in a process of its own: torch's ``TCPStore`` and nothing else (design §10).

Where ranks are to outlive each other, none of them can hold the store. Start it by hand, on a machine that stays::

    lightning-gossip store --port 29500

and give every rank torch's own variables: ``MASTER_ADDR``, ``MASTER_PORT``, ``TORCHELASTIC_USE_AGENT_STORE=True``. It
ends with the last process that is connected to it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store, TCPStore

from lightning_gossip.control.interpreter import module_command

log = logging.getLogger(__name__)

VARIABLE = "TORCHELASTIC_USE_AGENT_STORE"
"""Of the environment, torch's own: ``True`` where somebody else than rank 0 holds the store."""

_ESTABLISHED, _LISTENING = "01", "0A"
_TAKEN = 10.0
"""Seconds for which the store of a run before may still be at its port."""

_LINGER = 3.0
"""Seconds without a connection after which the run is over: between two, a process may have none for a moment."""


def serve_store(port: int, first: timedelta = timedelta(minutes=10)) -> int:
    """Hold a store until the last process that was connected to it has ended.

    Args:
        port: to listen at, on all interfaces; 0 for any free one. It is printed on standard output.
        first: how long to wait for the first connection.

    Returns:
        The port.

    Raises:
        OSError: if the port is taken.
        RuntimeError: where the system does not show its connections (other than Linux).
    """
    pause, deadline = threading.Event(), time.monotonic() + _TAKEN
    while port and _count(port, _LISTENING):  # torch would share it: ranks would find one store or the other
        if time.monotonic() > deadline:
            raise OSError(taken(port))
        pause.wait(0.1)
    store = _listen(port)
    print(store.port, flush=True)
    last, seen = time.monotonic(), False
    while True:
        if connections(store.port) > 0:
            last, seen = time.monotonic(), True
        if time.monotonic() - last > (_LINGER if seen else first.total_seconds()):
            return int(store.port)
        pause.wait(0.5)


def _listen(port: int) -> TCPStore:
    try:
        return TCPStore("0.0.0.0", port, None, True, timedelta(minutes=5), wait_for_workers=False)
    except RuntimeError as error:
        raise OSError(taken(port) if is_taken(error) else str(error)) from error


def is_taken(error: RuntimeError) -> bool:
    """Whether that is why torch could not listen at a port."""
    return "EADDRINUSE" in str(error)


def taken(port: int) -> str:
    """Return what to do where a run finds its port taken."""
    return (
        f"port {port} is taken, by another run it may be: give each run on a host a MASTER_PORT of its own"
        " (`torchrun --master-port`; `lightning-gossip store --port`)"
    )


def connections(port: int) -> int:
    """Return how many connections from other processes a port of this host has.

    Raises:
        RuntimeError: where the system does not show them.
    """
    return _count(port, _ESTABLISHED) - 1  # the store's own client, of the process that holds it


def _count(port: int, state: str) -> int:
    rows: list[list[str]] = []
    shown = False
    for name in ("tcp", "tcp6"):
        try:
            rows += [row.split() for row in Path("/proc/net", name).read_text().splitlines()[1:]]
        except OSError:
            continue
        shown = True  # though a host, or a container, may have no connection yet
    if not shown:
        raise RuntimeError("the store counts its connections in /proc/net/tcp, which this system does not have")
    return sum(row[1].endswith(f":{port:04X}") and row[3] == state for row in rows)


def start_store(port: int) -> subprocess.Popen[str]:
    """Start a store at ``port`` in a process of its own, which outlives this one, and wait until it is there.

    It is in no terminal's foreground: Ctrl-C reaches the ranks, and they need it until they have ended.

    Raises:
        RuntimeError: if it ends at once: its port is taken.
    """
    command = module_command("lightning_gossip", "store", "--port", str(port), "--wait", "60")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0)
    with process.stdout or nullcontext() as output:
        if output is None or not output.readline():
            raise RuntimeError(f"the run's store did not start at port {port}: exit code {process.wait()}")
    return process


def value_of(store: Store, key: str) -> bytes | None:
    """Return the value of a key, None where there is none: also where it is removed between two looks at it.

    Whoever was cut off, and is lost without knowing it, may look at what the others have left behind since.
    """
    return store.get(key) or None if store.check([key]) else None


_reached: dict[tuple[str, int], Store] = {}
"""Connections of this process: a store goes when nobody is connected any more."""


def is_held() -> bool:
    """Whether somebody else than a rank holds the store, as far as the environment tells."""
    return os.environ.get(VARIABLE) == "True"


def part(host: str, port: int) -> None:
    """Give up this process's connection to the run's store."""
    _reached.pop((host, port), None)


def reach(host: str, port: int, timeout: timedelta = timedelta(minutes=2)) -> Store:
    """Return this process's connection to the run's store, which it keeps.

    Raises:
        RuntimeError: if no rank may be sure that the store outlives it, or nobody holds it within ``timeout``.
    """
    if not is_held():
        raise RuntimeError(
            "`min_replicas` needs the run's store in a process of its own, so that it outlives every rank: this"
            " package's launchers start it where the script's first Trainer has `min_replicas`. Else start"
            " `lightning-gossip store --port PORT`, and give all ranks MASTER_ADDR, MASTER_PORT and"
            f" {VARIABLE}=True"
        )
    if (host, port) not in _reached:
        _reached[host, port] = TCPStore(host, port, None, False, timeout, wait_for_workers=False)
    return _reached[host, port]
