"""A shard in a process of its own: how it is started, and what makes it end.

The shard ends when every worker has left (of a run that goes on without those that it loses, once nobody can come in
their place: see :mod:`.protocol`); when the process that started it closes its end of a pipe, or ends (forked
processes may hold the pipe open); and when it is killed. In a run that goes on without processes that it loses, the one
that started the shard among them, it ends after that one once no worker is connected and the run's store is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import TCPStore

from lightning_gossip.control.interpreter import module_command
from lightning_gossip.parameter_server.server import ShardServer
from lightning_gossip.parameter_server.shard_links import connect_store
from lightning_gossip.transport.link import ProcessGroupGloo, gloo_device

log = logging.getLogger(__name__)

_LOOK = 0.5
"""Seconds between two looks at whether the parent lives."""

_PROBE = 1.5
"""Seconds between two looks at whether the run's store is there, where nothing else says that the run goes on."""

_START = 60.0
"""Seconds in which a shard's process has to listen."""


def serve_shard(
    host: str, port: int, timeout: timedelta, parent: int | None = None, run_store: str | None = None
) -> None:
    """Serve one shard until every worker has left or the parent has ended; its address is printed on standard output.

    Args:
        host: name or address of this host under which workers reach it; only there the shard listens.
        port: to listen at; 0 for any free one.
        timeout: how long a worker may give no sign of life.
        parent: process that started this one and holds the other end of standard input; None for none.
        run_store: address of the store of a run that goes on without its parent, ``host:port``.

    Raises:
        OSError: if it can not listen there.
    """
    if parent is not None:
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, signal.SIG_IGN)  # they reach the workers too, who may still need their shard
    store, address = _listen(host, port, timeout)
    name, connect = f"shard {address}", partial(connect_store, address, timeout)
    server = ShardServer(store, connect, _device(host), timeout, name)
    print(address, flush=True)
    orphaned = threading.Event()
    if parent is not None:
        threading.Thread(target=_await_end_of_pipe, args=(orphaned,), name="parent", daemon=True).start()
    seen = time.monotonic()  # when a run that goes on without the parent gave the last sign of it

    def goes_on() -> bool:
        nonlocal seen
        if run_store is None:
            return False
        if server.roster.serves() or (time.monotonic() - seen > _PROBE and _is_listening(run_store)):
            seen = time.monotonic()
        return time.monotonic() - seen < 2 * _PROBE

    while not server.finished.wait(_LOOK):
        has_parent = not orphaned.is_set() and (parent is None or os.getppid() == parent)
        if not has_parent and not goes_on():
            log.warning("shard %s ends: the process that started it has ended, or does not need it any more", address)
            return


class ShardProcess:
    """One shard, served by a process of its own on this host; started at once, waited for when :attr:`address` is read.

    Args:
        host: name or address of this host under which workers reach it.
        port: to listen at; 0 for any free one.
        timeout: how long a worker may give no sign of life.
        run_store: address of the run's store, ``host:port``, where the shard is to outlive this process as long as the
            run goes on; else None.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        timeout: timedelta = timedelta(minutes=5),
        run_store: str | None = None,
    ) -> None:
        command = module_command("lightning_gossip.parameter_server", "--host", host, "--port", str(port))
        command += ["--timeout", str(timeout.total_seconds()), "--parent", str(os.getpid())]
        group = None
        if run_store is not None:
            command += ["--run-store", run_store]
            group = 0  # what ends this process's group is not meant for it
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, process_group=group)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read_line, name="shard-address", daemon=True)
        self._reader.start()

    @property
    def address(self) -> str:
        """``host:port``.

        Raises:
            RuntimeError: if the process ends before it listens, or does not listen within a minute.
        """
        deadline = time.monotonic() + _START
        while self._reader.is_alive():
            if time.monotonic() > deadline:
                raise RuntimeError(f"a parameter server shard did not listen within {_START:g} s")
            self._reader.join(0.25)  # in slices, so that signals are handled
        if not self._lines[0].strip():
            raise RuntimeError("a parameter server shard ended before it listened: its message is on standard error")
        return self._lines[0].strip()

    @property
    def pid(self) -> int:
        """The process' number."""
        return self._process.pid

    def close(self, grace: float = 10.0, leave: bool = False) -> None:
        """Give the workers ``grace`` seconds to say goodbye, and end the process.

        Args:
            grace: in seconds.
            leave: leave it to those that go on without this process instead.
        """
        if not leave:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        stdin: Any = self._process.stdin
        stdin.close()
        if not leave:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join()
        output: Any = self._process.stdout
        output.close()

    def __enter__(self) -> ShardProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(grace=0 if exception[0] is not None else 10.0)

    def _read_line(self) -> None:
        output: Any = self._process.stdout
        self._lines.append(output.readline())


def _listen(host: str, port: int, timeout: timedelta) -> tuple[TCPStore, str]:
    """Host a store at one address only, and return it with its address."""
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(where[:2], family=family, backlog=1024)
    port = listener.getsockname()[1]
    bracketed = f"[{host}]" if ":" in host else host
    store = TCPStore(host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"{bracketed}:{port}"


def _device(host: str) -> Any:
    """Return gloo's device on the interface that ``GLOO_SOCKET_IFNAME`` names, or else on ``host``'s."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return gloo_device()
    return ProcessGroupGloo.create_device(hostname=host)


def _is_listening(address: str) -> bool:
    """Whether somebody listens at ``address``, ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE):
            return True
    except OSError:
        return False


def shares(shards: Collection[int], members: Sequence[int], processes: int) -> dict[int, list[int]]:
    """Return which of ``shards`` each rank starts: the lowest member of each node, over the nodes in turn.

    Args:
        shards: numbers of those to be started.
        members: ranks that take part, ascending.
        processes: ranks of a node, those that do not take part among them.
    """
    starting = list({rank // processes: rank for rank in reversed(members)}.values())[::-1]
    return {rank: sorted(shards)[index :: len(starting)] for index, rank in enumerate(starting)}


def _await_end_of_pipe(orphaned: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    orphaned.set()


def own_address(peer: str) -> str:
    """Return this host's address on the interface that leads to ``peer``, a name or address."""
    family, kind, protocol, _, address = socket.getaddrinfo(peer, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])
