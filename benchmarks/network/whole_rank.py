"""One rank of a whole training, which ``python -m benchmarks.network.whole`` starts in a network namespace."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from classifier import Classifier
from image_data import SOURCES, read
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from models import mlp
from shares import dealt_loader
from tensor_data import Labelled
from torch import Tensor

from benchmarks.network.whole_setups import SGD, WHOLE, make_whole_strategy
from benchmarks.shared.options import make_parser
from benchmarks.shared.trainer import make_trainer, quieten

BATCH = 32
"""Samples of a rank's batch."""


class Paced(Classifier):
    """The example's classifier, whose step takes as long as on a processor of its own, however few this host has.

    It sleeps for what its own computing leaves of a step, by its processor time; communication comes on top.

    Args:
        seconds: of a step.
        samples: of the training set.
        seed: see :class:`Classifier`.
        sgd: learning rate and momentum.
    """

    def __init__(self, seconds: float, samples: int, seed: int, sgd: tuple[float, float]) -> None:
        super().__init__(mlp(), lr=sgd[0], momentum=sgd[1], seed=seed)
        self.seconds, self.samples = seconds, samples
        self.seen: list[np.ndarray[Any, Any]] = []
        self.batches = 0
        self._own: float | None = None  # seconds of computing, a mean that forgets
        self._began = 0.0  # of this batch, by this thread's processor time

    def on_train_epoch_start(self) -> None:
        self.seen.append(np.zeros(self.samples, np.int64))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._began = time.thread_time()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, indices = batch
        self.seen[-1] += np.bincount(indices.numpy(), minlength=self.samples)
        self.batches += 1
        time.sleep(max(0.0, self.seconds - (self._own or 0.0)))
        return super().training_step((inputs, labels), batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        own = time.thread_time() - self._began
        self._own = own if self._own is None else 0.9 * self._own + 0.1 * own


class Clock(Callback):
    """Takes the time of the training, without what is built and tested after it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.monotonic() - self._began
        if trainer.is_global_zero:
            print(f"{self.seconds:5.0f} s: epoch {trainer.current_epoch + 1} of {trainer.max_epochs}", flush=True)


def train(args: Any) -> None:
    """Train, and write on rank 0 what is measured."""
    setup = WHOLE[args.setup]
    torch.set_num_threads(1)
    pl.seed_everything(args.seed, verbose=False)
    quieten()
    data, test = read(SOURCES["mnist"], args.data_dir)
    data = data.part(torch.arange(min(args.samples or len(data.labels), len(data.labels))))
    environment = TorchElasticEnvironment()
    seconds = args.step * (args.factor if environment.global_rank() == args.slow_rank else 1.0)
    module = Paced(seconds, len(data.labels), args.seed, SGD[setup.sgd])
    clock = Clock()
    trainer = make_trainer(
        devices=1,
        num_nodes=environment.world_size(),
        strategy=make_whole_strategy(args.setup, args.seed),
        plugins=[environment],
        max_epochs=args.epochs,
        use_distributed_sampler=True,
        callbacks=[clock],
    )

    def cut(indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (*data.part(indices), indices)

    trainer.fit(module, dealt_loader(len(data.labels), BATCH, cut))
    here = (clock.seconds, module.batches, module.seen)
    everybody: list[Any] = [None] * environment.world_size()
    dist.all_gather_object(everybody, here)
    if environment.global_rank() == 0:
        report(args, everybody, accuracy(module, test))


def report(args: Any, everybody: list[Any], tested: float) -> None:
    """Write what was measured on all ranks."""
    samples = everybody[0][2][0].size
    times = [sum(seen[epoch] for _, _, seen in everybody) for epoch in range(args.epochs)]
    batches = [count for _, count, _ in everybody]
    slow = batches.pop(args.slow_rank)
    result = {
        "seconds": max(seconds for seconds, _, _ in everybody),
        "accuracy": tested,
        "not_once": int(sum((count != 1).sum() for count in times)),
        "samples": samples,
        "batches_slow": slow,
        "batches_others": sum(batches) / len(batches),
    }
    args.out.write_text(json.dumps(result))


@torch.no_grad()
def accuracy(module: Classifier, test: Labelled) -> float:
    """Return the accuracy of what a rank holds after training: the consensus model."""
    module.eval()
    right = [
        (module.network(inputs).argmax(1) == labels).sum()
        for inputs, labels in zip(test.inputs.split(1000), test.labels.split(1000), strict=True)
    ]
    return float(sum(right)) / len(test.labels)


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--setup", choices=tuple(WHOLE), required=True)
    parser.add_argument("--factor", type=float, required=True)
    parser.add_argument("--slow-rank", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--step", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--data-dir", type=Path)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
