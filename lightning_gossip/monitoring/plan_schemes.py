"""What each scheme would do on links and machines that are described: time, bytes, consensus distance, memory.

Time and distances are those of :mod:`~lightning_gossip.rules.simulation` and, where nobody waits, of
:mod:`~lightning_gossip.exchange.events`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lightning_gossip.arguments import check_integer, check_number, check_wire_dtype
from lightning_gossip.exchange.events import Events
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.simulation import Clocks, Replicas, Setting, Uneven, all_reduce_step, growth, simulate

SIMULATED_RANKS = 64
"""At most; beyond it neither distance nor time of random pairs grows (`benchmarks.scale`)."""
ROUNDS = 64
"""That are simulated; the second half of them counts."""
DIMENSION = 64
"""Of the vectors that stand for replicas by step."""
FINEST = 32
"""Steps that an exchange is simulated in, at least, where nobody waits: of more than twice as many several are one."""

# A rank's own processor time for a byte, in seconds: medians of benchmarks/results/exchange.csv and exchange_outer.csv
MIXED = 0.40e-9  # of parameters: snapshot and mixing
CARRIED = 0.55e-9  # that travels: into the kernel, and another out of it
REDUCED = 0.75e-9  # that DDP sends
AVERAGED = 1.8e-9  # that a round of LocalSGD or DiLoCo sends
TRIP = 1.3e-9  # of Downpour's round trip; counted: 12 passes over memory where MIXED has 6, and CARRIED


@dataclass(frozen=True)
class Workload:
    """A training and where it is to run.

    Args:
        parameters: number of them that train.
        nbytes: of them; None for 4 each.
        ranks: number of replicas.
        mbit: 10⁶ bits a second of a rank's uplink, and of its downlink.
        latency_ms: from one rank to another.
        step_ms: of a step without communication.
        straggler: how many times as long the steps of one rank take.
        wire_dtype: as of the strategies.
        cores_per_rank: below 1 ranks share cores, and what an exchange copies takes as much longer.

    Raises:
        ValueError: if a value is not allowed.
    """

    parameters: int
    ranks: int
    mbit: float
    step_ms: float
    latency_ms: float = 0.1
    straggler: float = 1.0
    wire_dtype: torch.dtype | str | None = None
    cores_per_rank: float = 1.0
    nbytes: int | None = None

    def __post_init__(self) -> None:
        check_integer("parameters", self.parameters, low=1)
        check_integer("ranks", self.ranks, low=2)
        check_number("mbit", self.mbit, low=0, open_low=True)
        check_number("step_ms", self.step_ms, low=0, open_low=True)
        check_number("latency_ms", self.latency_ms, low=0)
        check_number("straggler", self.straggler, low=1)
        check_wire_dtype("wire_dtype", self.wire_dtype)
        check_number("cores_per_rank", self.cores_per_rank, low=0, open_low=True)

    @property
    def size(self) -> int:
        """Bytes of the parameters."""
        return 4 * self.parameters if self.nbytes is None else self.nbytes

    @property
    def payload(self) -> int:
        """Bytes of them on the wire."""
        dtype = check_wire_dtype("wire_dtype", self.wire_dtype)
        return self.size if dtype is None else min(self.size, self.parameters * dtype.itemsize)

    @property
    def all_reduced(self) -> float:
        """What a rank sends in an all-reduce, in sizes of what is reduced."""
        return 2 * (self.ranks - 1) / self.ranks

    @property
    def alone(self) -> float:
        """Seconds of a step that waits for nobody, on the mean over ranks."""
        return self.mean(self.step_ms / 1e3, self.slowest)

    @property
    def rate_alone(self) -> float:
        """Steps a second without communication, on the mean over ranks."""
        return self.mean(1e3 / self.step_ms, 1 / self.slowest)

    @property
    def slowest(self) -> float:
        """Seconds of the slowest rank's step."""
        return self.straggler * self.step_ms / 1e3

    def mean(self, others: float, slow: float) -> float:
        """Return the mean over ranks of what one has, the slow one, and all others."""
        return (slow + (self.ranks - 1) * others) / self.ranks

    def own(self, seconds: float) -> float:
        """Return how long so much processor time takes, where ranks may share cores."""
        return seconds * max(1.0, 1 / self.cores_per_rank)

    @cached_property
    def machine(self) -> Uneven:
        """The model of time, for as many ranks as are simulated."""
        others = min(self.ranks, SIMULATED_RANKS) - 1
        return Uneven(
            compute=self.step_ms / 1e3,
            payload=self.payload,
            bandwidth=self.mbit * 1e6,
            latency=self.latency_ms / 1e3,
            exchange=self.own(MIXED * self.size + CARRIED * self.payload),
            speeds=(self.straggler, *(1.0 for _ in range(others))),
        )


@dataclass(frozen=True)
class Outlook:
    """What becomes of a scheme.

    Args:
        step: seconds of a step, on the mean over ranks.
        rate: steps a second, on the mean over ranks.
        waited: share of a rank's time in which it waits for a link or another rank, on the mean.
        sent: bytes a second that a rank sends, on the mean.
        distance: of replicas from their mean at the ends of steps, in what a step moves a replica by; None where
            the model does not know it.
        memory: bytes that a rank keeps beside model, gradients and optimizer.
    """

    step: float
    rate: float
    waited: float
    sent: float
    distance: float | None
    memory: float


class Scheme(ABC):
    """A strategy and its arguments."""

    reproducible = True
    """Whether it does not depend on the order of events."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in tables."""

    @property
    @abstractmethod
    def code(self) -> str:
        """The strategy, as it is written in a program."""

    @abstractmethod
    def outlook(self, workload: Workload) -> Outlook:
        """Compute what becomes of it."""


class AllReduced(Scheme):
    """Lightning's DDP: an all-reduce of the gradients at every step, under the backward pass as far as it fits."""

    name = "DDP"
    code = '"ddp"'

    def outlook(self, workload: Workload) -> Outlook:
        """See :meth:`Scheme.outlook`."""
        sent = workload.all_reduced * workload.size
        own = workload.own(REDUCED * sent)
        machine = replace(workload.machine, payload=workload.size)
        step = float(all_reduce_step(machine, workload.ranks, steps=1)) + own
        waited = 1 - (workload.alone + own) / step
        return Outlook(step, 1 / step, waited, sent / step, 0.0, workload.size)


@dataclass(frozen=True)
class Gossip(Scheme):
    """Elastic gossip between random pairs, by step.

    Memory: a snapshot, and what is received.
    """

    period: int
    delay: int = 0

    @property
    def name(self) -> str:
        """See :attr:`Scheme.name`."""
        return f"gossip, period {self.period}" + (f", delay {self.delay}" if self.delay else "")

    @property
    def code(self) -> str:
        """See :attr:`Scheme.code`."""
        return f"ElasticGossipStrategy(period={self.period}{f', delay={self.delay}' if self.delay else ''})"

    def outlook(self, workload: Workload) -> Outlook:
        """See :meth:`Scheme.outlook`."""
        machine = workload.machine
        ranks = len(machine.speeds)
        clocks = Clocks(ranks, machine)
        replicas = Replicas(torch.zeros(ranks, DIMENSION, dtype=torch.float64), noise=1.0, rule=ElasticMixing(0.5))
        setting = Setting("matching", period=self.period, delay=self.delay)
        payloads = simulate(setting, ranks, ROUNDS * self.period, [clocks, replicas])
        step = growth(clocks.means)
        waited = max(0.0, 1 - (workload.alone + payloads * machine.exchange) / step)
        sent = payloads * workload.payload
        return Outlook(step, 1 / step, waited, sent / step, _late(replicas.distances), 2 * workload.payload)


@dataclass(frozen=True)
class Asynchronous(Scheme):
    """Elastic gossip at each rank's own pace.

    Memory: a snapshot, and what is received.
    """

    period: int
    reproducible = False

    @property
    def name(self) -> str:
        """See :attr:`Scheme.name`."""
        return f"asynchronous, period {self.period}"

    @property
    def code(self) -> str:
        """See :attr:`Scheme.code`."""
        return f"ElasticGossipStrategy(period={self.period}, asynchronous=True)"

    def outlook(self, workload: Workload) -> Outlook:
        """See :meth:`Scheme.outlook`."""
        machine = workload.machine
        lasting = (machine.transfer + machine.latency) / machine.compute  # an exchange, in steps
        merged = max(1, int(lasting / FINEST))
        coarse = replace(machine, compute=merged * machine.compute)
        period = max(1, round(self.period / merged))
        events = Events(Setting("matching", period=period), coarse, noise=math.sqrt(merged))
        events.run(ROUNDS / 2 * max(period, math.ceil(lasting / merged)) * coarse.compute)
        payloads = sum(rank.exchanges for rank in events.ranks) / sum(rank.step for rank in events.ranks) / merged
        own = payloads * machine.exchange
        others, slow = machine.compute + own, workload.slowest + own
        rate = workload.mean(1 / others, 1 / slow)
        sent = rate * payloads * workload.payload
        return Outlook(workload.mean(others, slow), rate, 0.0, sent, _late(events.distances), 2 * workload.payload)


@dataclass(frozen=True)
class Outer(Scheme):
    """LocalSGD, or DiLoCo: a round of all ranks every ``period`` steps, beside the step at which it begins.

    Memory: the common start, a momentum for DiLoCo, the drift (rounded once more for a narrower wire), and room for
    the mean.
    """

    strategy: str
    copies: int
    period: int

    @property
    def name(self) -> str:
        """See :attr:`Scheme.name`."""
        return f"{self.strategy}, period {self.period}"

    @property
    def code(self) -> str:
        """See :attr:`Scheme.code`."""
        return f"{self.strategy}Strategy(period={self.period})"

    def outlook(self, workload: Workload) -> Outlook:
        """See :meth:`Scheme.outlook`."""
        machine, sent = workload.machine, workload.all_reduced * workload.payload
        own = workload.own(AVERAGED * sent)
        transfer = workload.all_reduced * machine.transfer + 2 * machine.latency
        late = max(0.0, transfer - workload.slowest)
        step = workload.slowest + (own + late) / self.period
        waited = 1 - (workload.alone + own / self.period) / step
        drifting = (self.period - 1) / 2  # steps since all were alike, on the mean
        distance = math.sqrt(drifting * (1 - 1 / workload.ranks))
        narrower = workload.payload if workload.payload < workload.size else 0
        memory = (self.copies + 1) * workload.size + workload.payload + narrower
        return Outlook(step, 1 / step, waited, sent / self.period / step, distance, memory)


@dataclass(frozen=True)
class Downpour(Scheme):
    """Workers that push to a server, whose link is like theirs, and pull from it.

    What the links do not carry travels later, summed up. Memory: a reference, what is pushed, and what is received;
    the server keeps a model more.
    """

    period: int
    reproducible = False

    @property
    def name(self) -> str:
        """See :attr:`Scheme.name`."""
        return f"Downpour, every {self.period}"

    @property
    def code(self) -> str:
        """See :attr:`Scheme.code`."""
        return f"DownpourStrategy(n_push={self.period}, n_pull={self.period})"

    def outlook(self, workload: Workload) -> Outlook:
        """See :meth:`Scheme.outlook`."""
        machine = replace(workload.machine, payload=workload.size)
        trip = max(2, workload.ranks) * machine.transfer + 2 * machine.latency  # there and back, others beside it
        pushes = 1 / (self.period * math.ceil(trip / (self.period * machine.compute)))  # one at a time
        own = pushes * workload.own(TRIP * workload.size)
        others, slow = machine.compute + own, workload.slowest + own
        rate = workload.mean(1 / others, 1 / slow)
        return Outlook(workload.mean(others, slow), rate, 0.0, rate * pushes * workload.size, None, 3 * workload.size)


SCHEMES: Sequence[Scheme] = (
    AllReduced(),
    *(Gossip(1), Gossip(8), Gossip(8, 7), Gossip(32), Gossip(32, 31)),
    *(Asynchronous(1), Asynchronous(8), Asynchronous(32)),
    *(Outer(name, copies, period) for name, copies in (("LocalSGD", 1), ("DiLoCo", 2)) for period in (32, 128)),
    Downpour(8),
)
"""Those that are compared."""


def _late(distances: Sequence[float]) -> float:
    """Return the root mean square of the second half."""
    tail = distances[len(distances) // 2 :]
    return math.sqrt(sum(distance * distance for distance in tail) / len(tail))
