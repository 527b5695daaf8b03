"""The store in a process of its own: without Lightning, and it ends with the last that is connected."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from lightning_gossip.__main__ import main
from lightning_gossip.control import store as run_store
from lightning_gossip.control.store import VARIABLE, reach, value_of

pytestmark = pytest.mark.faults

CLIENT = (
    "import os, sys, time\nfrom lightning_gossip.control.store import reach\n"
    "store = reach(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))\n"
    "print(store.add('clients', 1), 'lightning' in sys.modules, flush=True)\ntime.sleep(60)\n"
)


@pytest.mark.long
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


class Cleared(HashStore):
    """A store in which a key goes between a look for it and a look at it, as a server then answers."""

    def check(self, keys: list[str]) -> bool:
        return True

    def get(self, key: str) -> bytes:
        return b""


def test_a_key_that_goes_between_two_looks_is_not_there() -> None:
    store = HashStore()
    assert value_of(store, "word") is None
    store.set("word", "1:2")
    assert value_of(store, "word") == b"1:2"
    assert value_of(Cleared(), "word") is None


def test_a_server_answers_so() -> None:
    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    server.set("word", "1:2")
    looked = threading.Event()

    def remove() -> None:
        looked.wait(10)
        server.delete_key("word")
        server.set("word", "")

    remover = threading.Thread(target=remove)
    remover.start()
    assert value_of(server, "word") == b"1:2"
    looked.set()
    remover.join()
    assert value_of(server, "word") is None


def test_a_system_without_a_connection_yet_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container, or a network namespace, in which a store is the first that is started."""
    (tmp_path / "tcp").write_text("  sl  local_address rem_address   st\n")
    monkeypatch.setattr(run_store, "Path", lambda _, name: tmp_path / name)
    assert run_store._count(29500, "01") == 0
    (tmp_path / "tcp").unlink()
    with pytest.raises(RuntimeError, match="/proc/net/tcp, which this system does not have"):
        run_store._count(29500, "01")
