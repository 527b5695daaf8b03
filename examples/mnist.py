"""Train a perceptron on MNIST with replicas that gossip, in the set-up of arXiv:1812.02407.

python examples/mnist.py --devices 4 --strategy elastic-gossip --probability 0.125 --peers uniform

Nesterov momentum 0.99 and learning rate 0.001; under downpour, whose server adds up what all workers push, plain SGD
and 0.1 divided by --n-push, as in the DistBelief project.
"""

from __future__ import annotations

import lightning.pytorch as pl
from classifier import Classifier
from command_line import add_image_options, make_parser, parse, sgd_by_strategy
from image_data import ImageData
from models import mlp
from training import train_and_test

default_to_strategy = sgd_by_strategy(usual=(0.001, 0.99), downpour=(0.1, 0.0))


def main() -> None:
    parser = make_parser(__doc__, epochs=5, batch_size=128, lr=None, momentum=None)
    add_image_options(parser, validation=8800, models=("mlp",))
    args = parse(parser, default_to_strategy)
    pl.seed_everything(args.seed, verbose=False)
    train_and_test(args, "mnist", Classifier(mlp(), args.lr, args.momentum, args.seed), ImageData(args, "mnist"))


if __name__ == "__main__":
    main()
