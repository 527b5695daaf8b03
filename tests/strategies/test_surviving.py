"""Real `Trainer.fit` runs that lose ranks and go on (design §10)."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from curves import scalars
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gossip import ElasticGossipStrategy, GossipMonitor, GossipStrategy, RankTensorBoardLogger
from lightning_gossip.monitoring import report_plots, run_folder
from lightning_gossip.monitoring.event_files import read_run
from lightning_gossip.strategies import checkpoint as files

pytestmark = pytest.mark.faults

STEPS = 6  # of an epoch of four ranks


def surviving(min_replicas: int = 1, lost_after: float = 20, **options: Any) -> ElasticGossipStrategy:
    options = {"start_method": "fork", "timeout": timedelta(seconds=60), **options}
    return ElasticGossipStrategy(min_replicas=min_replicas, lost_after=timedelta(seconds=lost_after), **options)


class Fault(Callback):
    """Does something to some ranks at one point of a training, and records what happened to the others.

    Args:
        ranks: to whom.
        hook: in which hook of a callback.
        epoch, batch: when; None at the first call of the hook in that epoch.
        act: what; SIGKILL by default.
    """

    def __init__(
        self, *ranks: int, hook: str, epoch: int = 1, batch: int | None = None, act: Callable[[], None] | None = None
    ) -> None:
        self.ranks, self.epoch, self.batch = ranks, epoch, batch
        self.act = act or (lambda: os.kill(os.getpid(), signal.SIGKILL))
        self.done = False
        setattr(self, hook, self._hook)

    def _hook(self, trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        here = trainer.current_epoch == self.epoch and not trainer.sanity_checking
        if here and not self.done and (self.batch is None or arguments[-1] == self.batch):
            self.done = True
            if trainer.global_rank in self.ranks:
                self.act()


class History(Recorder):
    """Records who took part in every epoch, and how many steps this rank made."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen |= {"members": [], "steps": [], "zero": [], "losses": []}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.seen["members"].append(strategy.members)
        self.seen["zero"].append(trainer.is_global_zero)
        self.seen["steps"].append(trainer.global_step)
        self.seen["changes"] = [str(change) for change in strategy.changes]
        if "val_loss" in trainer.callback_metrics:
            self.seen["losses"].append(float(trainer.callback_metrics["val_loss"]))


def run(folder: Path, *callbacks: Callback, lost: tuple[int, ...], strategy: Any = None, **options: Any) -> list[Any]:
    """Train four ranks for four epochs; return what those have seen that are not lost."""
    options = {"max_epochs": 4, "train": DataLoader(regression(96), 4), "val": DataLoader(regression(), 4), **options}
    history = History(folder)
    for rank in lost:
        torch.save(None, folder / f"rank_{rank}.pt")
    strategy = strategy or surviving()
    seen = fit(
        folder, options.pop("module", Linear()), strategy, devices=4, callbacks=callbacks, recorder=history, **options
    )
    return [ranks for rank, ranks in enumerate(seen) if rank not in lost]


def check(survivors: list[Any], left: tuple[int, ...], at_once: bool = True) -> None:
    """Nobody lost a step, all agree on who was there and on what was measured, and the data was dealt anew."""
    assert len(survivors) == len(left)
    for rank, seen in zip(left, survivors, strict=True):
        assert seen["members"][0] == (0, 1, 2, 3)
        assert seen["members"][1:] == [left] * 3 or not at_once
        assert seen["members"][-1] == left
        dealt = -(-24 // len(left))  # batches of 4 of 96 rows
        assert seen["steps"] == [STEPS, 2 * STEPS, 2 * STEPS + dealt, 2 * STEPS + 2 * dealt]
        assert seen["zero"][-1] == (rank == left[0])
        assert seen["losses"] == survivors[0]["losses"]
        torch.testing.assert_close(seen["state"], survivors[0]["state"], rtol=0, atol=0)
    assert survivors[0]["losses"][-1] < survivors[0]["losses"][0]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("lost", [(2,), (0,), (0, 1), (0, 1, 3)], ids=str)
def test_those_that_are_left_go_on(tmp_path: Path, lost: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    left = tuple(rank for rank in range(4) if rank not in lost)
    fault = Fault(*lost, hook="on_train_batch_end", batch=2)
    with caplog.at_level(logging.WARNING):
        survivors = run(tmp_path, fault, lost=lost)
    check(survivors, left)
    for rank in lost:
        assert f"rank {rank}: its process" in caplog.text
        assert "was killed by SIGKILL" in caplog.text


AT_OTHER_POINTS: dict[str, dict[str, Any]] = {
    "a validation": {"hook": "on_validation_batch_start", "epoch": 1},
    "the start of a validation": {"hook": "on_validation_start", "epoch": 1},
    "the end of a validation": {"hook": "on_validation_end", "epoch": 1},
    "an epoch's end": {"hook": "on_train_epoch_end", "epoch": 1},
    "a save": {"hook": "on_save_checkpoint", "epoch": 1},
}


@pytest.mark.one_in(12)
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
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    survivors = run(tmp_path, fault, saving, lost=(rank,), enable_checkpointing=True)
    check(survivors, left, at_once=False)
    names = {path.name for path in tmp_path.glob("*.ckpt")}
    assert names == {"epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"}
    for name in names:
        entry = torch.load(tmp_path / name, weights_only=True)[files.KEY]
        replicas = tmp_path / f"{name}.replicas" / entry["save_id"]
        assert (
            {path.name for path in replicas.iterdir()}
            == {f"rank_{k}.pt" for k in left}
            == {f"rank_{k}.pt" for k in entry["ranks"]}
        )


class KilledWhileItWrites(files.AtomicCheckpointIO):
    """The lowest rank dies in the midst of writing a checkpoint's own file."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if str(path).endswith("epoch=1.ckpt") and os.environ["LOCAL_RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_save_whose_writer_dies_is_repeated_by_the_next(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    strategy = surviving(checkpoint_io=KilledWhileItWrites())
    survivors = run(tmp_path, saving, lost=(0,), strategy=strategy, enable_checkpointing=True)
    check(survivors, (1, 2, 3), at_once=False)
    entry = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)[files.KEY]
    assert entry["ranks"] == [1, 2, 3]
    assert len(list(tmp_path.glob("*.ckpt"))) == 4


def test_a_checkpoint_of_those_that_are_left_resumes_exactly_on_as_many(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    saving = ModelCheckpoint(whole, filename="{epoch}", save_top_k=-1)
    fault = Fault(1, hook="on_train_batch_end", epoch=0, batch=2)
    options: dict[str, Any] = {"evaluate": "replica", "period": 2, "delay": 1}
    strategy = surviving(**options)
    survivors = run(whole, fault, saving, lost=(1,), strategy=strategy, enable_checkpointing=True)
    again = fit(
        resumed,
        Linear(),
        ElasticGossipStrategy(start_method="fork", **options),
        devices=3,
        train=DataLoader(regression(96), 4),
        val=DataLoader(regression(), 4),
        max_epochs=4,
        ckpt_path=str(whole / "epoch=1.ckpt"),
    )
    for seen, other in zip(survivors, again, strict=True):
        torch.testing.assert_close(seen["state"], other["state"], rtol=0, atol=0)
        assert seen["step"] == other["step"]


def test_too_few_end_the_run_and_say_who_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults = (
        Fault(2, hook="on_train_batch_end", epoch=0, batch=2),
        Fault(3, hook="on_train_batch_end", epoch=1, batch=2),
    )
    with pytest.raises(RuntimeError, match="no rank came to the end of the run"):
        run(tmp_path, *faults, lost=(), strategy=surviving(min_replicas=3))
    text = "2 of 4 replicas are left, fewer than `min_replicas=3`: rank 2 lost at step "
    assert caplog.text.count(text) == 2
    assert "; rank 3 lost at step " in caplog.text


class Boom(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and self.trainer.current_epoch == 1 and batch_idx == 3:
            raise ValueError("boom")
        return super().training_step(batch, batch_idx)


@pytest.mark.long
def test_who_ends_on_an_exception_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    survivors = run(tmp_path, lost=(1,), module=Boom())
    check(survivors, (0, 2, 3))
    assert "ValueError: boom" in caplog.text
    assert survivors[0]["changes"] == ["rank 1 left at step 10 (ValueError: boom)"]


def test_who_gets_sigterm_leaves(tmp_path: Path) -> None:
    fault = Fault(2, hook="on_train_batch_end", batch=2, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    survivors = run(tmp_path, fault, lost=(2,))
    check(survivors, (0, 1, 3))
    assert survivors[0]["changes"] == ["rank 2 left at step 9 (it received SIGTERM)"]


def stop_for(seconds: float) -> Callable[[], None]:
    """SIGSTOP this process, and let another wake it up."""

    def act() -> None:
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        os.kill(pid, signal.SIGSTOP)

    return act


@pytest.mark.long
def test_a_pause_is_no_death(tmp_path: Path) -> None:
    fault = Fault(2, hook="on_train_batch_end", batch=2, act=stop_for(4))
    survivors = run(tmp_path, fault, lost=(), strategy=surviving(lost_after=10))
    assert [seen["members"] for seen in survivors] == [[(0, 1, 2, 3)] * 4] * 4


def test_who_is_silent_for_too_long_is_lost_and_finds_itself_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """When it wakes up the others have come to the end: it is told so (one that can still join: test_joining)."""
    fault = Fault(2, hook="on_train_batch_end", batch=2, act=stop_for(12))
    survivors = run(tmp_path, fault, lost=(2,), strategy=surviving(lost_after=3))
    check(survivors, (0, 1, 3))
    assert "(no sign of life for 3 s)" in survivors[0]["changes"][0]
    assert "rank 2: the training is over; no checkpoint was saved" in capfd.readouterr().err


class Diverging(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and self.global_step == 8 else loss


@pytest.mark.parametrize("strategy", [ElasticGossipStrategy, GossipStrategy])
def test_a_replica_that_is_not_finite_takes_a_partners(tmp_path: Path, strategy: Any) -> None:
    options = {"start_method": "fork", "nonfinite": "heal"}
    seen = run(tmp_path, lost=(), module=Diverging(), strategy=strategy(**options))
    assert all(torch.isfinite(value).all() for rank in seen for value in rank["state"].values())
    assert seen[0]["losses"][-1] < seen[0]["losses"][0]
    assert [rank["steps"] for rank in seen] == [[6, 12, 18, 24]] * 4


def test_a_replica_that_is_not_finite_ends_the_run_by_default(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"NotFinite: .*rank 1"):
        run(tmp_path, lost=(), module=Diverging(), strategy=ElasticGossipStrategy(start_method="fork"))


@pytest.mark.long
def test_data_loader_workers_of_a_dead_rank_end(tmp_path: Path) -> None:
    loader = DataLoader(regression(96), 4, num_workers=1, persistent_workers=True)
    fault = Fault(0, hook="on_train_batch_end", batch=2)
    check(run(tmp_path, fault, lost=(0,), train=loader), (1, 2, 3))


class OwnCollectives(Linear):
    """Uses groups of its own in a validation."""

    def on_validation_epoch_end(self) -> None:
        group: Any = dist.new_group()
        ones = torch.ones(1)
        dist.all_reduce(ones, group=group)
        assert int(ones) == dist.get_world_size() == len(self.trainer.strategy.members)  # type: ignore[attr-defined]


@pytest.mark.long
def test_groups_of_the_users_own_work_on(tmp_path: Path) -> None:
    fault = Fault(0, hook="on_train_batch_end", batch=2)
    check(run(tmp_path, fault, lost=(0,), module=OwnCollectives()), (1, 2, 3))


@pytest.mark.long
def test_loggers_go_on_in_the_same_folders_and_the_moment_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_GOSSIP_RUN_FOLDERS", "{}")
    monkeypatch.setattr(run_folder, "_handed_on", {})
    loggers = [TensorBoardLogger(tmp_path, name="plain"), RankTensorBoardLogger(tmp_path, name="ranks")]
    fault = Fault(0, hook="on_train_batch_end", batch=2)
    survivors = run(tmp_path, fault, GossipMonitor(every_n_steps=2), lost=(0,), logger=loggers)
    check(survivors, (1, 2, 3))
    assert os.listdir(tmp_path / "plain") == ["version_0"]
    assert [value for _, value in scalars(tmp_path / "plain" / "version_0", "val_loss")] == [
        pytest.approx(loss) for loss in survivors[0]["losses"]
    ], "of rank 0, and of rank 1 once that has its duties"
    followed = read_run(tmp_path / "ranks" / "version_0")
    for rank in (1, 2, 3):
        assert [value for _, value in scalars(tmp_path / "ranks" / "version_0" / f"rank_{rank}", "gossip/members")][
            -1
        ] == 3
    [(_, step)] = report_plots.changes(followed, "step")
    assert 8 <= step < 14, "a report marks it there"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_replicas": 0}, "`min_replicas` must be an integer of at least 1, got 0"),
        ({"min_replicas": True}, "`min_replicas` must be an integer of at least 1, got True"),
        ({"lost_after": timedelta(seconds=2)}, "`lost_after` must be more than 2 s, two heartbeats, got 2 s"),
        ({"lost_after": 5}, "`lost_after` must be a positive datetime.timedelta, got 5"),
        ({"nonfinite": "ignore"}, "`nonfinite` must be one of None, 'heal', 'error'; got 'ignore'"),
        ({"min_replicas": 2, "process_group_backend": "nccl"}, "`min_replicas` needs gloo"),
    ],
)
@pytest.mark.parametrize("strategy", [ElasticGossipStrategy, GossipStrategy])
def test_bad_arguments_are_named(strategy: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**options)


def test_more_replicas_than_ranks_are_refused_at_set_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no rank came to the end"):
        run(tmp_path, lost=(), strategy=surviving(min_replicas=5))
