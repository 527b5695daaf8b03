"""Real processes: every way to start them, and every way in which they end.

These tests start the program `programs/train.py`, for what they show lies between processes: launchers, signals, exit
codes, and that nothing is left. All others run ranks as threads (ranks.py) or as forks (forked.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gossip import checkpoint as files

PROGRAM = Path(__file__).parent / "programs" / "train.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def start(out: Path, *arguments: Any, python: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    environment = {**ENVIRONMENT, "TMPDIR": str(out / "tmp"), "TRAIN_MARK": str(out)}
    (out / "tmp").mkdir(parents=True, exist_ok=True)
    command = [*python, str(PROGRAM), str(out), *map(str, arguments)]
    # a session of its own, so that what is left of it can be found and ended
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def members(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session and "Z" not in (entry / "stat").read_text().split()[2]:
                    found.append(int(entry.name))
            except (ProcessLookupError, FileNotFoundError, PermissionError):
                continue
    return found


def finish(process: subprocess.Popen[str], out: Path, seconds: float = 90, linger: float = 5) -> str:
    """Wait for the program and whatever it started; return what it printed. Nothing may be left of it."""
    try:
        printed, _ = process.communicate(timeout=seconds)
        deadline = time.monotonic() + linger
        while (left := members(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"processes left: {left}\n{printed[-3000:]}"
        # torch leaves the folder of torchrun's agent, and the file in which a spawned process reports its traceback
        of_torch = ("torchelastic_", "pytorch-errorfile-")
        temporary = [path.name for path in (out / "tmp").iterdir() if not path.name.startswith(of_torch)]
        assert not temporary, "temporary files left"
        assert not list(out.rglob("*.tmp")), "a save was left half done"
        for path in out.rglob("*.ckpt"):
            entry = torch.load(path, weights_only=True)[files.KEY]
            for rank in range(entry["world_size"]):
                files.load_replica(files.AtomicCheckpointIO(), path, entry["save_id"], rank, True)
        return printed
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)


def results(out: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((out / f"result_{rank}.json").read_text()) for rank in range(ranks)]


def endings(out: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem[-1]): json.loads(path.read_text()) for path in out.glob("ending_*.json")}


@pytest.mark.parametrize("strategy", ["gossip", "elastic_gossip", "gossip_spawn", "elastic_gossip_spawn"])
def test_every_registered_name_fits_and_tests(tmp_path: Path, strategy: str) -> None:
    """Those that fork are in test_strategies.py."""
    spawned = strategy.endswith("_spawn")  # only the launching process lives on, and Lightning refuses a second fit
    process = start(tmp_path, "--strategy", strategy, "--devices", 4, "--fits", 1 if spawned else 2)
    printed = finish(process, tmp_path)
    assert process.returncode == 0, printed
    ranks = results(tmp_path, 1 if spawned else 4)
    for rank in ranks:
        assert rank["accuracy"] > 0.9
        assert rank["state"] == ranks[0]["state"], "all hold the consensus model"
    if not spawned:
        assert [rank["step"] for rank in ranks] == [24] * 4, "the clock goes on in the second fit"


def test_torchrun_with_two_nodes_of_two_processes(tmp_path: Path) -> None:
    port = free_port()

    def node(number: int) -> tuple[int, str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}"]
        torchrun += ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
        process = start(tmp_path, "--devices", 2, "--nodes", 2, python=tuple(torchrun))
        return process.pid, finish(process, tmp_path)

    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(node, range(2)))
    ranks = results(tmp_path, 4)
    assert all(rank["state"] == ranks[0]["state"] and rank["accuracy"] > 0.9 for rank in ranks), printed


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("rank", [0, 2])
def test_an_exception_on_one_rank_ends_all_with_its_cause(tmp_path: Path, rank: int) -> None:
    process = start(tmp_path, "--fault", f"raise:{rank}:10", "--devices", 3)
    printed = finish(process, tmp_path)
    assert process.returncode == 1
    found = endings(tmp_path)
    assert found.pop(rank)["type"] == "ValueError"
    assert len(found) == 2
    for ending in found.values():
        assert ending["text"] == f"rank {rank} stopped at step 10: ValueError: boom"
    assert "ValueError: boom" in printed


def test_an_exception_before_training_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, "--fault", "setup:1:0", "--devices", 2)
    finish(process, tmp_path)
    assert process.returncode == 1
    assert endings(tmp_path)[0]["text"] == "rank 1 stopped at step 0: ValueError: boom in setup"


def test_an_exception_under_spawn_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, "--strategy", "elastic_gossip_spawn", "--fault", "raise:1:10", "--devices", 2)
    printed = finish(process, tmp_path)
    assert process.returncode == 1
    assert "ValueError: boom" in printed


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_ends_all(tmp_path: Path, rank: int) -> None:
    process = start(tmp_path, "--fault", f"SIGTERM:{rank}:10", "--devices", 2)
    printed = finish(process, tmp_path)
    assert process.returncode == 143, printed
    assert {ending["type"] for ending in endings(tmp_path).values()} == {"SIGTERMException"}
    assert len(endings(tmp_path)) == 2
    assert re.search(f"rank {rank} stopped at step 1[01]: it received SIGTERM", printed)


def test_sigint_to_one_rank_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, "--fault", "SIGINT:1:10", "--devices", 2)
    finish(process, tmp_path)
    assert process.returncode == 1
    found = endings(tmp_path)
    assert {ending["type"] for ending in found.values()} == {"KeyboardInterrupt"}
    assert len(found) == 2


def test_ctrl_c_in_a_terminal_ends_all(tmp_path: Path) -> None:
    """A terminal sends SIGINT to every process of the foreground group at once."""
    process = start(tmp_path, "--fault", "slow:0:0", "--epochs", 100, "--devices", 2)
    wait_for(process, tmp_path / "pid_1")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    finish(process, tmp_path)
    assert process.returncode == 1
    assert {ending["type"] for ending in endings(tmp_path).values()} == {"KeyboardInterrupt"}


def test_sigint_to_the_launching_process_under_spawn_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, "--strategy", "gossip_spawn", "--fault", "slow:0:0", "--epochs", 100, "--devices", 2)
    wait_for(process, tmp_path / "pid_1")
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    finish(process, tmp_path)
    assert process.returncode == 1


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the program has ended"
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.05)


def test_a_killed_rank_is_named_by_those_that_wait_for_it(tmp_path: Path) -> None:
    process = start(tmp_path, "--fault", "SIGKILL:2:10")
    finish(process, tmp_path)
    assert process.returncode == 1
    found = endings(tmp_path)
    assert sorted(found) == [0, 1, 3]
    for rank, ending in found.items():
        assert "rank 2" in ending["text"]
        if ending["type"] == "PartnerLost":
            assert f"rank {rank} lost its partner rank 2 at step 1" in ending["text"]
    assert "PartnerLost" in {ending["type"] for ending in found.values()}


def test_a_killed_rank_that_nobody_exchanges_with_is_reported_by_the_launcher(tmp_path: Path) -> None:
    process = start(
        tmp_path, "--fault", "SIGKILL:1:5", "--timeout", 60, "--probability", 1e-9, "--devices", 2, "--epochs", 500
    )
    finish(process, tmp_path)
    assert process.returncode == 1
    assert "rank 1 is gone: its process" in endings(tmp_path)[0]["text"]
    assert "was killed by SIGKILL" in endings(tmp_path)[0]["text"]


def test_a_killed_launching_process_takes_the_others_with_it(tmp_path: Path) -> None:
    process = start(tmp_path, "--fault", "SIGKILL:0:10", "--devices", 2)
    finish(process, tmp_path, linger=20)
    assert process.returncode == -signal.SIGKILL
    found = endings(tmp_path)
    assert sorted(found) == [1]
    for ending in found.values():
        assert "the run's store is gone" in ending["text"] or "lost its partner rank 0" in ending["text"]


def test_a_stopped_rank_is_not_waited_for_longer_than_twice_the_timeout(tmp_path: Path) -> None:
    process = start(tmp_path, "--fault", "SIGSTOP:2:3", "--timeout", 6, "--devices", 3)
    wait_for(process, tmp_path / "pid_2")
    finish(process, tmp_path)
    assert process.returncode == 1
    found = endings(tmp_path)
    waited = [ending for ending in found.values() if ending["type"] == "PartnerLost"]
    silent = [e for e in waited if "lost its partner rank 2" in e["text"] and "silent for 6 s" in e["text"]]
    assert silent, found
    assert all("rank 2" in ending["text"] for ending in found.values())


@pytest.fixture(autouse=True)
def _no_shared_temporary_files(tmp_path: Path) -> Iterator[None]:
    before = set(Path(tempfile.gettempdir()).glob("*.temp.ckpt"))
    yield
    assert set(Path(tempfile.gettempdir()).glob("*.temp.ckpt")) == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl(tmp_path: Path) -> None:
    process = start(tmp_path, "--accelerator", "cuda", "--devices", 2)
    printed = finish(process, tmp_path)
    assert process.returncode == 0, printed
