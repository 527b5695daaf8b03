"""How workers, shards and launchers end, each by itself: real processes where something is killed, loopback only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from running import is_running
from shards import Shards
from torch import nn
from torch.distributed import HashStore
from waiting import until

import lightning_gossip
from lightning_gossip.control.run import Control
from lightning_gossip.control.stop import RunStopped
from lightning_gossip.parameter_server import __main__ as command
from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.process import ShardProcess
from lightning_gossip.parameter_server.protocol import ARRIVALS, SHARD, Message, Setup, arrival_key, encode
from lightning_gossip.parameter_server.shard_links import ShardLost
from lightning_gossip.transport.header import Header
from lightning_gossip.transport.link import Link, gloo_device

pytestmark = pytest.mark.faults
SHORT = timedelta(seconds=1)
LIMIT = timedelta(seconds=20)
# forks of a process that has imported everything (conftest.py) and has no threads, as this one has
processes = multiprocessing.get_context("forkserver")


# -- in one process -------------------------------------------------------------------------------------------------


def test_a_shard_that_stays_silent_is_lost() -> None:
    with Shards(2) as server:

        def body(rank: Rank) -> None:
            rank.control.timeout = SHORT
            parameters = {"a": nn.Parameter(torch.zeros(4))}
            client = server.client(rank, n_push=1, n_pull=1)
            client.start(parameters)
            with server.shard(1).lock:
                client.end_step(parameters)
                began = time.monotonic()
                with pytest.raises(ShardLost, match=r"worker 0 lost parameter server shard 1 \(shard:2\) at step 1: "):
                    client.drain()
                assert 0.9 < time.monotonic() - began < 5
                until(lambda: all(future.done() for future in client._links._last))  # type: ignore[union-attr]
                with pytest.raises(ShardLost, match=r"shard 1 \(shard:2\) at step 2"):
                    client.end_step(parameters)
            client.close()

        run_ranks(1, body)


def test_signs_of_life_do_not_hide_why_a_shard_was_lost() -> None:
    """The first one after the shard's death learns why; those after it only that the link is closed."""
    with Shards(2) as server:

        def body(rank: Rank) -> None:
            rank.control.timeout = SHORT  # a sign of life every 0.2 seconds
            parameters = {"a": nn.Parameter(torch.zeros(4))}
            client = server.client(rank, n_push=1, n_pull=1)
            client.start(parameters)
            server.servers[1].close()
            links: Any = client._links
            until(lambda: any(future.done() and future.exception() for future in links._last))
            first = links._last
            until(lambda: links._last is not first)
            for lost in (client.end_step, client.pull_now):
                with pytest.raises(ShardLost, match=r"shard 1 \(shard:2\) at step \d: (?!\[/|the link)") as raised:
                    lost(parameters)
                assert "typically" not in str(raised.value)
            client.close()

        run_ranks(1, body)


def test_a_worker_that_pauses_is_kept_and_one_that_is_silent_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    with Shards(1, timeout=SHORT) as server:
        store = server.connect(server.addresses[0], LIMIT)

        def silent(setup: Setup) -> Link:
            store.set(arrival_key(store.add(ARRIVALS, 1)), "silent")
            link = Link(store, gloo_device(), "silent", SHARD, LIMIT)
            words = encode({"worker": 1, "setup": setup.to_json()})
            link.submit(lambda: link.send(Header(Message.HELLO, 0, words.numel()), words)).result()
            assert link.submit(lambda: link.receive_header()).result().kind == Message.HELLO
            return link

        def body(rank: Rank) -> None:
            if rank.rank == 1:
                return
            parameters = {"a": nn.Parameter(torch.zeros(4))}
            client = server.client(rank, n_push=1, n_pull=1)
            client.start(parameters)
            link = silent(server.shard().setup)
            time.sleep(2.5)
            client.end_step(parameters)
            client.drain()
            assert client.stats.pushes == 1
            link.close()
            client.close()

        run_ranks(2, body)
        until(server.servers[0].finished.is_set)
    assert "lost worker 1 and serves the others on" in caplog.text
    assert "lost worker 0" not in caplog.text


def test_a_server_does_not_wait_for_ever_for_those_who_never_came(caplog: pytest.LogCaptureFixture) -> None:
    with Shards(1, timeout=SHORT) as server:

        def body(rank: Rank) -> None:
            if rank.rank == 0:
                client = server.client(rank)
                client.start({"a": nn.Parameter(torch.zeros(4))})
                client.close()

        run_ranks(2, body)
        assert not server.servers[0].finished.is_set()
        until(server.servers[0].finished.is_set, 5)
    assert "waited in vain for the workers that never came" in caplog.text


def test_the_stop_word_reaches_a_worker_that_waits_to_begin() -> None:
    with Shards(1) as server:

        def body(rank: Rank) -> None:
            if rank.rank == 0:
                time.sleep(0.3)
                raise ZeroDivisionError("in the user's code")
            client = server.client(rank)
            try:
                client.start({"a": nn.Parameter(torch.zeros(4))})
            finally:
                client.close()

        began = time.monotonic()
        _, waiting = run_ranks(2, body, expect_errors=True)
        assert time.monotonic() - began < 8
    assert isinstance(waiting, RunStopped)
    assert "rank 0 stopped at step 0: ZeroDivisionError: in the user's code" in str(waiting)


@pytest.mark.parametrize("came", [True, False])
def test_worker_0_is_not_waited_for_once_it_is_gone(came: bool) -> None:
    """With controls that know nothing of each other: there is no stop word."""
    with Shards(1) as server:
        parameters = {"a": nn.Parameter(torch.zeros(4))}
        controls = [Control(HashStore, rank, 2, SHORT) for rank in range(2)]
        clients = [DownpourClient(server.addresses, c, connect=server.connect, warmup_steps=5) for c in controls]
        if came:
            clients[0].start(parameters)
            assert clients[0]._links is not None
            for link in clients[0]._links._links:
                link.submit(lambda: 1 / 0)  # a failure closes a link without a goodbye
        with pytest.raises(
            ShardLost, match="worker 0, which .* is gone" if came else "worker 0 did not come .* in 1 s"
        ):
            clients[1].start(parameters)
        for client, control in zip(clients, controls, strict=True):
            client.close()
            control.close(grace=0)


def test_the_command_line_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--port", "70000"], ["--timeout", "0"], ["--host", "192.0.2.1"]):
        monkeypatch.setattr(sys, "argv", ["shard", *arguments])
        assert command.main() == 1
        assert "no shard at" in capfd.readouterr().err


@pytest.mark.processes
def test_the_server_needs_torch_only() -> None:
    """It must start fast. The package itself is replaced: it registers strategies with Lightning."""
    folder = Path(lightning_gossip.__file__).parent
    program = (
        "import sys, types\n"
        "package = types.ModuleType('lightning_gossip')\n"
        f"package.__path__ = [{str(folder)!r}]\n"
        "sys.modules['lightning_gossip'] = package\n"
        "import lightning_gossip.parameter_server.__main__\n"
        "print([name for name in ('lightning', 'torchmetrics', 'tensorboard') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# -- real processes -------------------------------------------------------------------------------------------------


def train(rank: int, workers: int, addresses: list[str], pipe: Connection) -> None:
    """Train until told to stop; tell how many pushes there were, or what went wrong."""
    control = Control(HashStore, rank, workers, timedelta(seconds=10))  # no stop word: each notices by itself
    parameters = {"a": nn.Parameter(torch.zeros(1000))}
    client = DownpourClient(addresses, control, n_push=1, n_pull=2)
    try:
        client.start(parameters)
        while not pipe.poll(0.01):
            with torch.no_grad():
                parameters["a"].add_(1)
            client.end_step(parameters)
            pipe.send(client.stats.pushes)
        client.finish(parameters)
        client.close()
        pipe.send("ended well")
    except RuntimeError as error:
        pipe.send(f"{type(error).__name__}: {error}")
        client.close()


class Workers:
    """Processes that train on shards."""

    def __init__(self, count: int, addresses: list[str]) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = processes.Pipe()
            self.processes.append(processes.Process(target=train, args=(rank, count, addresses, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def latest(self, rank: int, wanted: Any, seconds: float = 30) -> Any:
        """Read what worker ``rank`` says until it fits."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.pipes[rank].poll(0.1) and wanted(message := self.pipes[rank].recv()):
                return message
        raise AssertionError(f"worker {rank} did not say it within {seconds} s")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.mark.long
@pytest.mark.processes
def test_killed_workers_and_shards(capfd: pytest.CaptureFixture[str]) -> None:
    """A worker is killed: its link is dropped, the others are served on. A shard is killed: every worker says which."""
    two_shards = [ShardProcess(timeout=timedelta(seconds=10)) for _ in range(2)]
    workers = Workers(4, [shard.address for shard in two_shards])
    try:
        pushes = [workers.latest(rank, lambda message: message != 0) for rank in range(4)]
        assert all(isinstance(count, int) for count in pushes), pushes
        workers.processes[1].kill()
        time.sleep(0.5)
        for rank in (0, 2, 3):
            later = workers.latest(rank, lambda message, before=pushes[rank]: message > before + 20)
            assert isinstance(later, int)
        workers.pipes[3].send("stop")
        assert workers.latest(3, lambda message: isinstance(message, str)) == "ended well"
        two_shards[1]._process.kill()
        began = time.monotonic()
        for rank in (0, 2):
            said = workers.latest(rank, lambda message: isinstance(message, str), 15)
            assert said.startswith(f"ShardLost: worker {rank} lost parameter server shard 1 ({two_shards[1].address})")
        assert time.monotonic() - began < 10
        until(lambda: not is_running(two_shards[0].pid), 10)  # nobody is left
    finally:
        workers.close()
        for shard in two_shards:
            shard.close(grace=0)
    log = capfd.readouterr().err
    assert f"shard {two_shards[0].address} lost worker 1 and serves the others on" in log
    assert "lost worker 3" not in log


def launch(pipe: Connection, holds_pipe: bool) -> None:
    """Start a shard, and a process that inherits its pipe, as a forked DataLoader worker does; then wait."""
    shard = ShardProcess()
    sleeper = os.fork() if holds_pipe else 0
    if holds_pipe and sleeper == 0:
        time.sleep(60)
        os._exit(0)
    assert shard.address  # it listens
    pipe.send((shard.pid, sleeper))
    time.sleep(60)


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("holds_pipe", [False, True])
def test_no_shard_survives_its_launcher(holds_pipe: bool) -> None:
    ours, theirs = processes.Pipe()
    launcher = processes.Process(target=launch, args=(theirs, holds_pipe), daemon=True)
    launcher.start()
    assert ours.poll(60)
    shard, sleeper = ours.recv()
    try:
        assert is_running(shard)
        os.kill(shard, signal.SIGTERM)  # meant for the workers, who may need their shard to the end
        os.kill(shard, signal.SIGINT)
        time.sleep(0.2)
        assert is_running(shard)
        launcher.kill()
        launcher.join()
        until(lambda: not is_running(shard), 5)
    finally:
        for pid in (shard, sleeper):
            if pid and is_running(pid):
                os.kill(pid, signal.SIGKILL)
