"""Asynchronous gossip among many ranks of uneven speeds, computed: the package's own protocol, on a clock of events.

    python -m benchmarks.scale.asynchronous    # computes the rows that are missing, and prints the table

Each rank's steps take a time of its own, by a log-normal draw. Under gossip by step pairs wait for each other; under
asynchronous gossip nobody does (`exchange/events.py`). Replicas are random vectors to which each of their own steps
adds noise; both kinds of gossip run for the same time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.shared.options import make_parser
from benchmarks.shared.rows import append, find, read
from benchmarks.shared.tables import show
from benchmarks.shared.workloads import TASKS
from lightning_gossip.exchange.events import DIMENSION, Events
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.simulation import Clocks, Machine, Replicas, Setting, Uneven, simulate

RANKS = (16, 64, 256, 1024)
SIGMAS = (0.0, 0.25, 0.5)
"""Of the logarithm of a rank's step time; at 0.5 one of six takes more than 1.65 times the median."""
PERIODS = (1, 8)
STEPS = 256
"""Of a rank of median speed, in a run."""
MACHINE = Machine(compute=0.035, payload=TASKS["mlp"].bytes, bandwidth=10e9, latency=1e-4)
FILE = "scale_asynchronous.csv"


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
