"""Small trainings on a device, and the same by hand: all replicas in one process, the papers' rules in ten lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.shared.outer_replay import AllReduced, Gossip, Model, exactly
from lightning_gossip.rules.fragments import strided
from lightning_gossip.strategies.all_reduced import AllReducedStrategy
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
    """Return 8-32-32-32-1, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layers: list[nn.Module] = [nn.Linear(8, 32), nn.Tanh(), nn.Dropout(dropout)]
        layers += [nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)]
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
        self, world_size: int, strategy: PairwiseStrategy | AllReducedStrategy, alpha: float | str, steps: int = STEPS
    ) -> list[Tensor]:
        """Return each replica's parameters after so many steps.

        Args:
            world_size: number of replicas.
            strategy: its schedule, delay, wire dtype and outer step are the training's.
            alpha: of elastic gossip, or ``"pull"`` or ``"push"``; nothing to an all-reduced strategy.
            steps: to train.
        """
        nets = [network(self.dtype).to(self.device) for _ in range(world_size)]
        optimizers = [self.optimizer(net.parameters()) for net in nets]
        exchanges: Exchanges
        if isinstance(strategy, AllReducedStrategy):
            exchanges = AllReducedExchanges(nets, strategy)
        elif strategy.outer is not None and isinstance(alpha, float):
            exchanges = OuterExchanges(nets, strategy, alpha, steps)
        else:
            exchanges = PairwiseExchanges(nets, strategy, alpha)
        for step in range(1, steps + 1):
            exchanges.begin(step)
            for rank, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                self._step(net, optimizer, Batches(rank, self.dtype).at(step))
            exchanges.end(step)
        exchanges.settle()
        return [flat(net) for net in nets]

    def _step(self, net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        x, y = (part.to(self.device) for part in batch)
        cast = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with cast:
            loss = mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Exchanges(Protocol):
    """What is done with all replicas around a step, and at the end of training with what is under way."""

    def begin(self, step: int) -> None: ...
    def end(self, step: int) -> None: ...
    def settle(self) -> None: ...


class PairwiseExchanges:
    """Elastic gossip and gossiping SGD."""

    def __init__(self, nets: Sequence[nn.Module], strategy: PairwiseStrategy, alpha: float | str) -> None:
        self.nets, self.strategy, self.alpha = nets, strategy, alpha
        self.under_way: dict[int, list[Tensor]] = {}  # corrections by the step at whose end they are applied

    def begin(self, step: int) -> None:
        """Note what the snapshots say."""
        if self.strategy.schedule.is_round(step):
            choices = self.strategy.schedule.choices(step, len(self.nets))
            sent = [flat(net) for net in self.nets]
            if self.strategy.wire_dtype is not None:
                sent = [snapshot.to(self.strategy.wire_dtype).to(snapshot.dtype) for snapshot in sent]
            self.under_way[step + self.strategy.delay] = corrections(sent, choices, self.alpha)

    def end(self, step: int) -> None:
        """Subtract what is due."""
        for net, correction in zip(self.nets, self.under_way.pop(step, ()), strict=False):
            nn.utils.vector_to_parameters(flat(net) - correction, net.parameters())

    def settle(self) -> None:
        """Subtract what is left."""
        for step in sorted(self.under_way):
            self.end(step)


class ReplayedExchanges(ABC):
    """Outer steps, which are made on the host, by a replay."""

    nets: Sequence[nn.Module]
    replay: Gossip | AllReduced

    def begin(self, step: int) -> None:
        """See the replay."""
        self.replay.begin(step, self._theta())

    def end(self, step: int) -> None:
        """See the replay."""
        self._change(lambda theta: self.replay.end(step, theta))

    def settle(self) -> None:
        """See the replay."""
        self._change(self.replay.settle)

    @torch.no_grad()
    def _change(self, change: Callable[[Any], None]) -> None:
        change(theta := self._theta())
        self._take(theta)

    @abstractmethod
    def _theta(self) -> Any:
        """Return all replicas' parameters, as the replay has them."""

    @abstractmethod
    def _take(self, theta: Any) -> None:
        """Write them into the replicas."""


class OuterExchanges(ReplayedExchanges):
    """Elastic gossip with an outer step, which is made on the host."""

    def __init__(self, nets: Sequence[nn.Module], strategy: PairwiseStrategy, alpha: float, steps: int) -> None:
        assert strategy.outer is not None
        schedule = strategy.schedule
        rounds = [step for step in range(1, steps + 1) if schedule.is_round(step)]
        self.nets = nets
        self.replay = Gossip(
            list(self._theta()),
            {step: schedule.choices(step, len(nets)).copy() for step in rounds},
            alpha=alpha,
            lr=strategy.outer.lr,
            momentum=strategy.outer.momentum,
            delay=strategy.delay,
            rounding=_rounding(strategy.wire_dtype),
        )

    def _theta(self) -> np.ndarray:
        return np.stack([flat(net).cpu().numpy() for net in self.nets])

    def _take(self, theta: np.ndarray) -> None:
        for net, row in zip(self.nets, theta, strict=True):
            own = next(net.parameters())
            nn.utils.vector_to_parameters(torch.from_numpy(row).to(own), net.parameters())


class AllReducedExchanges(ReplayedExchanges):
    """LocalSGD and DiLoCo, whose outer step is made on the host."""

    def __init__(self, nets: Sequence[nn.Module], strategy: AllReducedStrategy) -> None:
        self.nets = nets
        initial = self._theta()[0]
        dealt = strided({name: value.size for name, value in initial.items()}, strategy.fragments)
        self.replay = AllReduced(
            initial,
            len(nets),
            period=strategy.period,
            lr=strategy.outer.lr,
            momentum=strategy.outer.momentum,
            delay=strategy.delay,
            parts={name: part for part, names in enumerate(dealt) for name in names},
            fragments=strategy.fragments,
            rounding=_rounding(strategy.wire_dtype),
        )

    def _theta(self) -> list[Model]:
        return [{name: p.detach().cpu().numpy().copy() for name, p in net.named_parameters()} for net in self.nets]

    def _take(self, theta: list[Model]) -> None:
        for net, values in zip(self.nets, theta, strict=True):
            for name, parameter in net.named_parameters():
                parameter.copy_(torch.from_numpy(values[name]))


def _rounding(wire_dtype: torch.dtype | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return what rounds to the wire as torch does, by way of float32."""

    def round_(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).to(wire_dtype).double().numpy()

    return exactly if wire_dtype is None else round_


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
