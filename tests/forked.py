"""Real `Trainer.fit` runs whose ranks are forked from the test: Lightning is imported already, a run takes a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


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
        whole = self.folder / f"rank_{trainer.global_rank}.pt"
        torch.save(self.seen, part := whole.with_suffix(".part"))
        part.rename(whole)  # whoever dies on the way leaves none


def recorded(module: pl.LightningModule) -> dict[str, Any]:
    """What this rank's recorder has seen so far; what is put there is written at the end."""
    trainer: Any = module.trainer
    return next(callback for callback in trainer.callbacks if isinstance(callback, Recorder)).seen


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
