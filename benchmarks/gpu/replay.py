"""Small trainings on a device, and the same by hand: all replicas in one process, the papers' rules in ten lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from lightning_gossip.strategies.pairwise import PairwiseStrategy

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
STEPS = 12


class Batches(IterableDataset[Batch]):
    """The batches of one rank, one a step: drawn on the host from the rank's number and the step's."""

    def __init__(self, rank: int, dtype: torch.dtype, steps: int = STEPS) -> None:
        self.rank, self.dtype, self.steps = rank, dtype, steps

    def at(self, step: int) -> Batch:
        """Return the batch of a step, from 1."""
        generator = torch.Generator().manual_seed(1000 * self.rank + step)
        x = torch.randn(16, 8, dtype=self.dtype, generator=generator)
        return x, x.sum(1, keepdim=True).sin() + self.rank

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.at(step) for step in range(1, self.steps + 1)])

    def loader(self) -> DataLoader[Batch]:
        """Return them for a Trainer."""
        return DataLoader(self, batch_size=None)


def network(dtype: torch.dtype, dropout: float = 0.0) -> nn.Module:
    """Return 8-32-32-1, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layers = [nn.Linear(8, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)]
        return nn.Sequential(*layers).to(dtype)


class Regression(pl.LightningModule):
    """Least squares."""

    def __init__(self, dtype: torch.dtype, optimizer: MakeOptimizer, dropout: float = 0.0) -> None:
        super().__init__()
        self.network = network(dtype, dropout)
        self.optimizer = optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return mse_loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def flat(module: nn.Module) -> Tensor:
    """Return a copy of all parameters, 1-D."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@dataclass
class Replicas:
    """All replicas of a training, in this process.

    Attributes:
        device: on which they are.
        dtype: of parameters and data.
        optimizer: makes one.
        autocast: dtype of the layers' products; None for the parameters' own.
    """

    device: torch.device
    dtype: torch.dtype
    optimizer: MakeOptimizer
    autocast: torch.dtype | None = None

    def train(
        self, world_size: int, strategy: PairwiseStrategy, alpha: float | str, steps: int = STEPS
    ) -> list[Tensor]:
        """Return each replica's parameters after so many steps.

        Args:
            world_size: number of replicas.
            strategy: its schedule, delay and wire dtype are the training's.
            alpha: of elastic gossip, or ``"pull"`` or ``"push"``.
            steps: to train.
        """
        nets = [network(self.dtype).to(self.device) for _ in range(world_size)]
        optimizers = [self.optimizer(net.parameters()) for net in nets]
        under_way: dict[int, list[Tensor]] = {}  # corrections by the step at whose end they are applied
        for step in range(1, steps + 1):
            if strategy.schedule.is_round(step):
                choices = strategy.schedule.choices(step, world_size)
                sent = [flat(net) for net in nets]
                if strategy.wire_dtype is not None:
                    sent = [snapshot.to(strategy.wire_dtype).to(self.dtype) for snapshot in sent]
                under_way[step + strategy.delay] = corrections(sent, choices, alpha)
            for rank, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                self._step(net, optimizer, Batches(rank, self.dtype).at(step))
            for net, correction in zip(nets, under_way.pop(step, ()), strict=False):
                nn.utils.vector_to_parameters(flat(net) - correction, net.parameters())
        for left in under_way.values():  # the end of training settles what is under way
            for net, correction in zip(nets, left, strict=True):
                nn.utils.vector_to_parameters(flat(net) - correction, net.parameters())
        return [flat(net) for net in nets]

    def _step(self, net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        x, y = (part.to(self.device) for part in batch)
        cast = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with cast:
            loss = mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def corrections(sent: Sequence[Tensor], choices: Sequence[int] | Any, alpha: float | str) -> list[Tensor]:
    """Return what each replica subtracts: α Σ_{k ∈ K_i} (s_i − s_k), or gossiping SGD's ½ and 1/(c + 1)."""
    found = []
    for rank, own in enumerate(sent):
        chosen = [int(choices[rank])] if choices[rank] >= 0 else []
        choosers = [k for k in range(len(sent)) if choices[k] == rank]
        partners = {"pull": chosen, "push": choosers}.get(str(alpha), sorted({*chosen, *choosers}))
        weight = alpha if isinstance(alpha, float) else 1 / (len(partners) + 1)
        found.append(weight * sum(((own - sent[k]) for k in partners), torch.zeros_like(own)))
    return found
