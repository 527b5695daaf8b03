"""The experiments on accuracy: a network on a data set each, Iris, MNIST and CIFAR-10."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from image_data import ImageData
from iris import Iris
from models import alexnet, mlp
from tensor_data import Sets
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau


@dataclass(frozen=True)
class Experiment:
    """A network on a data set, and the defaults of its command line.

    Attributes:
        load: returns the sets, given the seed and ``--data-dir``.
        network: makes one.
        shares: of the training set, see ``examples/shares.py``.
        batch: of the single process.
        lr, momentum: of the single process' SGD.
        n_push: steps from one push to the next, and from one pull to the next.
        schedule: of the learning rate, given the optimizer; stepped at every validation.
        curves: whether the model is measured during training.
    """

    load: Callable[[int, Path | None], Sets]
    network: Callable[[], nn.Module]
    shares: str
    batch: int
    lr: float
    momentum: float
    n_push: int
    epochs: int
    workers: tuple[int, ...]
    seeds: tuple[int, ...]
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    curves: bool = True


def load_iris(seed: int, data_dir: Path | None) -> Sets:
    return Iris(argparse.Namespace(seed=seed)).load()


def load_images(source: str, held_out: int, seed: int, data_dir: Path | None) -> Sets:
    options = argparse.Namespace(seed=seed, data_dir=data_dir, validation=held_out, validate_on="validation")
    data = ImageData(options, source)
    data.prepare_data()
    return data.load()


EXPERIMENTS = {
    "iris": Experiment(
        load=load_iris,
        network=lambda: nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)),
        shares="fixed",
        batch=4,
        lr=0.03,
        momentum=0.9,
        n_push=5,
        epochs=20,
        workers=(1, 2, 4),
        seeds=tuple(range(20)),
        curves=False,
    ),
    "mnist": Experiment(
        load=partial(load_images, "mnist", 5000),
        network=mlp,
        shares="whole",
        batch=64,
        lr=0.1,
        momentum=0.0,
        n_push=5,
        epochs=25,
        workers=(1, 3, 2),
        seeds=(1234,),
    ),
    "cifar10": Experiment(
        load=partial(load_images, "cifar10", 5000),
        network=alexnet,
        shares="whole",
        batch=64,
        lr=0.1,
        momentum=0.0,
        n_push=3,
        epochs=20,
        workers=(1, 3, 2),
        seeds=(1234, 1235, 1236),
        schedule=partial(ReduceLROnPlateau, patience=1, min_lr=1e-3),
    ),
}
