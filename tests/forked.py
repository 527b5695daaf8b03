"""Real `Trainer.fit` runs whose ranks are forked from the test: Lightning is imported already, a run takes a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gossip.parameter_server import __main__ as shard_command


class Linear(pl.LightningModule):
    """Least squares in float64: small enough to replay by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layer(x).squeeze(1), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", Linear.training_step(self, batch, batch_idx), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", Linear.training_step(self, batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


def regression(rows: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    return TensorDataset(x, x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 3)


class Recorder(Callback):
    """Writes what each rank has at the end: the module's state, and whatever was put in ``seen``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, Any] = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen["state"] = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.seen["step"] = getattr(trainer.strategy, "step", None)
        self.seen["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(self.seen, self.folder / f"rank_{trainer.global_rank}.pt")


def fit(
    folder: Path,
    module: pl.LightningModule,
    strategy: Any,
    *,
    devices: int = 2,
    train: Any = None,
    val: Any = None,
    recorder: Recorder | None = None,
    callbacks: Any = (),
    ckpt_path: Any = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Fit on ``devices`` forked ranks and return what each rank's recorder saw."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=kwargs.pop("logger", False),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=kwargs.pop("enable_checkpointing", False),
        callbacks=[*callbacks, recorder or Recorder(folder)],
        **kwargs,
    )
    trainer.fit(module, train if train is not None else DataLoader(regression(), 4), val, ckpt_path=ckpt_path)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(devices)]


class ForkedShard:
    """What `ShardProcess` starts, in a fork of the test, which has torch imported already.

    Takes `subprocess.Popen`'s place.
    """

    def __init__(self, command: list[str], **_: Any) -> None:
        stdin, write = os.pipe()
        read, stdout = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            serve(command[2:], stdin, stdout)  # after the interpreter, and how it runs a module
        os.close(stdin)
        os.close(stdout)
        self.stdin, self.stdout = os.fdopen(write, "w"), os.fdopen(read)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a shard", timeout)
            else:
                time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def serve(arguments: list[str], stdin: int, stdout: int) -> NoReturn:
    """Be ``python -m lightning_gossip.parameter_server`` with its own ends of two pipes."""
    code = 1
    try:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.closerange(3, 1024)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")  # none of pytest's
        sys.argv = arguments
        code = shard_command.main()
        sys.stderr.flush()
    finally:
        os._exit(code)
