"""The store in a process of its own: without Lightning, and it ends with the last that is connected."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from lightning_gossip.__main__ import main
from lightning_gossip.control.store import VARIABLE, reach

pytestmark = pytest.mark.faults

CLIENT = (
    "import os, sys, time\nfrom lightning_gossip.control.store import reach\n"
    "store = reach(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))\n"
    "print(store.add('clients', 1), 'lightning' in sys.modules, flush=True)\ntime.sleep(60)\n"
)


def test_it_ends_with_the_last_process_that_is_connected() -> None:
    command = [sys.executable, "-m", "lightning_gossip", "store", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, VARIABLE: "True"}
        clients = [
            subprocess.Popen([sys.executable, "-c", CLIENT], env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [client.stdout.readline().split() for client in clients if client.stdout is not None]
        assert sorted(said) == [["1", "False"], ["2", "False"]], "one store for both, and no Lightning"
        clients[0].send_signal(signal.SIGKILL)
        time.sleep(4)
        assert server.poll() is None, "one is left"
        clients[1].send_signal(signal.SIGKILL)
        start = time.monotonic()
        assert server.wait(10) == 0
        assert time.monotonic() - start < 10
        for client in clients:
            client.wait()


def test_it_does_not_wait_for_ever_for_the_first() -> None:
    command = [sys.executable, "-m", "lightning_gossip", "store", "--port", "0", "--wait", "0.5"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_bad_ports_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "--port", "70000"]) == 1
    assert "`port` must be an integer from 0 to 65535, got 70000" in capsys.readouterr().err


def test_a_rank_without_the_variable_is_told_what_to_start() -> None:
    what = r"(?s)lightning-gossip store --port PORT.*TORCHELASTIC_USE_AGENT_STORE=True"
    with pytest.raises(RuntimeError, match=what):
        reach("127.0.0.1", 1, timedelta(seconds=1))
