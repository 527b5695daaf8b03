"""A training of two ranks that log; each leaves what it saw, and where it logged, in a JSON file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gossip.monitoring.loggers import RankTensorBoardLogger


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.seen: list[float] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        value = 100.0 * self.global_rank + self.global_step
        self.seen.append(value)
        self.log("value", value)
        return self.layer(batch[0]).mean()

    def on_fit_end(self) -> None:
        logger: Any = self.trainer.logger
        record = [self.seen, logger.log_dir, self.trainer.log_dir]
        Path(sys.argv[1], f"seen_{self.global_rank}.json").write_text(json.dumps(record))

    def test_step(self, batch: Any) -> None:
        self.log("test_value", float(self.global_rank))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def main(out: Path, strategy: str) -> None:
    # a folder of its own for each process: the one of rank 0 must hold
    logger = RankTensorBoardLogger(out / f"logs_{os.environ.get('LOCAL_RANK', 0)}", name="run")
    if strategy == "ddp_fork":
        logger.experiment.add_text("note", "opened by the launching process")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=logger,
        max_epochs=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2)
    net = Net()
    trainer.fit(net, data)
    trainer.test(net, data, verbose=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
