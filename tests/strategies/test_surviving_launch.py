"""Programs that go on without processes that are killed, the launching one among them (design §10)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import LEAN
from launched import PROGRAMS, Ended, Process, Program, wait_for
from ports import free_port
from running import members

from lightning_gossip.control.store import VARIABLE
from lightning_gossip.strategies import checkpoint as files

pytestmark = pytest.mark.faults

SURVIVING = ("--timeout", 60, "--min-replicas", 1, "--epochs", 3)


def run(folder: Path, *arguments: Any, **options: Any) -> Ended:
    return Program((*SURVIVING, *arguments), **{"linger": 60, **options}).run(folder)


def check(ended: Ended, left: tuple[int, ...]) -> None:
    """All that are left came to the end, and hold one consensus model."""
    results = {int(path.name.split(".")[0][-1]) for path in ended.out.glob("result_*")}
    assert results == set(left), ended.printed
    ranks = ended.results()
    assert all(rank["state"] == ranks[0]["state"] for rank in ranks)
    assert ranks[0]["accuracy"] > 0.8
    [checkpoint] = ended.out.rglob("*.ckpt")
    entry = torch.load(checkpoint, weights_only=True)[files.KEY]
    assert entry["ranks"] == list(left)


@pytest.mark.long
def test_a_child_is_killed(tmp_path: Path) -> None:
    ended = run(tmp_path, "--fault", "SIGKILL:2:10")
    assert ended.code == 0, ended.printed
    check(ended, (0, 1, 3))
    assert "; 3 of 4 go on" in ended.printed
    assert ended.printed.count("rank 2 lost at step 1") == 1, "said once"


@pytest.mark.long
def test_the_launching_process_is_killed(tmp_path: Path) -> None:
    """Its children go on; the store ends with the last of them."""
    ended = run(tmp_path, "--fault", "SIGKILL:0:10")
    assert ended.code == -signal.SIGKILL
    check(ended, (1, 2, 3))
    assert "rank 0 lost at step 1" in ended.printed
    assert "rank 1 takes over the duties of rank 0" in ended.printed


@pytest.mark.long
def test_the_launching_process_leaves_on_an_exception(tmp_path: Path) -> None:
    """It waits for its children, and ends with its own exit code."""
    ended = run(tmp_path, "--fault", "raise:0:10")
    assert ended.code == 1
    check(ended, (1, 2, 3))
    assert "rank 0 left at step 1" in ended.printed


@pytest.mark.long
def test_too_few_end_the_run_and_name_the_last_checkpoint(tmp_path: Path) -> None:
    ended = run(tmp_path, "--min-replicas", 4, "--fault", "SIGKILL:2:10")
    assert ended.code == 1
    text = "3 of 4 replicas are left, fewer than `min_replicas=4`: rank 2 lost at step 1"
    assert all(text in ending["text"] for ending in ended.endings().values())
    assert len(ended.endings()) == 3
    assert "the last checkpoint is " in ended.printed
    assert "epoch=0-step=8.ckpt" in ended.printed.partition("the last checkpoint is ")[2].splitlines()[0]


@pytest.mark.long
@pytest.mark.parametrize("start_method", ["spawn"])
def test_the_process_that_spawns_is_killed(tmp_path: Path, start_method: str) -> None:
    def kill(process: Process, out: Path) -> None:
        for rank in range(4):
            wait_for(process, out / f"training_{rank}")
        os.kill(process.pid, signal.SIGKILL)
        (out / "enough").touch()

    ended = run(tmp_path, "--start-method", start_method, "--fault", "paced:0:0", after=kill)
    assert ended.code == -signal.SIGKILL
    [checkpoint] = tmp_path.rglob("*.ckpt")
    assert checkpoint.name == "epoch=2-step=24.ckpt", "the ranks came to the end"
    assert torch.load(checkpoint, weights_only=True)[files.KEY]["ranks"] == [0, 1, 2, 3]


@pytest.mark.long
def test_the_store_is_killed(tmp_path: Path) -> None:
    def kill(process: Process, out: Path) -> None:
        for rank in range(4):
            wait_for(process, out / f"training_{rank}")
        [store] = [member for member in members(process.pid) if "store" in member.cmdline()]
        store.kill()

    ended = run(tmp_path, "--fault", "paced:0:0", after=kill)
    assert ended.code == 1, ended.printed
    assert len(ended.endings()) == 4
    texts = [ending["text"] for ending in ended.endings().values()]
    assert all("the run's store is gone" in text for text in texts), texts


@pytest.mark.long
def test_sigterm_on_the_launching_process_ends_the_run(tmp_path: Path) -> None:
    ended = run(tmp_path, "--fault", "SIGTERM:0:10")
    assert ended.code == 128 + signal.SIGTERM
    assert {ending["type"] for ending in ended.endings().values()} == {"SIGTERMException"}
    assert len(ended.endings()) == 4


@pytest.mark.long
def test_ranks_started_one_by_one_by_a_shell_and_one_never_comes(tmp_path: Path) -> None:
    """As docs/howto/many_machines.md says: a store, and torch's variables. The run begins with those that have come."""
    port = free_port()
    store = [sys.executable, "-m", "lightning_gossip", "store", "--port", str(port)]
    environment = {**LEAN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), VARIABLE: "True"}
    arguments = ["--timeout", 20, "--min-replicas", 2, *SURVIVING[4:], "--start-seconds", 20]
    command = [sys.executable, str(PROGRAMS / "train.py"), str(tmp_path), *map(str, arguments)]
    with subprocess.Popen(store, stdout=subprocess.DEVNULL) as server:
        ranks = [
            subprocess.Popen(
                [*command, "--fault", "SIGKILL:1:10"],
                env=environment | {"LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in (0, 1, 3)
        ]
        printed = [rank.communicate(timeout=150)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, -signal.SIGKILL, 0], printed
        assert server.wait(10) == 0, "it ends with the last rank"
    check(Ended(tmp_path, 0, "".join(printed)), (0, 3))
    assert "rank 2 lost at step 0 (no process came within 20 s); 3 of 4 go on" in printed[0], printed[0]


@pytest.mark.long
def test_one_that_a_shell_starts_again_joins_and_a_second_one_is_refused(tmp_path: Path) -> None:
    """Rank 0 is killed, and started by hand; what is started beside a living one ends, and is told who is there."""
    port = free_port()
    store = [sys.executable, "-m", "lightning_gossip", "store", "--port", str(port)]
    environment = {**LEAN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), VARIABLE: "True"}
    arguments = ["--timeout", 60, "--min-replicas", 1, "--epochs", 40, "--fault", "paced:0:0", "--devices", 3]
    command = [sys.executable, str(PROGRAMS / "train.py"), str(tmp_path), *map(str, arguments)]

    def start(rank: int) -> subprocess.Popen[str]:
        output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment | {"LOCAL_RANK": str(rank)}, **output)

    with subprocess.Popen(store, stdout=subprocess.DEVNULL) as server:
        ranks = [start(rank) for rank in range(3)]
        first, *_ = [wait_for(ranks[rank], tmp_path / f"training_{rank}") for rank in range(3)]
        ranks[0].kill()
        ranks.append(start(0))
        second = start(1)
        refused = second.communicate(timeout=60)[0]
        wait_for(ranks[1], tmp_path / "training_0", other_than=first)
        (tmp_path / "enough").touch()
        printed = [process.communicate(timeout=150)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [-signal.SIGKILL, 0, 0, 0], printed
        assert second.returncode == 1
        assert "rank 1 is there already, as process" in refused
        assert server.wait(10) == 0
    assert "rank 0 joined at step" in printed[1], printed[1]
    check(Ended(tmp_path, 0, "".join(printed)), (1, 2, 0))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("start_method", ["popen", "spawn"])
def test_the_launcher_starts_a_killed_rank_again(tmp_path: Path, start_method: str) -> None:
    def kill(process: Process, out: Path) -> None:
        *_, killed, _ = [wait_for(process, out / f"training_{rank}") for rank in range(4)]
        os.kill(int(killed), signal.SIGKILL)
        wait_for(process, out / "training_2", other_than=killed)
        (out / "enough").touch()

    arguments = ["--start-method", start_method, "--fault", "paced:0:0", "--restarts", 1, "--epochs", 40]
    ended = run(tmp_path, *arguments, after=kill)
    assert ended.code == 0, ended.printed
    told = ended.printed
    assert told.count("rank 2: its process is started again") == 1, told
    assert "rank 2 lost at step" in told
    assert "rank 2 joined at step" in told
    [checkpoint] = tmp_path.rglob("*.ckpt")
    assert sorted(torch.load(checkpoint, weights_only=True)[files.KEY]["ranks"]) == [0, 1, 2, 3]
    if start_method == "popen":
        assert len(ended.results()) == 4


SEVERAL_TRAINERS = """
import sys
from datetime import timedelta
import lightning.pytorch as pl
from torch.utils.data import DataLoader
sys.path.append(sys.argv[1])
from forked import Linear, regression
from lightning_gossip import DownpourStrategy, ElasticGossipStrategy, GossipStrategy

timeout = timedelta(seconds=60)
for number, strategy in enumerate((
    ElasticGossipStrategy(timeout=timeout, min_replicas=1), GossipStrategy(timeout=timeout), "ddp",
    DownpourStrategy(timeout=timeout), ElasticGossipStrategy(timeout=timeout, min_replicas=2),
)):
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Linear(), DataLoader(regression(), 4), DataLoader(regression(), 4))
    sys.stdout.write(f"trained {number} on {trainer.global_rank}\\n")  # in one piece: the other rank writes there too
"""


@pytest.mark.long
def test_trainers_with_and_without_members_follow_each_other(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SEVERAL_TRAINERS)
    command = [sys.executable, str(program), str(Path(__file__).parents[1])]
    done = subprocess.run(command, env=LEAN, capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {f"trained {number} on {rank}" for number in range(5) for rank in range(2)} <= set(done.stdout.splitlines())
