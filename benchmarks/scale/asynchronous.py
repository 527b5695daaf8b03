"""Asynchronous gossip among many ranks of uneven speeds, computed: the package's own protocol, on a clock of events.

    python -m benchmarks.scale.asynchronous    # computes the rows that are missing, and prints the table

Each rank's steps take a time of its own, by a log-normal draw. Under gossip by step pairs wait for each other; under
asynchronous gossip a rank asks (:mod:`~lightning_gossip.rules.asking`), hears and answers
(:class:`~lightning_gossip.exchange.agreement.Side`) as it does in a training, with messages that take their time.
Replicas are random vectors to which each of their own steps adds noise, as in ``model.py``; both kinds of gossip run
for the same time.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import RESULTS
from benchmarks.scale.model import Clocks, Machine, Replicas, Seconds, Setting, simulate
from benchmarks.shared.options import make_parser
from benchmarks.shared.rows import append, find, read
from benchmarks.shared.tables import show
from benchmarks.shared.workloads import TASKS
from lightning_gossip.exchange.agreement import Phase, Say, Side, Word
from lightning_gossip.rules import asking
from lightning_gossip.rules.mixing import ElasticMixing

RANKS = (16, 64, 256, 1024)
SIGMAS = (0.0, 0.25, 0.5)
"""Of the logarithm of a rank's step time; at 0.5 one of six takes more than 1.65 times the median."""
PERIODS = (1, 8)
DIMENSION = 16
STEPS = 256
"""Of a rank of median speed, in a run."""
MACHINE = Machine(compute=0.035, payload=TASKS["mlp"].bytes, bandwidth=10e9, latency=1e-4)
FILE = "scale_asynchronous.csv"

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Uneven(Machine):
    """A machine whose ranks have speeds of their own: ``speeds`` multiplies the time of a step."""

    speeds: tuple[float, ...] = ()

    def step_times(self, ranks: int, rng: np.random.Generator) -> Seconds:
        """See :meth:`Machine.step_times`."""
        return self.compute * np.array(self.speeds)


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
    """

    def __init__(self, setting: Setting, machine: Uneven, noise: float = 1.0) -> None:
        self.schedule, self.alpha, self.machine, self.noise = setting.schedule(), setting.alpha, machine, noise
        self.rng = np.random.default_rng(setting.seed)
        self.members = tuple(range(len(machine.speeds)))
        self.ranks = [Rank(Side(rank), np.zeros(DIMENSION)) for rank in self.members]
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
                values = np.stack([rank.theta for rank in self.ranks])
                self.distances.append(float(np.sqrt(values.var(axis=0).mean())))
            if isinstance(event, int):
                self._end(event)
                self._begin(now, event)
            else:
                self._hear(now, *event)

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
        rank.theta += self.noise * self.rng.standard_normal(DIMENSION)
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


def compute(ranks: int, sigma: float, period: int, steps: int = STEPS, seed: int = 0) -> dict[str, float]:
    """Return what becomes of so many ranks, asynchronously and by step, over the same time."""
    speeds = np.exp(sigma * np.random.default_rng([seed, ranks]).standard_normal(ranks))
    machine = Uneven(**vars(replace(MACHINE)), speeds=tuple(speeds.tolist()))
    setting = Setting("matching", period=period, seed=seed)
    seconds = steps * MACHINE.compute
    events = Events(setting, machine)
    events.run(seconds)
    made = sum(rank.step - 1 for rank in events.ranks)
    rounds = sum(rank.own_rounds for rank in events.ranks)
    clocks = Clocks(ranks, machine)
    noisy = Replicas(torch.zeros(ranks, DIMENSION, dtype=torch.float64), noise=1.0, rule=ElasticMixing(0.5))
    simulate(setting, ranks, steps, [clocks, noisy])
    by_step = int(np.searchsorted(clocks.means, seconds))
    alone = float(np.mean(1 / (MACHINE.compute * speeds)))
    tail = events.distances[-steps // 4 :]
    return {
        "steps_to_alone": made / ranks / seconds / alone,
        "by_step_to_alone": by_step / seconds / alone,
        "exchanges_a_round": sum(rank.exchanges for rank in events.ranks) / max(1, rounds),
        "busy": sum(rank.alone for rank in events.ranks) / max(1, rounds),
        "distance": math.sqrt(sum(d * d for d in tail) / len(tail)),
        "by_step_distance": noisy.distances[max(0, by_step - 1)],
    }


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.out / FILE
    keys = [(ranks, sigma, period) for ranks in RANKS for sigma in SIGMAS for period in PERIODS]
    for ranks, sigma, period in keys:
        key = {"ranks": ranks, "sigma": f"{sigma:g}", "period": period}
        if not find(read(file), key):
            append(file, [key | {name: f"{value:.4g}" for name, value in compute(ranks, sigma, period).items()}])
            print(f"{ranks} ranks, sigma {sigma:g}, period {period}", flush=True)
    rows = read(file)
    columns = ("ranks", "sigma", "period", *list(rows[0])[3:])
    show("asynchronous gossip, computed", columns, [[row[name] for name in columns] for row in rows])


if __name__ == "__main__":
    main()
