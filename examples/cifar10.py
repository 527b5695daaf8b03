"""Train a convolutional network on CIFAR-10 with replicas that gossip, or talk to a parameter server.

python examples/cifar10.py --devices 4
python examples/cifar10.py --devices 3 --strategy downpour --data-shares whole --batch-size 192 --n-push 3 --n-pull 3

alexnet: the DistBelief project's set-up: plain SGD, learning rate 0.1, under downpour divided by --n-push.
preact_resnet18: that of arXiv:1812.02407: Nesterov momentum 0.9, learning rate 0.01, halved at epochs 15, 30 and 40
of 50, random crops and flips of the training images (the thesis augments the validation images too; we do not).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from classifier import Classifier
from command_line import add_image_options, downpour_lr, make_parser, parse
from image_data import ImageData
from models import alexnet, crop_and_flip, preact_resnet18
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau
from training import train_and_test

MODELS = {"alexnet": alexnet, "preact_resnet18": preact_resnet18}
SCHEDULES = ("constant", "milestones", "plateau")


def default_to_model(args: argparse.Namespace) -> None:
    """Fill in the options left out, by model and strategy; raise ``ValueError`` for a bad --n-push."""
    resnet = args.model == "preact_resnet18"
    plain = downpour_lr(0.1, args.n_push) if args.strategy == "downpour" else 0.1
    defaults = {
        "lr": 0.01 if resnet else plain,
        "momentum": 0.9 if resnet else 0.0,
        "epochs": 50 if resnet else 20,
        "schedule": "milestones" if resnet else "plateau",
        "augment": resnet,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def make_schedule(name: str) -> Callable[[Optimizer], Any] | None:
    """Return what makes the scheduler of a learning rate, None for a constant one."""
    return {
        "constant": None,
        "milestones": lambda optimizer: MultiStepLR(optimizer, [15, 30, 40], gamma=0.5),
        "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.1, patience=1, min_lr=1e-3),
    }[name]


def main() -> None:
    parser = make_parser(__doc__, batch_size=128, lr=None, momentum=None, epochs=None)
    add_image_options(parser, validation=5200, models=tuple(MODELS))
    add = parser.add_argument_group("of this example; None: by the model").add_argument
    add(
        "--schedule",
        choices=SCHEDULES,
        help="of the learning rate. milestones: halved at epochs 15, 30 and 40; plateau: a tenth, not below"
        " 0.001, where the validation loss of the replica has not fallen for two epochs",
    )
    add("--augment", action=argparse.BooleanOptionalAction, help="random crops and flips of the training images")
    args = parse(parser, default_to_model)
    pl.seed_everything(args.seed, verbose=False)
    model = Classifier(
        MODELS[args.model](),
        args.lr,
        args.momentum,
        args.seed,
        augment=crop_and_flip if args.augment else None,
        schedule=make_schedule(args.schedule),
    )
    train_and_test(args, "cifar10", model, ImageData(args, "cifar10"))


if __name__ == "__main__":
    main()
