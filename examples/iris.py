"""Train a small network on Iris with replicas that gossip (the smallest experiment of arXiv:1812.02407).

python examples/iris.py --devices 4 --strategy elastic-gossip
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from classifier import Classifier
from command_line import make_parser, parse, train_and_test
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TRAIN, VALIDATION = 100, 25  # of 150; the rest is the test set


class Iris(pl.LightningDataModule):
    """Standardised Iris: each rank keeps one fixed, disjoint, even share of the training set.

    Args:
        batch_size: per rank.
        seed: of the split into training, validation and test set.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        data: Any = load_iris()
        inputs = torch.tensor(data.data, dtype=torch.float32)
        labels = torch.tensor(data.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        train, val, test = order.tensor_split((TRAIN, TRAIN + VALIDATION))
        inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
        self.val, self.test = (TensorDataset(inputs[part], labels[part]) for part in (val, test))
        self.train = TensorDataset(*self._share(inputs[train], labels[train]))

    def _share(self, *tensors: Tensor) -> list[Tensor]:
        rank, world_size = self._ranks()
        size = TRAIN // world_size
        return [tensor[rank * size : (rank + 1) * size] for tensor in tensors]

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, len(self.val))

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, len(self.test))


def main() -> None:
    args = parse(make_parser(__doc__, epochs=20, batch_size=4, lr=0.01))
    pl.seed_everything(args.seed, verbose=False)
    network = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    model = Classifier(network, lr=args.lr, momentum=0.99, seed=args.seed)
    train_and_test(args, "iris", model, Iris(args.batch_size // args.devices, args.seed))


if __name__ == "__main__":
    main()
