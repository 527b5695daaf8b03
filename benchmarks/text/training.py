"""One training of the example's model on text: what its consensus and its replicas are worth, and what was sent."""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from language_model import SIZES, LanguageModel
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from text_data import TextData
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.shared.trainer import make_trainer, quieten
from benchmarks.text import links
from benchmarks.text.schemes import Row

EVERY = 50
"""Updates from one look at the consensus to the next; the replicas are looked at half as often."""
WINDOWS = 256
"""Of held-out text, the same for all trainings, evenly spread over what is held out for validation."""
TEXT_BYTES = 8 * 2**20
"""Of the standard library at most: no rank sees a window twice."""


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison have in common.

    Args:
        model: of the example's ``SIZES``.
        lr: AdamW's, after the warm-up.
        steps: updates.
        batch: windows an update, over all ranks: the budget of text is the same whatever the number of ranks.
        context: bytes of a window.
        seed: of weights, order of the text, and partners.
    """

    model: str
    lr: float
    steps: int
    batch: int
    context: int
    seed: int

    def data(self, ranks_share: str = "contiguous") -> TextData:
        """Return the text; each rank walks through a stretch of its own."""
        options = argparse.Namespace(
            data_dir=None, text_bytes=TEXT_BYTES, batch_size=self.batch, data_shares=ranks_share, seed=self.seed
        )
        return TextData(options, self.context)


@dataclass
class Point:
    """A look at a training.

    Attributes:
        updates: so far.
        loss: of the consensus model, in nats a byte.
        replicas: losses of all, or none.
        distance: consensus distance, relative.
        mb_sent: by a rank so far, the mean.
    """

    updates: int
    loss: float
    replicas: list[float]
    distance: float
    mb_sent: float


class Watch(Callback):
    """Looks at the consensus and at the replicas every now and then; all ranks take part.

    Args:
        row: what is trained.
        data: with the held-out text.
    """

    def __init__(self, row: Row, data: TextData) -> None:
        self.row, self.data = row, data
        self.points: list[Point] = []
        self.cpu_seconds = 0.0  # of training, this rank's, all threads
        self._begin = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        held_out, context = self.data.split.validation, self.data.context
        chosen = held_out[torch.linspace(0, len(held_out) - 1, WINDOWS).long()]
        begins = chosen.tolist()
        text = [torch.from_numpy(self.data.data[b * context : (b + 1) * context + 1].copy()) for b in begins]
        self._held_out = torch.stack(text)
        self._consensus = copy.deepcopy(pl_module.network)
        self._look(trainer, pl_module.network, replicas=False)
        self._begin = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        updates = trainer.global_step
        if updates % EVERY == 0:
            self.cpu_seconds += time.process_time() - self._begin
            self._look(trainer, pl_module.network, replicas=updates % (2 * EVERY) == 0)
            self._begin = time.process_time()

    @torch.no_grad()
    def _look(self, trainer: pl.Trainer, network: nn.Module, replicas: bool) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own = parameters_to_vector(network.parameters())
        mean = own.clone()
        dist.all_reduce(mean)
        mean /= ranks
        every = [0.0] * ranks if replicas else []
        if replicas:
            dist.all_gather_object(every, summed_loss(network, self._held_out) / WINDOWS)
        vector_to_parameters(mean, self._consensus.parameters())
        sums = torch.tensor([
            (own - mean).double().square().sum().item(),
            summed_loss(self._consensus, self._held_out[rank::ranks]),
            links.bytes_sent(self.row, trainer, own.numel() * own.element_size()),
        ], dtype=torch.float64)  # fmt: skip
        dist.all_reduce(sums)
        square, loss, sent = sums.tolist()
        distance = (square / ranks) ** 0.5 / mean.double().norm().item()
        self.points.append(Point(trainer.global_step, loss / WINDOWS, every, distance, sent / ranks / 1e6))


def summed_loss(network: nn.Module, windows: Tensor) -> float:
    """Return the sum over windows of their mean losses; shape ``(windows, context + 1)``, uint8."""
    total = 0.0
    for some in windows.long().split(64):
        total += cross_entropy(network(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten()).item() * len(some)
    return total


def train(row: Row, setting: Setting, report: Callable[[dict[str, Any], list[Point]], None]) -> None:
    """Train on this rank; torchrun's environment says which. Rank 0 calls ``report`` with figures and the curve."""
    quieten()
    torch.set_num_threads(1)
    pl.seed_everything(setting.seed, verbose=False)
    size = SIZES[setting.model]
    model, data = LanguageModel(size, setting.lr), setting.data()
    watch = Watch(row, data)
    trainer = make_trainer(
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=row.strategy(setting.seed),
        plugins=[TorchElasticEnvironment()],
        max_steps=setting.steps,
        limit_val_batches=0,
        callbacks=[watch],
    )
    begin = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - begin
    if dist.get_rank() == 0:
        last = watch.points[-1]
        figures = {
            "loss": last.loss,
            "replica_mean": sum(last.replicas) / len(last.replicas),
            "replica_min": min(last.replicas),
            "replica_max": max(last.replicas),
            "distance": last.distance,
            "mb_sent": last.mb_sent,
            "cpu_ms": 1e3 * watch.cpu_seconds / setting.steps,
            "seconds": seconds,
        }
        report(figures, watch.points)
    dist.barrier()


def as_columns(point: Point) -> dict[str, Any]:
    """Return a point as it stands in a file: the replicas' losses in one column."""
    return asdict(point) | {"replicas": " ".join(f"{loss:.5f}" for loss in point.replicas)}
