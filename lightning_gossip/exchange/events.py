"""Asynchronous elastic gossip among many ranks, computed: the package's own protocol, on a clock of events.

A rank asks (:mod:`~lightning_gossip.rules.asking`), hears and answers
(:class:`~lightning_gossip.exchange.agreement.Side`) as it does in a training, with messages that take their time.
Replicas are random vectors to which each of their own steps adds noise, as in
:mod:`~lightning_gossip.rules.simulation`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gossip.exchange.agreement import Phase, Say, Side, Word
from lightning_gossip.rules import asking
from lightning_gossip.rules.simulation import Setting, Uneven

DIMENSION = 16
"""Of the vectors that stand for replicas."""

Vector = NDArray[np.floating[Any]]


@dataclass
class Rank:
    """One rank of a run on a clock of events."""

    side: Side
    theta: Vector
    rounds: asking.OwnRounds = field(default_factory=lambda: asking.OwnRounds(in_pairs=True))
    step: int = 0
    own: Vector = field(default_factory=lambda: np.zeros(0))
    theirs: Vector = field(default_factory=lambda: np.zeros(0))
    tried: set[int] = field(default_factory=set)
    exchanges: int = 0
    own_rounds: int = 0
    alone: int = 0


class Events:
    """Asynchronous elastic gossip, event by event.

    Args:
        setting: peers, period and so on.
        machine: times; a rank has one exchange at a time, so that no two share its link.
        noise: standard deviation of what a step adds to each element.
        replicas: of all ranks, changed in place; zeros of shape ``(ranks, DIMENSION)`` by default.
    """

    def __init__(
        self, setting: Setting, machine: Uneven, noise: float = 1.0, replicas: Sequence[Vector] | None = None
    ) -> None:
        self.schedule, self.alpha, self.machine, self.noise = setting.schedule(), setting.alpha, machine, noise
        self.rng = np.random.default_rng(setting.seed)
        self.members = tuple(range(len(machine.speeds)))
        if replicas is None:
            replicas = [np.zeros(DIMENSION) for _ in self.members]
        self.ranks = [Rank(Side(rank), theta) for rank, theta in enumerate(replicas)]
        self.distances: list[float] = []
        self._events: list[tuple[float, int, Any]] = []
        self._unreplied: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._arrival: dict[tuple[int, int, int], float] = defaultdict(float)
        self._number = 0

    def run(self, seconds: float) -> None:
        """Run for so long; note the consensus distance once a median step."""
        for rank in self.members:
            self._begin(0.0, rank)
        looked = 0.0
        while self._events and self._events[0][0] < seconds:
            now, _, event = heapq.heappop(self._events)
            while looked + self.machine.compute <= now:
                looked += self.machine.compute
                self.look()
            if isinstance(event, int):
                self._end(event)
                self._begin(now, event)
            else:
                self._hear(now, *event)

    def update(self, number: int) -> None:
        """Make one rank's step: noise, where nothing else is trained."""
        self.ranks[number].theta += self.noise * self.rng.standard_normal(DIMENSION)

    def look(self) -> None:
        """Note the consensus distance; called once in the time of a median step."""
        values = np.stack([rank.theta for rank in self.ranks])
        self.distances.append(float(np.sqrt(values.var(axis=0).mean())))

    def _after(self, time: float, event: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, event))

    def _begin(self, now: float, number: int) -> None:
        rank = self.ranks[number]
        rank.step += 1
        if self.schedule.is_round(rank.step):
            partner = asking.first(self.schedule, rank.step, number, self.members, len(self.members))
            asks, was_alone = rank.rounds.begin(rank.exchanges, rank.side.phase is not Phase.IDLE)
            rank.own_rounds += 1
            rank.alone += was_alone
            if asks and partner >= 0:
                rank.own, rank.tried = rank.theta.copy(), set()
                self._ask(now, number, partner)
        self._after(now + self.machine.compute * self.machine.speeds[number], number)

    def _end(self, number: int) -> None:
        rank = self.ranks[number]
        self.update(number)
        if rank.side.phase is Phase.AGREED:
            rank.theta -= self.alpha * (rank.own - rank.theirs)
            rank.side = rank.side.applied()

    def _ask(self, now: float, number: int, partner: int) -> None:
        rank = self.ranks[number]
        rank.tried.add(partner)
        rank.side, says = rank.side.ask(partner)
        self._unreplied[number, partner].append(rank.side.asks)
        self._send(now, number, says)

    def _send(self, now: float, number: int, says: Sequence[Say]) -> None:
        for say in says:
            takes = self.machine.latency + (self.machine.transfer if say.word is Word.PAYLOAD else 0.0)
            payload = self.ranks[number].own if say.word is Word.PAYLOAD else None
            link = say.leader, number, say.to
            self._arrival[link] = max(now + takes, self._arrival[link])  # a link keeps the order
            self._after(self._arrival[link], (number, say, payload))

    def _hear(self, now: float, sender: int, say: Say, payload: Vector | None) -> None:
        number = say.to
        rank = self.ranks[number]
        before = rank.side
        if say.word is Word.ASK:
            rank.side, says = before.hear_ask(sender, say.number)
            if rank.side.phase is Phase.ANSWERING:
                rank.own = rank.theta.copy()
                rank.side, says = rank.side.taken()
        elif say.word in (Word.ANSWER, Word.BUSY, Word.CROSSED):
            asks = self._unreplied[number, sender].pop(0)
            rank.side, says = before.hear_reply(say.word, sender, asks, say.number)
            if rank.side.is_free and before.phase is Phase.ASKING:
                without: set[int] = set()
                members = self.members
                again = asking.another(self.schedule, rank.step, number, members, rank.tried, without, len(members))
                if again >= 0:
                    self._ask(now, number, again)
        else:
            rank.side, says = before.hear(say.word, sender, say.leader)
            if payload is not None:
                rank.theirs = payload
            if rank.side.phase is Phase.AGREED and before.phase is not Phase.AGREED:
                rank.exchanges += 1
        self._send(now, number, says)
