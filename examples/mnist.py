"""Train a perceptron on MNIST with replicas that gossip, in the set-up of arXiv:1812.02407.

python examples/mnist.py --devices 4 --strategy elastic-gossip --probability 0.125 --peers uniform
"""

from __future__ import annotations

import lightning.pytorch as pl
from classifier import Classifier
from command_line import add_image_options, make_parser, parse
from image_data import ImageData
from models import mlp
from training import train_and_test


def main() -> None:
    parser = make_parser(__doc__, epochs=5, batch_size=128, lr=0.001, momentum=0.99)
    add_image_options(parser, validation=8800, models=("mlp",))
    args = parse(parser)
    pl.seed_everything(args.seed, verbose=False)
    train_and_test(args, "mnist", Classifier(mlp(), args.lr, args.momentum, args.seed), ImageData(args, "mnist"))


if __name__ == "__main__":
    main()
