"""Members in a plain loop as real processes: of a process group that loses one, and at a store, where one comes back.

They say of torch's default group, of SIGKILL and of an example what threads cannot.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Linear
from processes import run_processes
from test_plain import RANKS, copied, made, train
from waiting import until

from lightning_gossip import Gossip
from lightning_gossip.control.store import serve_store

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_members.py"
LONG = 120.0  # seconds


@pytest.mark.parametrize("scheme", [{"alpha": 0.3}, {"period": 2, "delay": 1, "outer_lr": 0.7, "outer_momentum": 0.9}])
def test_members_of_a_group_train_as_its_ranks_do(tmp_path: Path, scheme: dict[str, Any]) -> None:
    def body(rank: int) -> Any:
        results = []
        for min_replicas in (None, 2):
            model, optimizer = made()
            with Gossip(model, **scheme, min_replicas=min_replicas) as gossip:
                train(gossip, model, optimizer, rank, 2)
                with gossip.consensus() as distance:
                    results.append((copied(model), distance))
                train(gossip, model, optimizer, rank, 1)
            results.append((copied(model), gossip.steps))
            assert gossip.members == tuple(range(RANKS))
        return results

    for consensus, replica, consensus_of_members, replica_of_member in run_processes(tmp_path, RANKS, body):
        for (expected, number), (state, other) in ((consensus, consensus_of_members), (replica, replica_of_member)):
            assert number == pytest.approx(other, rel=1e-12)
            for name, value in expected.items():
                torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


@pytest.mark.faults
def test_a_group_loses_a_rank_and_the_others_go_on(tmp_path: Path) -> None:
    """torch's default group stays as it is, with all its ranks; rank 0 holds its store."""

    def body(rank: int) -> Any:
        model, optimizer = made()
        with Gossip(model, min_replicas=2) as gossip:
            train(gossip, model, optimizer, rank, 1)
            if rank == 2:
                torch.save(("returned", None), tmp_path / "process_2.pt")
                os.kill(os.getpid(), signal.SIGKILL)
            train(gossip, model, optimizer, rank, 2)
            replica = copied(model)
            gossip.adopt_consensus()
            assert dist.get_world_size() == RANKS
        return gossip.members, gossip.steps, replica, copied(model)

    ranks = [result for result in run_processes(tmp_path, RANKS, body) if result is not None]
    assert [result[:2] for result in ranks] == [((0, 1, 3), 9)] * 3
    for name in Linear().state_dict():
        mean = torch.stack([replica[name] for _, _, replica, _ in ranks]).mean(0)
        for *_, adopted in ranks:
            torch.testing.assert_close(adopted[name], mean, rtol=0, atol=1e-14)


@pytest.mark.faults
def test_a_rank_of_the_example_is_killed_and_comes_back(tmp_path: Path) -> None:
    """All wait at their second consensus until one of them is dead; the run goes on until three are there again."""
    (tmp_path / "tmp").mkdir()

    def of_rank(rank: int) -> Callable[[], None]:
        run = [f"--rank={rank}", f"--store=127.0.0.1:{port}", "--steps=120", "--until=3", "--min-replicas=2"]
        return lambda: run_gated(tmp_path, run)

    with Processes(tmp_path) as processes:
        store = processes.start("store", lambda: serve_store(0))
        port = int(processes.await_text("store"))
        ranks = [processes.start(f"rank_{rank}", of_rank(rank)) for rank in range(3)]
        for process in ranks:
            processes.await_file(tmp_path / f"waits_{process.pid}")
        ranks[2].kill()
        ranks[2].join(LONG)
        (tmp_path / "open").touch()
        back = processes.start("back", of_rank(2))
        for process in (*ranks, back, store):
            process.join(LONG)
        assert [process.exitcode for process in (*ranks, back, store)] == [0, 0, -signal.SIGKILL, 0, 0]
    printed = [(tmp_path / f"{name}.txt").read_text() for name in ("rank_0", "rank_1", "back")]
    assert "rank 2 joins at step " in printed[2]
    assert ", ranks 0, 1\n" in printed[0]
    assert ", ranks 0, 1, 2\n" in printed[0].rpartition(", ranks 0, 1\n")[2], "it has come back"
    [accuracy] = {float(text.splitlines()[-1].split()[-1]) for text in printed}
    assert accuracy > 0.9
    assert not list((tmp_path / "tmp").iterdir())
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def run_gated(folder: Path, arguments: list[str]) -> None:
    """Run the example, which waits at its second consensus until the file ``open`` is there."""
    consensus = Gossip.consensus

    @contextmanager
    def gated(gossip: Gossip) -> Iterator[float]:
        if gossip.steps == 80:
            (folder / f"waits_{os.getpid()}").touch()
            until((folder / "open").exists, LONG)
        with consensus(gossip) as distance:
            yield distance

    vars(sys)["argv"] = [str(EXAMPLE), *arguments]
    sys.path.insert(0, str(EXAMPLE.parent))
    gate: Any = Gossip
    gate.consensus = gated
    runpy.run_path(str(EXAMPLE), run_name="__main__")


class Processes(AbstractContextManager["Processes"]):
    """Forks of the test's process, each with its output in a file; none is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ending = ExitStack()
        self._context = multiprocessing.get_context("fork")

    def start(self, name: str, body: Callable[[], object]) -> BaseProcess:
        def become() -> None:
            torch.set_num_threads(1)
            os.environ["TMPDIR"] = str(self._folder / "tmp")
            tempfile.tempdir = None
            with open(self._folder / f"{name}.txt", "w", buffering=1) as file, redirect_stdout(file):
                body()

        gc.collect()  # or it would destroy what earlier tests left, with threads that it does not have
        process = self._context.Process(target=become)
        process.start()
        self._ending.callback(process.join, LONG)
        self._ending.callback(process.kill)
        return process

    def await_file(self, path: Path) -> None:
        until(path.exists, LONG)

    def await_text(self, name: str) -> str:
        path = self._folder / f"{name}.txt"
        until(lambda: path.exists() and path.read_text().endswith("\n"), LONG)
        return path.read_text()

    def __exit__(self, *error: object) -> None:
        self._ending.close()
