"""Train a perceptron on MNIST with replicas that gossip, in the set-up of arXiv:1812.02407.

python examples/mnist.py --devices 4 --strategy elastic-gossip --probability 0.125 --peers uniform

Nesterov momentum 0.99 and learning rate 0.001; under downpour, whose server adds up what all workers push, plain SGD
and 0.1 divided by --n-push, as in the DistBelief project.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
from classifier import Classifier
from command_line import add_image_options, downpour_lr, make_parser, parse
from image_data import ImageData
from models import mlp
from training import train_and_test


def default_to_strategy(args: argparse.Namespace) -> None:
    """Fill in the options left out, by strategy; raise ``ValueError`` for a bad --n-push."""
    downpour = args.strategy == "downpour"
    if args.lr is None:
        args.lr = downpour_lr(0.1, args.n_push) if downpour else 0.001
    if args.momentum is None:
        args.momentum = 0.0 if downpour else 0.99


def main() -> None:
    parser = make_parser(__doc__, epochs=5, batch_size=128, lr=None, momentum=None)
    add_image_options(parser, validation=8800, models=("mlp",))
    args = parse(parser, default_to_strategy)
    pl.seed_everything(args.seed, verbose=False)
    train_and_test(args, "mnist", Classifier(mlp(), args.lr, args.momentum, args.seed), ImageData(args, "mnist"))


if __name__ == "__main__":
    main()
