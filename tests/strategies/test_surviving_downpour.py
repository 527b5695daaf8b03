"""Real `Trainer.fit` runs on a parameter server that lose workers and go on; a lost shard ends them (design §10)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Linear, fit, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from running import is_running
from test_surviving import STEPS, Fault, run, stop_for
from torch import Tensor
from torch.utils.data import DataLoader
from waiting import until

from lightning_gossip import DownpourStrategy
from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.process import ShardProcess
from lightning_gossip.strategies import checkpoint as files

pytestmark = pytest.mark.faults

LR = 0.01


def downpour(min_replicas: int | None = 1, lost_after: float = 20, **options: Any) -> DownpourStrategy:
    options = {"n_push": 1, "n_pull": 2, "shards": 2, "start_method": "fork", "dealt": False, **options}
    return DownpourStrategy(
        min_replicas=min_replicas,
        lost_after=timedelta(seconds=lost_after),
        timeout=timedelta(seconds=60),
        **options,
    )


class Constant(Linear):
    """The gradient is the same wherever the parameters are: what each rank makes is written down as it makes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        made = -LR * np.append(x.sum(0).numpy(), len(x))
        with open(self.folder / f"made_{self.maker}", "ab") as file:
            file.write(made.tobytes())
        return self.layer(x).sum()

    @property
    def maker(self) -> str:
        """What names who makes it."""
        return str(self.global_rank)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def constant(folder: Path) -> Constant:
    torch.manual_seed(3)
    return Constant(folder)


def flat(state: dict[str, Tensor]) -> np.ndarray:
    """Parameters as the server holds them, in their order."""
    return np.append(state["layer.weight"].numpy().ravel(), state["layer.bias"].numpy())


def made(folder: Path, rank: int) -> np.ndarray:
    """What the rank made, a row a step."""
    file = folder / f"made_{rank}"
    return np.fromfile(file).reshape(-1, 4) if file.exists() else np.zeros((0, 4))


def check(folder: Path, survivors: list[Any], left: tuple[int, ...], steps: bool = True) -> None:
    """The server holds all that was made by those that are left, and what of the others came whole to each shard."""
    assert len(survivors) == len(left)
    lost = [rank for rank in range(4) if rank not in left]
    for seen in survivors:
        assert seen["members"][-1] == left
        assert not steps or seen["steps"][-1] == 2 * STEPS + 2 * (-(-24 // len(left)))
        assert seen["losses"] == survivors[0]["losses"]
        torch.testing.assert_close(seen["state"], survivors[0]["state"], rtol=0, atol=0)
    rest = flat(survivors[0]["state"]) - flat(constant(folder).state_dict())
    rest -= sum(made(folder, rank).sum(0) for rank in left)
    for part in (slice(0, 2), slice(2, 4)):  # of two shards
        arrived = [np.zeros(2)]
        for rank in lost:
            sums = np.cumsum(np.vstack([np.zeros(4), made(folder, rank)]), axis=0)[:, part]
            arrived = [one + other for one in arrived for other in sums]
        assert min(np.abs(rest[part] - one).max() for one in arrived) < 1e-10


class Shards(Callback):
    """Writes down the processes of the shards that this rank started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for process in trainer.strategy._processes:
            (self.folder / f"shard_{process.pid}").touch()


def running_shards(folder: Path) -> list[int]:
    """Those that Shards saw, and that run still."""
    return [pid for pid in (int(file.name[6:]) for file in folder.glob("shard_*")) if is_running(pid)]


def train(folder: Path, *callbacks: Callback, lost: tuple[int, ...], **options: Any) -> list[Any]:
    """Let four ranks train, and see that their shards end."""
    options = {"strategy": downpour(), "module": constant(folder), **options}
    try:
        return run(folder, *callbacks, Shards(folder), lost=lost, **options)
    finally:
        until(lambda: not running_shards(folder), 10)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("lost", [(2,), (0,), (0, 1), (0, 1, 3)], ids=str)
def test_those_that_are_left_go_on(tmp_path: Path, lost: tuple[int, ...]) -> None:
    left = tuple(rank for rank in range(4) if rank not in lost)
    survivors = train(tmp_path, Fault(*lost, hook="on_train_batch_end", batch=2), lost=lost)
    check(tmp_path, survivors, left)
    assert list(tmp_path.glob("shard_*"))


AT_OTHER_POINTS: dict[str, dict[str, Any]] = {
    "the start of a validation": {"hook": "on_validation_start", "epoch": 1},
    "the end of a validation": {"hook": "on_validation_end", "epoch": 1},
    "a save": {"hook": "on_save_checkpoint", "epoch": 1},
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    ("point", "rank"),
    [
        pytest.param(point, rank, marks=() if rank == 2 * (index % 2) else pytest.mark.long)
        for index, point in enumerate(AT_OTHER_POINTS)
        for rank in (0, 2)
    ],
)
def test_a_death_at(tmp_path: Path, point: str, rank: int) -> None:
    fault = Fault(rank, **AT_OTHER_POINTS[point])
    left = tuple(k for k in range(4) if k != rank)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    survivors = train(tmp_path, fault, saving, lost=(rank,), enable_checkpointing=True)
    check(tmp_path, survivors, left)
    entry = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)[files.KEY]
    assert entry["ranks"] == list(left)
    states = [replica(tmp_path / "epoch=1.ckpt", k)[files.KEY]["state"] for k in left]
    assert ["server" in state for state in states] == [True, False, False]


class DiesBeforeTheStart(Callback):
    """Rank 0 starts the shards, and dies before a worker comes to them."""

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        time.sleep(5)


@pytest.mark.long
def test_shards_wait_for_the_others_where_who_started_them_dies_before_they_come(tmp_path: Path) -> None:
    survivors = train(tmp_path, DiesBeforeTheStart(), lost=(0,))
    check(tmp_path, survivors, (1, 2, 3), steps=False)


def replica(path: Path, rank: int) -> dict[str, Any]:
    entry = torch.load(path, weights_only=True)[files.KEY]
    return torch.load(files.replica_path(str(path), entry["save_id"], rank), weights_only=True)


class KilledWhileItWrites(files.AtomicCheckpointIO):
    """The lowest rank dies before it writes a checkpoint's own file: that of its replica is there."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if str(path).endswith("epoch=1.ckpt") and os.environ["LOCAL_RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_checkpoint_of_those_that_are_left_resumes_exactly_on_as_many(tmp_path: Path) -> None:
    """With the server's optimizer, whose state was in the file of the one that died over it."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    saving = ModelCheckpoint(whole, filename="{epoch}", save_top_k=-1)
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    strategy = downpour(checkpoint_io=KilledWhileItWrites(), server_optimizer=adam, n_push=4, evaluate="replica")
    train(whole, saving, lost=(0,), strategy=strategy, enable_checkpointing=True)
    path = whole / "epoch=1.ckpt"
    saved = [replica(path, rank)[files.KEY]["state"] for rank in (1, 2, 3)]
    server = saved[0]["server"]
    assert server["pushes"]["0"] > 0
    again = Resumed()
    fit(
        resumed,
        constant(resumed),
        downpour(None, server_optimizer=adam, n_push=4, evaluate="replica"),
        devices=3,
        train=DataLoader(regression(96), 4),
        max_epochs=3,
        ckpt_path=str(path),
        callbacks=[again],
    )
    for rank in range(3):
        began = torch.load(resumed / f"began_{rank}.pt", weights_only=True)
        assert began["worker"]["step"] == saved[rank]["worker"]["step"]
        torch.testing.assert_close(began["worker"]["reference"], saved[rank]["worker"]["reference"], rtol=0, atol=0)
        for name, value in replica(path, rank + 1)["state_dict"].items():
            torch.testing.assert_close(began["replica"][name], value, rtol=0, atol=0)
    began = torch.load(resumed / "began_0.pt", weights_only=True)["server"]
    torch.testing.assert_close(began["parameters"], server["parameters"], rtol=0, atol=0)
    torch.testing.assert_close(began["optimizer"], server["optimizer"], rtol=0, atol=0)
    assert began["version"] == server["version"]
    assert began["pushes"] == {str(rank): server["pushes"][str(rank + 1)] for rank in range(3)}


class Resumed(Callback):
    """Writes down where every rank began."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            trainer.strategy.barrier()
            state = {**trainer.strategy.training_state(), "replica": pl_module.state_dict()}
            torch.save(state, Path(trainer.default_root_dir) / f"began_{trainer.global_rank}.pt")
            trainer.strategy.barrier()


@pytest.mark.long
@pytest.mark.parametrize("lost", [(0,), (0, 1)], ids=str)
def test_the_next_warms_up_where_the_first_dies_over_it(tmp_path: Path, lost: tuple[int, ...]) -> None:
    faults = [Fault(rank, hook="on_train_batch_end", epoch=0, batch=2) for rank in lost]
    left = tuple(rank for rank in range(4) if rank not in lost)
    survivors = train(tmp_path, *faults, lost=lost, strategy=downpour(warmup_steps=5))
    check(tmp_path, survivors, left, steps=False)
    assert all(seen["steps"][0] == STEPS for seen in survivors), "nobody lost a step"


def test_a_worker_that_dies_between_the_header_and_the_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What of its push came whole to one shard is there, and to the other not."""
    end_step = DownpourClient.end_step

    def dying(client: Any, parameters: Any) -> None:
        if client._control.rank == 2:
            client.drain()  # so that every step's push leaves at its end
            if client.step == 8:
                link = client._links._links[1]
                link.send = partial(send_half, link.send)
        end_step(client, parameters)

    monkeypatch.setattr(DownpourClient, "end_step", dying)
    survivors = train(tmp_path, lost=(2,))
    check(tmp_path, survivors, (0, 1, 3))
    rest = flat(survivors[0]["state"]) - flat(constant(tmp_path).state_dict())
    rest -= sum(made(tmp_path, rank).sum(0) for rank in (0, 1, 3))
    sums = np.cumsum(made(tmp_path, 2), axis=0)
    np.testing.assert_allclose(rest[:2], sums[8, :2], rtol=0, atol=1e-10)
    np.testing.assert_allclose(rest[2:], sums[7, 2:], rtol=0, atol=1e-10)


def send_half(send: Callable[..., None], header: Any, *payloads: Any) -> None:
    if not payloads:
        return send(header)
    time.sleep(0.3)  # the other shard has its part by then
    send(header)
    time.sleep(0.1)
    return os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_shard_ends_the_run_of_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def kill() -> None:
        for file in tmp_path.glob("shard_*"):
            os.kill(int(file.name[6:]), signal.SIGKILL)
            return

    fault = Fault(1, hook="on_train_batch_end", batch=2, act=kill)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="no rank came to the end of the run"):
        train(tmp_path, fault, lost=())
    assert time.monotonic() - began < 30
    assert caplog.text.count("lost parameter server shard") >= 4


@pytest.mark.long
def test_shards_started_by_hand_outlive_every_rank(tmp_path: Path) -> None:
    with ShardProcess() as first, ShardProcess() as second:
        strategy = downpour(shard_addresses=[first.address, second.address])
        survivors = train(tmp_path, Fault(0, hook="on_train_batch_end", batch=2), lost=(0,), strategy=strategy)
        check(tmp_path, survivors, (1, 2, 3))
        until(lambda: not is_running(first.pid) and not is_running(second.pid), 10)


@pytest.mark.long
def test_all_die_at_once_and_their_shards_end(tmp_path: Path) -> None:
    fault = Fault(0, 1, 2, 3, hook="on_train_batch_end", batch=2)
    with pytest.raises(RuntimeError, match="no rank came to the end of the run"):
        train(tmp_path, fault, lost=())
    assert list(tmp_path.glob("shard_*"))


@pytest.mark.long
def test_who_wakes_up_after_all_is_over_changes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fault = Fault(2, hook="on_train_batch_end", batch=2, act=stop_for(10))
    survivors = train(tmp_path, fault, lost=(2,), strategy=downpour(lost_after=3))
    check(tmp_path, survivors, (0, 1, 3))
    assert "rank 2: the training is over" in capfd.readouterr().err


class Boom(Constant):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 0 and self.trainer.current_epoch == 1 and batch_idx == 3:
            raise ValueError("boom")
        return super().training_step(batch, batch_idx)


@pytest.mark.long
def test_who_started_the_shards_leaves_on_an_exception_and_they_stay(tmp_path: Path) -> None:
    torch.manual_seed(3)
    survivors = train(tmp_path, lost=(0,), module=Boom(tmp_path))
    check(tmp_path, survivors, (1, 2, 3))
    assert survivors[0]["changes"] == ["rank 0 left at step 9 (ValueError: boom)"]


class Diverging(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and self.global_step == 8 else loss


@pytest.mark.long
def test_a_replica_that_is_not_finite_takes_the_servers(tmp_path: Path) -> None:
    seen = train(tmp_path, lost=(), module=Diverging())
    assert all(torch.isfinite(value).all() for rank in seen for value in rank["state"].values())
    assert seen[0]["losses"][-1] < seen[0]["losses"][0]
    assert [rank["steps"] for rank in seen] == [[6, 12, 18, 24]] * 4


def test_a_replica_that_is_not_finite_ends_the_run_by_default(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"NotFinite: .*rank 1"):
        train(tmp_path, lost=(), module=Diverging(), strategy=downpour(None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_replicas": 0}, "`min_replicas` must be an integer of at least 1, got 0"),
        ({"lost_after": timedelta(seconds=2)}, "`lost_after` must be more than 2 s, two heartbeats, got 2 s"),
        ({"nonfinite": "ignore"}, "`nonfinite` must be one of None, 'heal', 'error'; got 'ignore'"),
        ({"min_replicas": 2, "process_group_backend": "nccl"}, "`min_replicas` needs gloo"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DownpourStrategy(**options)


def test_arguments_in_a_runs_metadata() -> None:
    arguments = downpour(2).hyperparameters
    assert arguments.items() >= {"min_replicas": 2, "lost_after": 20.0, "nonfinite": "heal"}.items()
