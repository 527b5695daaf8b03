"""``examples/mnist.py``; ``MORTAL=2,3:3`` in the environment kills ranks 2 and 3 at the start of epoch 3."""

from __future__ import annotations

import os
import signal

import lightning.pytorch as pl
import mnist
from classifier import Classifier
from command_line import add_image_options, make_parser, parse
from image_data import ImageData
from models import mlp
from training import train_and_test

import benchmarks  # noqa: F401  # the examples' modules


class Mortal(Classifier):
    def on_train_epoch_start(self) -> None:
        ranks, _, epoch = os.environ.get("MORTAL", ":-1").partition(":")
        if self.current_epoch == int(epoch) and str(self.global_rank) in ranks.split(","):
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_train_epoch_start()


def main() -> None:
    parser = make_parser(__doc__, epochs=10, batch_size=128, lr=None, momentum=None)
    add_image_options(parser, validation=8800, models=("mlp",))
    args = parse(parser, mnist.default_to_strategy)
    pl.seed_everything(args.seed, verbose=False)
    train_and_test(args, "mnist", Mortal(mlp(), args.lr, args.momentum, args.seed), ImageData(args, "mnist"))


if __name__ == "__main__":
    main()
