"""The signal by which SLURM says that a job ends soon: ranks agree on the end of a step, save there, requeue once."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, fit, regression
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy, GossipStrategy
from lightning_gossip.strategies import checkpoint as files

pytestmark = pytest.mark.faults


class ForkedSlurm(LightningEnvironment, SLURMEnvironment):
    """SLURM's environment, whose signals count, for ranks that are forked."""


class Signals(Callback):
    """Sends a rank the signal while it trains, and records the step counts at which the run was saved."""

    def __init__(self, after: dict[int, float], at_batch: int = 3) -> None:
        self.after = after  # seconds by rank
        self.at_batch = at_batch
        self.over = threading.Event()  # Lightning takes its handlers back then: a signal would end the process

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.over.set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        delay = self.after.get(trainer.global_rank)
        if delay is not None and trainer.fit_loop.epoch_loop.total_batch_idx == self.at_batch:
            pid = os.getpid()

            def send() -> None:
                if not self.over.wait(delay):
                    os.kill(pid, signal.SIGUSR1)

            threading.Thread(target=send, daemon=True).start()


class Slow(Linear):
    """Takes a few milliseconds a step, so that a signal comes at any moment of it."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0.004)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.004)
        super().validation_step(batch, batch_idx)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to which a made-up `scontrol` writes what it is asked to do."""
    asked = tmp_path / "asked"
    asked.touch()
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return asked


def strategy(name: str) -> Any:
    if name == "downpour":
        return DownpourStrategy(n_push=2, n_pull=3, start_method="fork")
    if name == "pull":
        return GossipStrategy(start_method="fork", shared_memory=False)
    return ElasticGossipStrategy(period=2, delay=1, start_method="fork")


def train(folder: Path, name: str, after: dict[int, float], **kwargs: Any) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    folder.mkdir(exist_ok=True)
    signals = Signals(after, at_batch=kwargs.pop("at_batch", 3))
    return fit(
        folder,
        Slow(),
        strategy(name),
        callbacks=[signals, *kwargs.pop("callbacks", ())],
        plugins=[ForkedSlurm()],
        train=DataLoader(regression(160), 4),
        max_epochs=kwargs.pop("max_epochs", 8),
        **kwargs,
    )


def saved(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The checkpoint that was saved for the requeued job, and each rank's own beside it."""
    [path] = folder.glob("hpc_ckpt_*.ckpt")
    save_id = torch.load(path, weights_only=True)[files.KEY]["save_id"]
    return path, [files.load_replica(files.AtomicCheckpointIO(), path, save_id, rank, True) for rank in range(2)]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("after", [{0: 0.0, 1: 0.0}, {0: 0.05}, {1: 0.05}, {0: 0.0, 1: 1.2}], ids=str)
@pytest.mark.parametrize("name", ["elastic", "pull", "downpour"])
def test_ranks_save_at_the_end_of_one_step_and_requeue_once(
    tmp_path: Path, scontrol: Path, name: str, after: dict[int, float]
) -> None:
    train(tmp_path, name, after)
    assert scontrol.read_text() == "requeue 4711\n"
    _, replicas = saved(tmp_path)
    if name != "downpour":
        assert len({replica["global_step"] for replica in replicas}) == 1
        assert len({replica[files.KEY]["state"]["step"] for replica in replicas}) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["elastic", "downpour"])
def test_signals_at_random_moments_while_validations_and_checkpoints_go_on(
    tmp_path: Path, scontrol: Path, name: str
) -> None:
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        moments = random.Random(attempt)
        checkpoint = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
        train(
            folder,
            name,
            {0: moments.random() / 3, 1: moments.random() / 3},
            val=DataLoader(regression(16), 4),
            val_check_interval=4,
            enable_checkpointing=True,
            callbacks=[checkpoint],
            max_epochs=4,
        )
        saved(folder)
    assert scontrol.read_text() == "requeue 4711\n" * 6


def test_a_requeued_job_goes_on_as_if_it_had_not_ended(tmp_path: Path, scontrol: Path) -> None:
    """Also where the signal comes with the last batches of an epoch."""
    unbroken = train(tmp_path / "unbroken", "elastic", {}, max_epochs=4)
    for at_batch in (19, 18, 17):
        folder = tmp_path / str(at_batch)
        train(folder, "elastic", {0: 0.0}, at_batch=at_batch, max_epochs=4)
        path, replicas = saved(folder)
        resumed = train(tmp_path / f"again_{at_batch}", "elastic", {}, max_epochs=4, ckpt_path=path)
        at_epochs_end = replicas[0]["global_step"] % 20 == 0
        for before, after in zip(unbroken, resumed, strict=True):
            assert before["step"] == after["step"]
            for key, value in before["state"].items():
                # a loader without a state begins its epoch anew: in its middle other batches follow
                assert not at_epochs_end or torch.equal(value, after["state"][key])


class Unequal(Slow):
    """Rank 0 has 4 batches an epoch, rank 1 has 40."""

    def train_dataloader(self) -> Any:
        return DataLoader(regression(16 if self.trainer.global_rank == 0 else 160), 4)


def test_a_rank_that_is_out_of_batches_saves_with_the_others(tmp_path: Path, scontrol: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ElasticGossipStrategy(start_method="fork"),
        plugins=[ForkedSlurm()],
        callbacks=[Signals({0: 0.02, 1: 0.04})],
        max_epochs=2,
        use_distributed_sampler=False,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(Unequal())
    assert scontrol.read_text() == "requeue 4711\n"
    _, replicas = saved(tmp_path)
    assert [replica["global_step"] > 4 for replica in replicas] == [False, True]


def test_a_signal_during_an_evaluation_requeues_the_job(tmp_path: Path, scontrol: Path) -> None:
    class Evaluated(Slow):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and self.global_rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ElasticGossipStrategy(start_method="fork"),
        plugins=[ForkedSlurm()],
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
    )
    trainer.validate(Evaluated(), DataLoader(regression(160), 2), verbose=False)
    assert scontrol.read_text() == "requeue 4711\n"
    assert not list(tmp_path.glob("*.ckpt"))
