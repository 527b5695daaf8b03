"""Step times of several set-ups, side by side: short blocks of steps in turn, in the same processes.

A machine's speed wanders by more than what is to be measured, so only what ran within seconds of each other can be
compared. In every *round* each :class:`Setup` trains a fresh copy of the same model for one *block*: some steps to warm
up, the counted ones, and a few more, so that no rank's counted steps get the core of a rank that is through. The
order within a round is drawn anew, the same on all ranks. A set-up's ratio is taken to its reference in the same round;
one set-up that repeats the reference (A/A) shows the noise.

:func:`run_rank` is what one rank's process does. It needs torchrun's environment (``MASTER_ADDR``, ``MASTER_PORT``,
``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``) and does not care who started it: `ranks.py`, torchrun,
or `benchmarks.network`, which makes each rank a node of its own.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch.utils.data import DataLoader

from benchmarks.shared.trainer import make_trainer, quieten
from benchmarks.shared.workloads import Batch, Model, SameBatch
from lightning_gossip.exchange.asynchronous import AsynchronousExchange
from lightning_gossip.strategies.pairwise import PairwiseStrategy

Values = dict[str, float]
"""What one rank measured in one block; names end in their unit."""


@dataclass(frozen=True)
class Plan:
    """How blocks are cut.

    Attributes:
        steps: counted, a block; a multiple of every set-up's period.
        warm_up: steps before them.
        cool_down: steps after them, while slower ranks are still at theirs.
        seed: of the order of set-ups in each round.
        timeout: of every wait for another rank.
        accelerator: ``"cpu"`` or ``"cuda"``; counted steps begin and end when the device has done those before.
    """

    steps: int = 16
    warm_up: int = 4
    cool_down: int = 2
    seed: int = 0
    timeout: timedelta = timedelta(minutes=1)
    accelerator: str = "cpu"

    @property
    def total(self) -> int:
        """Steps of a block."""
        return self.warm_up + self.steps + self.cool_down

    def whole(self, period: int) -> Plan:
        """Return a plan with at least as many steps, whose counted steps are whole periods, after two to warm up.

        As many exchanges end in them as begin, however late they are applied, and links are made before.
        """
        if self.warm_up >= 2 * period and self.steps % period == 0:
            return self
        return replace(self, steps=-(-self.steps // period) * period, warm_up=max(self.warm_up, 2 * period))

    def order(self, round_: int, setups: int) -> list[int]:
        """Return the order in which the set-ups take their turns in a round."""
        return np.random.default_rng([self.seed, round_]).permutation(setups).tolist()


class Meter:
    """Measures something beside the step time; one object serves all blocks of a process."""

    def prepare(self) -> None:
        """Called before anything of a block is made."""

    def start(self, trainer: pl.Trainer | None) -> None:
        """Called before a block's first step; ``trainer`` is None in a plain loop."""

    def begin(self) -> None:
        """Called before the first counted step."""

    def end(self) -> None:
        """Called after the last counted step; other ranks may still be at theirs, so this has to be quick."""

    def read(self, steps: int) -> Values:
        """Called after the last step of the block: return what was measured over the ``steps`` counted steps."""
        return {}


@dataclass
class Block:
    """One block under way; whoever trains calls :meth:`start` once, and :meth:`tick` after each step."""

    plan: Plan
    round: int
    meters: Sequence[Meter]
    values: Values = field(default_factory=dict)
    _done: int = 0
    _clocks: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def start(self, trainer: pl.Trainer | None = None) -> None:
        """Begin the warm-up."""
        for meter in self.meters:
            meter.start(trainer)

    def tick(self) -> None:
        """Note that a step has ended."""
        self._done += 1
        if self.plan.accelerator == "cuda" and self._done in (self.plan.warm_up, self.plan.warm_up + self.plan.steps):
            torch.cuda.synchronize()
        if self._done == self.plan.warm_up:
            dist.barrier()
            for meter in self.meters:
                meter.begin()
            self._clocks = _clocks()
        elif self._done == self.plan.warm_up + self.plan.steps:
            wall, process, thread = (now - then for now, then in zip(_clocks(), self._clocks, strict=True))
            for meter in self.meters:
                meter.end()
            per_step = 1e3 / self.plan.steps
            self.values |= {
                "step_ms": wall * per_step,
                "cpu_ms": process * per_step,
                "helper_cpu_ms": (process - thread) * per_step,
            }
        elif self._done == self.plan.total:
            for meter in self.meters:
                self.values |= meter.read(self.plan.steps)


def _clocks() -> tuple[float, float, float]:
    """Return seconds: wall clock, CPU time of this process with all its threads, CPU time of this thread."""
    return time.perf_counter(), time.process_time(), time.thread_time()


class Setup(ABC):
    """One way to train.

    Args:
        name: of it.
        reference: name of the set-up that its step time is compared with.
    """

    def __init__(self, name: str, reference: str = "none") -> None:
        self.name = name
        self.reference = reference

    def plan(self, plan: Plan) -> Plan:
        """Return how this set-up's blocks are cut where all others' are cut by ``plan``."""
        return plan

    @abstractmethod
    def train(self, model: Model, data: Iterable[Batch], block: Block) -> None:
        """Train ``model`` for ``block.plan.total`` steps."""


class LightningSetup(Setup):
    """A ``Trainer.fit``.

    Args:
        name, reference: see :class:`Setup`.
        strategy: makes one, given the number of the round: a seed, so that rounds see different exchanges.
        callbacks: types of callbacks that are part of the set-up.
        whole: period by which blocks are cut, see :meth:`Plan.whole`; None for blocks as planned.
    """

    def __init__(
        self,
        name: str,
        strategy: Callable[[int], Strategy],
        reference: str = "none",
        callbacks: Sequence[type[Callback]] = (),
        whole: int | None = None,
    ) -> None:
        super().__init__(name, reference)
        self.strategy = strategy
        self.callbacks = callbacks
        self.whole = whole

    def plan(self, plan: Plan) -> Plan:
        """See :meth:`Setup.plan`."""
        return plan if self.whole is None else plan.whole(self.whole)

    def train(self, model: Model, data: Iterable[Batch], block: Block) -> None:
        """See :meth:`Setup.train`."""
        make_trainer(
            accelerator=block.plan.accelerator,
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            num_nodes=dist.get_world_size() // int(os.environ["LOCAL_WORLD_SIZE"]),
            strategy=self.strategy(block.round),
            plugins=[TorchElasticEnvironment()],
            max_steps=block.plan.total,
            callbacks=[*(callback() for callback in self.callbacks), _Ticker(block)],
        ).fit(model, DataLoader(data, batch_size=None))  # type: ignore[arg-type]


class _Ticker(Callback):
    def __init__(self, block: Block) -> None:
        self.block = block

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, PairwiseStrategy):
            make_links(trainer.strategy)
        self.block.start(trainer)

    def on_train_batch_end(self, *args: Any) -> None:
        self.block.tick()


def make_links(strategy: PairwiseStrategy) -> None:
    """Exchange until every two ranks have that ever do: links and buffers are made once in a training, uncounted here.

    It ends at a multiple of the period, and with equal replicas, as it began.
    """
    exchange, schedule, size = strategy.exchange, strategy.schedule, strategy.world_size
    if exchange is None:
        raise RuntimeError("links are made within `fit`")
    if isinstance(exchange, AsynchronousExchange):
        _make_links_at_own_pace(exchange, schedule.period)
        return
    met = np.eye(size, dtype=bool)
    quiet = 0  # rounds in a row in which nobody met anybody new: on a ring, not all ever do
    while exchange.step % schedule.period or not (met.all() or quiet > 50 * size):
        exchange.begin()
        exchange.end()
        if schedule.is_round(exchange.step):
            choices = schedule.choices(exchange.step, size)
            chose, pairs = np.flatnonzero(choices >= 0), met.sum()
            met[chose, choices[chose]] = met[choices[chose], chose] = True
            quiet = 0 if met.sum() > pairs else quiet + 1


def _make_links_at_own_pace(exchange: AsynchronousExchange, period: int, seconds: float = 3.0) -> None:
    """Exchange for some seconds, in which every rank asks every other many times."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or exchange.step % period:
        exchange.begin()
        time.sleep(0.002 / period)
        exchange.end()
    exchange.arrive()
    dist.barrier()


Report = Callable[[str, int, Values], None]
"""Called on rank 0 after each block: name of the set-up, number of the round, means over the ranks."""


def run_rank(
    setups: Sequence[Setup],
    model: Model,
    batch: Batch,
    rounds: Iterable[int],
    report: Report,
    plan: Plan = Plan(),
    meters: Sequence[Meter] = (),
    seconds: float = float("inf"),
) -> None:
    """Run all rounds on this rank; called on all ranks with the same arguments.

    Args:
        setups: what to compare.
        model: each block trains a copy of it.
        batch: this rank's data.
        rounds: their numbers.
        report: see :data:`Report`; a step's time is the mean over the ranks that are through, ``step_max_ms`` the
            slowest one's.
        plan: how blocks are cut.
        meters: what else to measure.
        seconds: after which no further round begins, by rank 0's clock.
    """
    began = time.monotonic()
    quieten()
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked through before every block
    dist.init_process_group("gloo", timeout=plan.timeout)
    try:
        for round_ in rounds:
            go_on = [time.monotonic() - began < seconds]
            dist.broadcast_object_list(go_on)
            if not go_on[0]:
                return
            for index in plan.order(round_, len(setups)):
                block = Block(setups[index].plan(plan), round_, meters)
                _release_memory()
                for meter in meters:
                    meter.prepare()
                setups[index].train(copy.deepcopy(model), SameBatch(batch), block)
                values: list[Values] = [{}] * dist.get_world_size()
                dist.all_gather_object(values, block.values)
                # where nobody waits for a slow rank, it may not be through when the others are
                if not (through := [of_rank for of_rank in values if of_rank]):
                    raise RuntimeError(f"{setups[index].name!r} trained for less than {block.plan.total} steps")
                if dist.get_rank() == 0:
                    report(setups[index].name, round_, over_ranks(through))
    finally:
        dist.destroy_process_group()


def over_ranks(values: Sequence[Values]) -> Values:
    """Return the means over the ranks that measured something, and the slowest rank's step time."""
    names = dict.fromkeys(name for rank in values for name in rank)
    means = {name: float(np.mean([rank[name] for rank in values if name in rank])) for name in names}
    return means | {"step_max_ms": max(rank["step_ms"] for rank in values)}


def _release_memory() -> None:
    """Give back what earlier blocks left in the heap, so that blocks are alike and memory can be compared."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
