"""Saves that fail, and processes that are killed while they save: what is there stays whole."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import multiprocessing as multiprocessing_launcher
from test_checkpoint import Noisy, make, replica_of

from lightning_gossip.strategies import checkpoint as files

pytestmark = pytest.mark.faults


class FailingIO(files.AtomicCheckpointIO):
    """Its disk is full for one kind of file from the second save on."""

    def __init__(self, what: str) -> None:
        self.what, self.saved = what, 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        failing = str(path).endswith(self.what)
        self.saved += failing
        if failing and self.saved > 1:
            raise OSError("no space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("what", ["rank_1.pt", "last.ckpt"])
def test_a_failing_save_ends_the_run_and_leaves_the_last_checkpoint_whole(tmp_path: Path, what: str) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", filename="last", enable_version_counter=False)
    strategy = make("elastic", checkpoint_io=FailingIO(what))
    with pytest.raises(Exception, match="no space left on device"):
        fit(tmp_path, Noisy(), strategy, max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True)
    path = tmp_path / "saved" / "last.ckpt"
    assert torch.load(path, weights_only=True)["epoch"] == 0
    for rank in range(2):
        assert replica_of(path, rank)["epoch"] == 0
    assert not [p for p in (tmp_path / "saved").rglob("*") if p.name.endswith(".tmp")]


def save_at_every_step(folder: Path) -> None:
    os.setsid()
    os.environ.pop("MASTER_PORT", None)  # of an earlier fit: two runs at once need a port each
    multiprocessing_launcher._check_bad_cuda_fork = lambda: None  # a fork of a fork, and no CUDA anywhere
    checkpoint = ModelCheckpoint(
        dirpath=folder / "saved",
        filename="{step}",
        every_n_train_steps=1,
        save_last=True,
        enable_version_counter=False,
    )
    kept = ModelCheckpoint(dirpath=folder / "saved", filename="same", every_n_epochs=1, enable_version_counter=False)
    steps = 3000  # some 20 seconds: it ends by itself where nobody is left to kill it
    fit(
        folder, Noisy(), make("elastic"), max_epochs=-1, max_steps=steps, callbacks=[checkpoint, kept],
        enable_checkpointing=True,
    )  # fmt: skip


@pytest.mark.timeout(400)
def test_a_kill_at_any_moment_leaves_checkpoints_whole(tmp_path: Path) -> None:
    """SIGKILL to all processes at 30 random points of saving: what has a checkpoint's name loads, with its files."""
    generator = random.Random(11)
    folders = [tmp_path / "first", tmp_path / "second"]  # two at once, for most of the time is spent on starting
    for folder in folders:
        folder.mkdir()
    whole = 0
    for _ in range(15):
        begun, deadline = time.time(), time.monotonic() + 20
        fork = multiprocessing.get_context("fork").Process
        processes = [fork(target=save_at_every_step, args=(folder,)) for folder in folders]
        try:
            for process in processes:
                process.start()
            for process, folder in zip(processes, folders, strict=True):
                while not saved_since(folder / "saved" / "last.ckpt", begun) and time.monotonic() < deadline:
                    time.sleep(0.005)
                time.sleep(generator.uniform(0, 0.15))
                kill_all(process)
        finally:
            for process in processes:
                if process.is_alive():
                    kill_all(process)
        whole += sum(map(assert_all_load, folders))
    assert whole > 100


def kill_all(process: Any) -> None:
    """Kill a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)


def saved_since(path: Path, begun: float) -> bool:
    return path.exists() and path.stat().st_mtime > begun


def assert_all_load(folder: Path) -> int:
    """Return how many replicas' files there are."""
    loaded = 0
    for path in (folder / "saved").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        entry = checkpoint[files.KEY]
        for rank in range(entry["world_size"]):
            replica = files.load_replica(files.AtomicCheckpointIO(), path, entry["save_id"], rank, True)
            assert replica["global_step"] == checkpoint["global_step"]
            loaded += 1
    return loaded
