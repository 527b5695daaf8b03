"""Learns features with BYOL from lightly's parts: the strategy goes to a Trainer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightly.data import LightlyDataset
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import SimCLRTransform
from pytorch_lightning import Callback, LightningModule, Trainer
from recorded import OUT, Recorded, by_name
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData


class Recorder(Recorded, Callback):
    pass


class BYOL(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.projection = BYOLProjectionHead(32, 32, 16)
        self.prediction = BYOLPredictionHead(16, 32, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_momentum = copy.deepcopy(self.projection)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_momentum)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection, self.projection_momentum, m=0.99)
        (one, other), *_ = batch
        loss = self.criterion(self.predict(one), self.target(other)) + self.criterion(
            self.predict(other), self.target(one)
        )
        self.log("loss", loss, sync_dist=True)
        return loss / 2

    def predict(self, x: Tensor) -> Tensor:
        return self.prediction(self.projection(self.backbone(x)))

    def target(self, x: Tensor) -> Tensor:
        return self.projection_momentum(self.backbone_momentum(x)).detach()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


def main() -> None:
    torch.manual_seed(0)
    images = FakeData(128, (3, 32, 32))
    data = LightlyDataset.from_torch_dataset(images, transform=SimCLRTransform(input_size=16, gaussian_blur=0.0))
    recorder = Recorder()
    trainer = Trainer(
        strategy=by_name(),
        accelerator="cpu",
        devices=2,
        max_epochs=4,
        callbacks=[recorder],
        logger=False,
        enable_progress_bar=False,
        default_root_dir=OUT,
    )
    module = BYOL()
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True, drop_last=True))
    trainer.save_checkpoint(OUT / "byol.ckpt")
    if recorder.rank:
        return recorder.leave(module)
    loaded = BYOL.load_from_checkpoint(OUT / "byol.ckpt").eval()
    return recorder.leave(module, loaded, loaded.predict(torch.randn(4, 3, 16, 16)))


if __name__ == "__main__":
    main()
