"""The LightningModule of all examples: an image or feature classifier trained by SGD with Nesterov momentum."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Classifier(pl.LightningModule):
    """Cross-entropy on the logits of ``network``; every replica logs its own metrics.

    Args:
        network: inputs to logits of shape ``(batch, classes)``.
        lr: learning rate.
        momentum: Nesterov's, 0 for plain SGD.
        seed: each rank draws its own dropout and order of samples, from this and its number.
    """

    def __init__(self, network: nn.Module, lr: float, momentum: float, seed: int) -> None:
        super().__init__()
        self.network = network
        self.lr, self.momentum, self.seed = lr, momentum, seed

    def on_train_start(self) -> None:
        torch.manual_seed(self.seed + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0, fused=True
        )
