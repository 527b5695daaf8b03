"""Real `Trainer.fit` runs on a parameter server whose workers come back (design §10)."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_surviving_downpour as surviving_downpour
import torch
from forked import fit, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from running import is_running
from test_joining import OnceOnly, Pace
from test_surviving import run, stop_for
from test_surviving_downpour import (
    Resumed,
    Shards,
    downpour,
    flat,
    replica,
    running_shards,
)
from torch.utils.data import DataLoader
from waiting import until

from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.process import ShardProcess
from lightning_gossip.parameter_server.shard_links import ShardLost
from lightning_gossip.strategies import checkpoint as files

pytestmark = pytest.mark.faults


class Constant(surviving_downpour.Constant):
    """What each process makes is written down as it makes it."""

    @property
    def maker(self) -> str:
        strategy: Any = self.trainer.strategy
        return f"{self.global_rank}.{getattr(strategy.control, 'incarnation', 0)}"


def constant(folder: Path) -> Constant:
    torch.manual_seed(3)
    return Constant(folder)


def check_server(folder: Path, held: np.ndarray, dead: set[str]) -> None:
    """It holds all that was made, and of what the dead processes made, what came whole to each of two shards."""
    rest = held - flat(constant(folder).state_dict())
    files = {file.name[5:]: np.fromfile(file).reshape(-1, 4) for file in folder.glob("made_*")}
    assert dead < set(files)
    rest -= sum(made.sum(0) for name, made in files.items() if name not in dead)
    for part in (slice(0, 2), slice(2, 4)):
        arrived = [np.zeros(2)]
        for name in dead:
            sums = np.cumsum(np.vstack([np.zeros(4), files[name]]), axis=0)[:, part]
            arrived = [one + other for one in arrived for other in sums]
        assert min(np.abs(rest[part] - one).max() for one in arrived) < 1e-10


class Began(Callback):
    """Writes down what the process that joined began with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        strategy = trainer.strategy
        file = self.folder / f"joined_{trainer.global_rank}.pt"
        if strategy.control.incarnation and not file.exists():
            made = {"step": trainer.global_step, "clock": strategy.step, "pulls": strategy.downpour_stats.pulls}
            torch.save(made, file)


def train(folder: Path, *callbacks: Callback, **options: Any) -> list[Any]:
    options = {
        "lost": (),
        "strategy": downpour(restarts=1),
        "module": constant(folder),
        "train": DataLoader(regression(480), 4),
        "max_epochs": 4,
        **options,
    }
    try:
        return run(folder, Pace(), *callbacks, Shards(folder), **options)
    finally:
        until(lambda: not running_shards(folder), 10)


@pytest.mark.long
@pytest.mark.parametrize("rank", [2, 0])
def test_a_rank_that_is_killed_comes_back_and_all_resume(
    tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    saving = ModelCheckpoint(whole, filename="{epoch}", save_top_k=-1)
    fault = OnceOnly(rank, hook="on_train_batch_end", batch=2)
    with caplog.at_level(logging.WARNING):
        seen = train(whole, fault, saving, Began(whole), enable_checkpointing=True)
    order = (*(k for k in range(4) if k != rank), rank)
    for other in seen:
        assert other["members"][-1] == order
        assert other["losses"][-1] == seen[0]["losses"][-1]
        torch.testing.assert_close(other["state"], seen[0]["state"], rtol=0, atol=0)
    changes = "".join(seen[order[0]]["changes"])
    assert f"rank {rank} joined at step" in changes
    check_server(whole, flat(seen[0]["state"]), {f"{rank}.0"})
    began = torch.load(whole / f"joined_{rank}.pt", weights_only=True)
    assert began["pulls"] >= 1
    assert began["clock"] > 30, "it goes on from its donor's clock"

    path = whole / "epoch=3.ckpt"
    entry = torch.load(path, weights_only=True)[files.KEY]
    assert entry["ranks"] == list(order)
    saved = [replica(path, k)[files.KEY]["state"] for k in order]
    assert ["server" in state for state in saved] == [True, False, False, False]
    server = saved[0]["server"]
    assert sorted(server["pushes"]) == ["0", "1", "2", "3"]
    assert min(server["pushes"].values()) > 0
    fit(
        resumed,
        constant(resumed),
        downpour(None),
        devices=4,
        train=DataLoader(regression(480), 4),
        max_epochs=5,
        ckpt_path=str(path),
        callbacks=[ResumedAt(4)],
    )
    for index, k in enumerate(order):
        again = torch.load(resumed / f"began_{index}.pt", weights_only=True)
        assert again["worker"]["step"] == saved[index]["worker"]["step"]
        torch.testing.assert_close(again["worker"]["reference"], saved[index]["worker"]["reference"], rtol=0, atol=0)
        for name, value in replica(path, k)["state_dict"].items():
            torch.testing.assert_close(again["replica"][name], value, rtol=0, atol=0)
    again = torch.load(resumed / "began_0.pt", weights_only=True)["server"]
    torch.testing.assert_close(again["parameters"], server["parameters"], rtol=0, atol=0)
    assert again["version"] == server["version"]
    assert again["pushes"] == {str(index): server["pushes"][str(k)] for index, k in enumerate(order)}


class ResumedAt(Resumed):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.strategy.barrier()
            state = {**trainer.strategy.training_state(), "replica": pl_module.state_dict()}
            torch.save(state, Path(trainer.default_root_dir) / f"began_{trainer.global_rank}.pt")
            trainer.strategy.barrier()


@pytest.mark.long
@pytest.mark.parametrize("rank", [2, 0])
def test_who_was_declared_lost_joins_anew(tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture) -> None:
    """The process is the same, and the shards that it started serve it under its next number."""
    fault = OnceOnly(rank, hook="on_train_batch_end", batch=2, act=stop_for(6))
    with caplog.at_level(logging.WARNING):
        seen = train(
            tmp_path,
            fault,
            strategy=downpour(lost_after=3),
            train=DataLoader(regression(1440), 4),
            max_epochs=3,
        )
    first = 1 if rank == 0 else 0
    kinds = [change.split(" at ")[0] for change in seen[first]["changes"]]
    assert kinds == [f"rank {rank} lost", f"rank {rank} joining", f"rank {rank} joined"]
    for other in seen:
        assert set(other["members"][-1]) == {0, 1, 2, 3}
        torch.testing.assert_close(other["state"], seen[0]["state"], rtol=0, atol=0)
    check_server(tmp_path, flat(seen[0]["state"]), {f"{rank}.0"})


@pytest.mark.long
def test_a_rank_comes_back_in_a_process_of_its_own_to_shards_started_by_hand(tmp_path: Path) -> None:
    """With all that workers may be asked to do: to keep up, to adapt, and to keep their replicas."""
    with ShardProcess() as first, ShardProcess() as second:
        strategy = downpour(
            restarts=1,
            shard_addresses=[first.address, second.address],
            max_staleness=2,
            warmup_steps=4,
            server_optimizer=partial(torch.optim.SGD, lr=1.0),
            evaluate="replica",
        )
        fault = OnceOnly(2, hook="on_train_batch_end", batch=2)
        seen = train(tmp_path, fault, Began(tmp_path), strategy=strategy)
        assert all(set(other["members"][-1]) == {0, 1, 2, 3} for other in seen)
        assert (tmp_path / "joined_2.pt").exists()
        until(lambda: not is_running(first.pid) and not is_running(second.pid), 10)


@pytest.mark.long
def test_one_that_can_not_reach_the_shards_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = DownpourClient.start

    def refused(client: Any, *args: Any) -> None:
        if client._control.incarnation:
            raise ShardLost("worker 2 lost a shard: it refused", 0)
        start(client, *args)

    monkeypatch.setattr(DownpourClient, "start", refused)
    fault = OnceOnly(2, hook="on_train_batch_end", batch=2)
    seen = train(tmp_path, fault, lost=(2,))
    assert all(other["members"][-1] == (0, 1, 3) for other in seen)
    assert "rank 2 left" in seen[0]["changes"][-1]
    assert "it refused" in seen[0]["changes"][-1]


@pytest.mark.long
def test_one_that_comes_back_takes_batches_that_are_dealt(tmp_path: Path) -> None:
    """Every sample comes once an epoch, but for what the dead one had taken; the epochs end together."""
    fault = OnceOnly(2, hook="on_train_batch_end", batch=2)
    seen = train(tmp_path, fault, strategy=downpour(restarts=1, dealt=True))
    assert all(set(other["members"][-1]) == {0, 1, 2, 3} for other in seen)
    check_server(tmp_path, flat(seen[0]["state"]), {"2.0"})
    made = {file.name[5:]: len(np.fromfile(file)) // 4 for file in tmp_path.glob("made_*")}
    assert made["2.1"] > 0
    assert 4 * 120 - 2 <= sum(made.values()) <= 4 * 120
