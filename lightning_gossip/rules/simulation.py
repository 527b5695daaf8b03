"""Replicas and clocks of many ranks, moved by the package's own schedule and mixing rule.

No parameters are trained and nothing is sent: replicas are short random vectors, time is computed. Whatever the number
of ranks, who exchanges with whom, and what is made of it, come from :mod:`~lightning_gossip.rules.schedule` and
:mod:`~lightning_gossip.rules.mixing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, mix
from lightning_gossip.rules.schedule import Schedule

Seconds = NDArray[np.float64]
"""One number a rank; shape ``(ranks,)``."""

TCP_SHARE = 1448 / 1514
"""Of what an Ethernet link carries in full frames of 1,500 bytes, the share that is payload of TCP."""

BACKWARD_SHARE = 2 / 3
"""Of a step's computing, the share in which gradients come out and an all-reduce can run."""

SNAPSHOT_SHARE, MIXING_SHARE = 0.2, 0.4
"""Of a rank's own time for an exchange over TCP (the parts in the table of `benchmarks.exchange`): what comes before
the transfer, and after it. The rest, copies into and out of the kernel, runs beside it."""


@dataclass(frozen=True)
class Setting:
    """A gossip run.

    Args:
        peers, probability, period, delay: as of ``ElasticGossipStrategy``.
        alpha: α of elastic gossip.
        seed: of the schedule.
    """

    peers: str
    probability: float = 1.0
    period: int = 1
    delay: int = 0
    alpha: float = 0.5
    seed: int = 0

    def schedule(self) -> Schedule:
        """Return who chooses whom."""
        return Schedule(self.peers, self.probability, self.period, self.seed)


@dataclass(frozen=True)
class Machine:
    """A model of time.

    Args:
        compute: seconds of a step's computing, on each rank's own processor.
        payload: bytes of a snapshot, or of all gradients.
        bandwidth: bits a second of a rank's uplink, and of its downlink.
        latency: seconds from one rank to another.
        exchange: seconds of the rank's own time that an exchange takes with each partner.
        stall_probability, stall_factor: of a rank's step to take longer, and how many times.
    """

    compute: float
    payload: float
    bandwidth: float
    latency: float = 1e-4
    exchange: float = 0.0
    stall_probability: float = 0.0
    stall_factor: float = 3.0

    @property
    def transfer(self) -> float:
        """Seconds of a payload on a link that carries nothing else that way."""
        return self.payload * 8 / (self.bandwidth * TCP_SHARE)

    def step_times(self, ranks: int, rng: np.random.Generator) -> Seconds:
        """Draw how long one step computes on each rank."""
        stalled = rng.random(ranks) < self.stall_probability
        return self.compute * np.where(stalled, self.stall_factor, 1.0)

    @property
    def mean_step(self) -> float:
        """Seconds of a rank's own mean step, which waits for nobody."""
        return self.compute * (1 + self.stall_probability * (self.stall_factor - 1))


@dataclass(frozen=True)
class Uneven(Machine):
    """A machine whose ranks have speeds of their own.

    Args:
        speeds: of each rank, what multiplies the time of its steps.
    """

    speeds: tuple[float, ...] = ()

    def step_times(self, ranks: int, rng: np.random.Generator) -> Seconds:
        """See :meth:`Machine.step_times`."""
        return self.compute * np.array(self.speeds)


class Edges:
    """The transfers of one round, over all ranks.

    Args:
        pairs: sender and receiver, one column a transfer; shape ``(2, transfers)``.
        ranks: number of ranks.
    """

    def __init__(self, pairs: NDArray[np.int64], ranks: int) -> None:
        self.sender, self.receiver = pairs
        self.received = np.bincount(self.receiver, minlength=ranks)
        self.sent = np.bincount(self.sender, minlength=ranks)

    @classmethod
    def of(cls, schedule: Schedule, rule: MixingRule, step: int, ranks: int) -> Edges:
        """Ask ``rule`` for the transfers of every rank at ``step``."""
        choices = schedule.choices(step, ranks)
        pairs = [(k, i) for i in range(ranks) for k in rule.transfers(choices, i).receive_from]
        return cls(np.array(pairs, dtype=np.int64).reshape(-1, 2).T, ranks)


class Observer(Protocol):
    """What follows a run step by step."""

    def begin(self, edges: Edges | None) -> None:
        """Begin a step, at which the transfers ``edges`` are posted."""

    def end(self, due: bool) -> None:
        """End a step; what was posted last is ``due``."""


class Replicas:
    """Replicas that are random vectors: optimizers add independent noise, partners mix.

    Args:
        values: the replicas; shape ``(ranks, dimension)``.
        noise: standard deviation of what an optimizer adds to each element in a step.
        rule: of mixing.
        seed: of the noise.
    """

    def __init__(self, values: Tensor, noise: float, rule: MixingRule, seed: int = 0) -> None:
        self.values = values.clone()
        self.distances: list[float] = []  # sqrt(mean over ranks of ‖θ_i − θ̄‖² / dimension) at each step's end
        self._noise = noise
        self._rule = rule
        self._generator = torch.Generator().manual_seed(seed)
        self._posted: tuple[Edges, Tensor] | None = None

    def begin(self, edges: Edges | None) -> None:
        """See :class:`Observer`."""
        if edges is not None:
            self._posted = (edges, self.values.clone())

    def end(self, due: bool) -> None:
        """See :class:`Observer`."""
        self.update()
        if due and self._posted is not None:
            self._mix(*self._posted)
            self._posted = None
        self.look()

    def update(self) -> None:
        """Make every rank's step: noise, where nothing else is trained."""
        if self._noise:
            self.values += self._noise * torch.randn(self.values.shape, generator=self._generator)

    def look(self) -> None:
        """Note the consensus distance; called at each step's end."""
        self.distances.append(self.values.var(dim=0, correction=0).mean().sqrt().item())

    def _mix(self, edges: Edges, snapshots: Tensor) -> None:
        """Mix, all ranks with equally many partners in one call of the rule's own code."""
        by_receiver = np.argsort(edges.receiver, kind="stable")
        senders = edges.sender[by_receiver]
        first = np.cumsum(edges.received) - edges.received
        for partners in np.unique(edges.received[edges.received > 0]):
            receivers = np.flatnonzero(edges.received == partners)
            places = torch.from_numpy(receivers)
            received = [
                snapshots[torch.from_numpy(senders[first[receivers] + which])].flatten() for which in range(partners)
            ]
            mixed = self.values[places]
            mix([mixed], snapshots[places].flatten(), received, self._rule.weight(int(partners)))
            self.values[places] = mixed


class Clocks:
    """When each rank begins its next step: a rank waits for the transfers that are due, and a transfer for both ends.

    Transfers that share a link of a rank share its rate evenly, from beginning to end; a transfer is as fast as the
    more crowded of its two ends.

    Args:
        ranks: number of ranks.
        machine: the model of time.
        seed: of the stalls.
    """

    def __init__(self, ranks: int, machine: Machine, seed: int = 0) -> None:
        self.now: Seconds = np.zeros(ranks)
        self.means: list[float] = []  # mean over ranks of the time at each step's end
        self._machine = machine
        self._rng = np.random.default_rng(seed)
        self._arrival: Seconds = np.zeros(ranks)
        self._mixing: Seconds = np.zeros(ranks)

    def begin(self, edges: Edges | None) -> None:
        """See :class:`Observer`."""
        if edges is None:
            return
        sender, receiver, machine = edges.sender, edges.receiver, self._machine
        crowd = np.maximum(edges.sent[sender], edges.received[receiver])
        own: Seconds = machine.exchange * edges.received.astype(np.float64)
        ready = self.now + SNAPSHOT_SHARE * own
        begun = np.maximum(ready[sender], ready[receiver])
        done = begun + machine.latency + machine.transfer * crowd
        self._arrival = np.zeros_like(self.now)
        for end in (sender, receiver):
            np.maximum.at(self._arrival, end, done)
        self._mixing = MIXING_SHARE * own
        self.now = self.now + own - self._mixing

    def end(self, due: bool) -> None:
        """See :class:`Observer`."""
        self.now = self.now + self._machine.step_times(len(self.now), self._rng)
        if due:
            self.now = np.maximum(self.now, self._arrival) + self._mixing
        self.means.append(float(self.now.mean()))


def simulate(setting: Setting, ranks: int, steps: int, observers: list[Observer]) -> float:
    """Run ``steps`` steps of ``setting`` on all observers; return the payloads that a rank sent a step, on the mean."""
    schedule, rule = setting.schedule(), ElasticMixing(setting.alpha)
    posted, sent = None, 0
    for step in range(1, steps + 1):
        edges = Edges.of(schedule, rule, step, ranks) if schedule.is_round(step) else None
        if edges is not None:
            posted = step
            sent += len(edges.sender)
        due = posted is not None and step >= posted + setting.delay
        for observer in observers:
            observer.begin(edges)
            observer.end(due)
        posted = None if due else posted
    return sent / ranks / steps


def all_reduce_step(machine: Machine, ranks: int, steps: int = 200, seed: int = 0) -> float:
    """Return the mean step of synchronous training with a ring all-reduce, in seconds.

    All ranks wait for the slowest; then 2·N·(n − 1)/n bytes pass each link in 2·(n − 1) turns, while gradients still
    come out (as DDP's buckets do): a step is never shorter than its forward pass and the all-reduce.
    """
    rng = np.random.default_rng(seed)
    transfer = 2 * machine.transfer * (ranks - 1) / ranks + 2 * (ranks - 1) * machine.latency
    total = 0.0
    for _ in range(steps):
        slowest = machine.step_times(ranks, rng).max()
        total += (1 - BACKWARD_SHARE) * slowest + max(BACKWARD_SHARE * slowest, transfer)
    return total / steps


def growth(values: list[float], last: float = 0.5) -> float:
    """Return the mean growth a step over the ``last`` share of a series."""
    first = int(len(values) * (1 - last))
    return (values[-1] - values[first]) / (len(values) - 1 - first)
