"""Train a small network on Iris with replicas that gossip (the smallest experiment of arXiv:1812.02407).

python examples/iris.py --devices 4 --strategy elastic-gossip

Nesterov momentum 0.99 and learning rate 0.01; under downpour, whose server adds up what all workers push, 0.9 and 0.03
divided by --n-push, chosen on the validation set.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from classifier import Classifier
from command_line import make_parser, parse, sgd_by_strategy
from sklearn.datasets import load_iris
from tensor_data import Labelled, Sets, TensorData
from torch import nn
from training import train_and_test

TRAIN, VALIDATION = 100, 25  # of 150; the rest is the test set

default_to_strategy = sgd_by_strategy(usual=(0.01, 0.99), downpour=(0.03, 0.9))


class Iris(TensorData):
    """Standardised Iris, 4 features a flower."""

    def load(self) -> Sets:
        data: Any = load_iris()
        inputs = torch.tensor(data.data, dtype=torch.float32)
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(self.args.seed))
        train, validation, test = order.tensor_split((TRAIN, TRAIN + VALIDATION))
        flowers = Labelled((inputs - inputs[train].mean(0)) / inputs[train].std(0), torch.tensor(data.target))
        return Sets(*map(flowers.part, (train, validation, test)))


def main() -> None:
    parser = make_parser(__doc__, epochs=20, batch_size=4, lr=None, momentum=None, log_every=10)
    args = parse(parser, default_to_strategy)
    pl.seed_everything(args.seed, verbose=False)
    network = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    train_and_test(args, "iris", Classifier(network, args.lr, args.momentum, args.seed), Iris(args))


if __name__ == "__main__":
    main()
