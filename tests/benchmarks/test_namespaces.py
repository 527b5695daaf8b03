"""benchmarks/shared/namespaces.py: links have their rate, and nothing is left behind on any ending."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from benchmarks import ROOT
from benchmarks.shared.namespaces import Network, NetworkUnavailable, burst_bytes, check_requirements, remove_leftovers

HOLD = """
import os, sys, time
from benchmarks.shared.namespaces import Network
with Network(2) as network:
    network.start(1, ["sleep", "600"], os.environ)
    print("up", flush=True)
    time.sleep(600)
"""
SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000)) as connection:
    for _ in range(3):
        start = time.perf_counter()
        connection.sendall(bytes(int(sys.argv[2])))
        connection.recv(1)
        print(time.perf_counter() - start)
"""
RECEIVE = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    for _ in range(3):
        left = int(sys.argv[2])
        while left:
            left -= len(connection.recv(min(left, 2**20)))
        connection.sendall(bytes(1))
"""


@pytest.fixture
def network() -> Iterator[Any]:
    """Two ranks; skipped without root or where namespaces are not allowed."""
    try:
        check_requirements()
    except NetworkUnavailable as error:
        pytest.skip(str(error))
    with Network(2) as network:
        yield network


def own_namespaces(owner: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if f"-{owner}-" in line]


def test_a_transfer_takes_what_the_rate_says(network: Any) -> None:
    megabits, payload = 100, 2_000_000
    network.set_rate(megabits)
    command = [sys.executable, "-c"]
    arguments = [network.address(0), str(payload)]
    receiver = network.start(0, [*command, RECEIVE, *arguments], os.environ, stdout=subprocess.PIPE)
    assert receiver.stdout.readline() == b"listening\n"
    sender = network.start(1, [*command, SEND, *arguments], os.environ, stdout=subprocess.PIPE)
    out, _ = sender.communicate(timeout=30)
    seconds = sorted(map(float, out.split()))[1]
    assert seconds > (payload - burst_bytes(megabits)) * 8 / (megabits * 1e6), "never faster than the bucket"
    assert seconds < 1.5 * payload * 8 / (megabits * 1e6), "not much slower on a machine that others use"


def test_ranks_reach_one_another_and_nobody_else(network: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host:
        port = host.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        process = network.start(0, [sys.executable, "-c", connect], os.environ, stderr=subprocess.PIPE)
        _, error = process.communicate(timeout=20)
    assert b"refused" in error, "the loopback of a rank is its own"


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left(network: Any, number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"up\n"
            names = own_namespaces(owner.pid)
            assert len(names) == 3, "two ranks and the switch"
            until(lambda: any(pids_in(name) for name in names))  # a process runs in there
            inside = [pid for name in names for pid in pids_in(name)]
            owner.send_signal(number)
            owner.wait(timeout=30)
        finally:
            owner.kill()
    if number == signal.SIGKILL:
        assert own_namespaces(owner.pid) == names
        remove_leftovers()
    assert own_namespaces(owner.pid) == []
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inside))
    assert len(own_namespaces(os.getpid())) == 3, "those of a living owner stay"


def pids_in(namespace: str) -> list[str]:
    return subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout.split()


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkUnavailable, match="root"):
        Network(2).__enter__()


@pytest.mark.parametrize("ranks", [0, 1, 251])
def test_ranks_out_of_range(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"from 2 to 250, got {ranks}"):
        Network(ranks)
