"""The ranks of a benchmark: processes with torchrun's environment, watched until they end.

Three ways to start them: forked from this process (:func:`fork_ranks`), as commands each of which is a node
(:func:`run_as_nodes`), or as commands in network namespaces (:mod:`benchmarks.shared.namespaces`). Where all that is
compared is a strategy of the package, with itself, its own launcher does it (``start_method="fork"``).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import IO, Any

from benchmarks.shared.processes import exit_on
from lightning_gossip.control.store import VARIABLE, start_store

_GRACE = 15.0
"""Seconds that ranks get to end by themselves, once one of them has failed."""
_LOOK = 0.1
"""Seconds from one look at the ranks to the next."""


def environment(rank: int, ranks: int, on_a_node: int, address: str, port: int) -> dict[str, str]:
    """Return what torchrun sets for a rank.

    Args:
        rank: of all.
        ranks: number of them.
        on_a_node: number of ranks on each node.
        address: of rank 0.
        port: on which rank 0 listens.
    """
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % on_a_node),
        "LOCAL_WORLD_SIZE": str(on_a_node),
        "GROUP_RANK": str(rank // on_a_node),
    }


def fork_ranks(ranks: int, function: Callable[[], None], seconds: float, own_store: bool = False) -> None:
    """Call ``function`` in ``ranks`` forked processes of one node, and wait for them; none outlives this process.

    Args:
        ranks: number of processes.
        function: what each does; it sees its rank in the environment.
        seconds: after which they are ended.
        own_store: whether their store is a process of its own, as ``min_replicas`` needs it; it ends after them.

    Raises:
        RuntimeError: if one of them failed, or they took longer.
    """
    port = free_port()
    if own_store:
        start_store(port)
    context = multiprocessing.get_context("fork")
    environments = [environment(rank, ranks, ranks, "127.0.0.1", port) for rank in range(ranks)]
    held = {VARIABLE: "True"} if own_store else {}
    processes = [context.Process(target=_rank, args=(own | held, function)) for own in environments]
    before = signal.signal(signal.SIGTERM, exit_on)
    try:
        for process in processes:
            process.start()
        watch(lambda: [process.exitcode for process in processes], seconds)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            if process.pid is not None:
                process.join()
        signal.signal(signal.SIGTERM, before)


def run_as_nodes(command: Sequence[str], ranks: int, output: IO[bytes], seconds: float) -> int:
    """Run a command once a rank, each a node of its own to Lightning: so that several can share one device.

    Args:
        command: program and arguments.
        ranks: number of processes.
        output: of all streams.
        seconds: after which they are ended.

    Returns:
        The exit code: 0 where all ended with it.
    """
    port = free_port()
    processes = []
    try:
        for rank in range(ranks):
            own = environment(rank, ranks, 1, "127.0.0.1", port) | {"TORCHELASTIC_RUN_ID": "as-nodes"}
            streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            processes.append(subprocess.Popen(command, env=os.environ | own, **streams))
        watch(lambda: [process.poll() for process in processes], seconds)
    except RuntimeError as error:
        output.write(f"{error}\n".encode())
        return 1
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return 0


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def watch(exit_codes: Callable[[], Sequence[int | None]], seconds: float) -> None:
    """Wait until all ranks have ended; once one has failed, for those left no longer than some seconds more.

    Args:
        exit_codes: returns each rank's, None while it runs.
        seconds: that they may take.

    Raises:
        RuntimeError: naming the rank that failed first, or if they took longer; some may still run then.
    """
    deadline, failure = time.monotonic() + seconds, None
    while None in (codes := exit_codes()):
        if failure is None and (failure := _failure(codes)):
            deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK)
    if failure := failure or _failure(codes):
        raise RuntimeError(failure)
    if None in codes:
        raise RuntimeError(f"the ranks did not end within {seconds:.0f} s")


def _failure(codes: Sequence[int | None]) -> str | None:
    return next((f"rank {rank} ended with exit code {code}" for rank, code in enumerate(codes) if code), None)


def _rank(own: dict[str, str], function: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= own
    function()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
