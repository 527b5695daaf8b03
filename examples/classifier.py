"""The LightningModule of all examples: an image or feature classifier trained by SGD with Nesterov momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from shares import mixed_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Classifier(pl.LightningModule):
    """Cross-entropy on the logits of ``network``; every replica logs its own metrics.

    Args:
        network: inputs to logits of shape ``(batch, classes)``.
        lr: learning rate.
        momentum: Nesterov's, 0 for plain SGD.
        seed: each rank draws its own dropout and augmentation, from this, its number and the epoch.
        augment: applied to the inputs of a whole training batch.
        schedule: of the learning rate: makes a scheduler for an optimizer; None keeps it.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        momentum: float,
        seed: int,
        augment: Callable[[Tensor], Tensor] | None = None,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.lr, self.momentum, self.seed = lr, momentum, seed
        self.augment, self.schedule = augment, schedule

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 0:  # a resumed run draws what an unbroken one does, under every strategy
            torch.manual_seed(mixed_seed(self.seed, self.current_epoch, self.global_rank, "training"))
        inputs, labels = batch
        if self.augment is not None:
            inputs = self.augment(inputs)
        loss = cross_entropy(self.network(inputs), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        inputs, labels = batch
        logits = self.network(inputs)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        metrics = {f"{stage}_loss": cross_entropy(logits, labels), f"{stage}_accuracy": accuracy}
        self.log_dict(metrics, prog_bar=stage == "val", batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0, fused=True
        )
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "monitor": "val_loss"}}
