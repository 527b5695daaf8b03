"""The blocks, tasks and meters of the ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

from benchmarks.network import torchft_loop
from benchmarks.network.schemes import (
    DOWNPOUR,
    GOSSIP,
    OUTER_SETUPS,
    SETUPS,
    STALLING,
    TIMEOUT,
    TORCHFT,
    make_strategy,
)
from benchmarks.network.torchft_loop import TorchftSetup
from benchmarks.shared.namespaces import burst_bytes
from benchmarks.shared.plain_loop import PlainSetup
from benchmarks.shared.side_by_side import Block, LightningSetup, Meter, Plan, Setup, Values
from benchmarks.shared.workloads import Batch, Model, loss, nesterov
from lightning_gossip import DownpourStrategy
from lightning_gossip.strategies.clocked import ClockedStrategy
from lightning_gossip.strategies.pairwise import PairwiseStrategy

SLEEP = 0.02
"""Seconds of a step that sleeps."""
STALL_PROBABILITY = 0.1


class NetworkSetup(LightningSetup):
    """One of :data:`~benchmarks.network.schemes.SETUPS`, with blocks of its own length.

    Args:
        name: of it.
        steps: counted, a block: a multiple of the period.
        warm_up: steps before them; a whole period, so that as many exchanges end in the counted steps as begin there.
    """

    def __init__(self, name: str, steps: int, warm_up: int) -> None:
        super().__init__(name, lambda seed: make_strategy(name, seed))
        self.steps, self.warm_up = steps, warm_up

    def plan(self, plan: Plan) -> Plan:
        """See :meth:`Setup.plan`."""
        return replace(plan, steps=self.steps, warm_up=self.warm_up)

    def train(self, model: Model, data: Iterable[Batch], block: Block) -> None:
        """See :meth:`Setup.train`."""
        if isinstance(model, Sleeper):
            model.round = block.round
        super().train(model, data, block)


def rate_setups(megabits: float, payload: float, seconds: float = 3.0) -> list[Setup]:
    """Return all set-ups, with blocks of about ``seconds`` on links of ``megabits`` · 10⁶ bits a second.

    Args:
        megabits: of each rank's uplink, and downlink.
        payload: bytes of a snapshot.
        seconds: of the counted steps, where these are more than two and a period.
    """
    wire = payload * 8 / (megabits * 1e6)
    setups: list[Setup] = []
    for name in SETUPS:
        arguments = GOSSIP.get(name, {})
        period = DOWNPOUR["n_push"] if name == "downpour" else arguments.get("period", 1)
        transfer = 1.5 * wire if name == "ddp" else wire / period if name in GOSSIP else 0.0
        steps = max(2, period * round(seconds / (0.04 + transfer) / period), period)
        setups.append(NetworkSetup(name, steps, warm_up=max(2, period)))
    return setups


def outer_setups(steps: int = 64) -> list[Setup]:
    """Return the set-ups of :data:`~benchmarks.network.schemes.OUTER_SETUPS` that can run here.

    Args:
        steps: counted, a block: a multiple of all periods. DDP, whose steps are all alike, takes an eighth of them.
    """
    setups: list[Setup] = []
    for name in OUTER_SETUPS:
        if name in TORCHFT:
            if torchft_loop.is_installed():
                setups.append(TorchftSetup(name, "plain none", **TORCHFT[name], steps=steps, timeout=TIMEOUT))
        elif name == "plain none":
            setups.append(PlainSetup(name))
        elif name in ("ddp", "ddp, bfloat16"):
            setups.append(NetworkSetup(name, max(2, steps // 8), warm_up=2))
        else:
            setups.append(NetworkSetup(name, steps, warm_up=64 if "period 32" in name else 4))
    return setups


def sleeping_setups(steps: int = 384, warm_up: int = 64) -> list[Setup]:
    """Return the set-ups of the runs in which steps sleep; the same steps for all, and so the same stalls."""
    return [NetworkSetup(name, steps, warm_up) for name in STALLING]


class Sleeper(Model):
    """A small network whose step sleeps: every rank computes on a processor of its own, however few this host has.

    Args:
        factor: how many times as long a slow step takes.
        straggler: rank whose steps are all slow; without one, each rank's is with probability
            :data:`STALL_PROBABILITY`, by a draw that depends on round, rank and step alone.
    """

    def __init__(self, factor: float, straggler: int | None) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), nesterov)
        self.factor, self.straggler = factor, straggler
        self.round = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        time.sleep(self.seconds(self.global_rank, batch_idx))
        return loss(self.network(inputs), labels)

    def seconds(self, rank: int, step: int) -> float:
        """Return how long ``rank`` sleeps at ``step``."""
        if self.straggler is not None:
            slow = rank == self.straggler
        else:
            slow = np.random.default_rng([self.round, rank, step]).random() < STALL_PROBABILITY
        return SLEEP * (self.factor if slow else 1.0)


def sleeping_task(factor: float, straggler: int | None) -> tuple[Model, Batch]:
    """Return a :class:`Sleeper`, the same on every rank, and its batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return Sleeper(factor, straggler), (torch.randn(8, 64), torch.randint(10, (8,)))


class LinkMeter(Meter):
    """How much of a link's rate an exchange uses, all ranks exchanging and none computing; in set-ups of period 1.

    Payload over the seconds from before the snapshot is taken until all has arrived and left, as a share of the
    bucket's rate. Before each exchange the ranks meet and pause, so that every bucket is full, and a bucket's contents
    are subtracted from the payload.

    Args:
        megabits: of the link.
        exchanges: to take the mean of.
    """

    def __init__(self, megabits: float, exchanges: int = 3) -> None:
        self.megabits, self.exchanges = megabits, exchanges
        self._use: list[float] = []

    def start(self, trainer: Trainer | None) -> None:
        """See :meth:`Meter.start`; the replicas are still equal, and remain so."""
        self._use = []
        strategy = None if trainer is None else trainer.strategy
        if not isinstance(strategy, PairwiseStrategy) or strategy.exchange is None or strategy.schedule.period != 1:
            return
        exchange = strategy.exchange
        for _ in range(self.exchanges):
            sent = exchange.stats.bytes_sent
            dist.barrier()
            time.sleep(0.1)
            start = time.perf_counter()
            exchange.begin()
            exchange.arrive()
            seconds = time.perf_counter() - start
            exchange.end()
            if payload := exchange.stats.bytes_sent - sent:
                self._use.append((payload - burst_bytes(self.megabits)) * 8 / (self.megabits * 1e6 * seconds))

    def read(self, steps: int) -> Values:
        """See :meth:`Meter.read`."""
        return {"link_use": float(np.mean(self._use))} if self._use else {}


class TrafficMeter(Meter):
    """Payload that this rank sent; of the package's strategies."""

    def start(self, trainer: Trainer | None) -> None:
        """See :meth:`Meter.start`."""
        self._strategy = None if trainer is None else trainer.strategy

    def begin(self) -> None:
        """See :meth:`Meter.begin`."""
        self._bytes = self._sent()

    def end(self) -> None:
        """See :meth:`Meter.end`."""
        self._bytes = self._sent() - self._bytes

    def read(self, steps: int) -> Values:
        """See :meth:`Meter.read`."""
        counts = isinstance(self._strategy, (ClockedStrategy, DownpourStrategy))
        return {"payload_mb": self._bytes / steps / 1e6} if counts else {}

    def _sent(self) -> int:
        strategy = self._strategy
        if isinstance(strategy, DownpourStrategy):
            return 0 if strategy.downpour_stats is None else strategy.downpour_stats.bytes_sent
        if isinstance(strategy, ClockedStrategy) and strategy.exchange is not None:
            return int(strategy.exchange.stats.bytes_sent)
        return 0
