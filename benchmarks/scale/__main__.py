"""What does not run on one machine: consensus distance and wall time of 16 to 4,096 replicas, computed.

    python -m benchmarks.scale            # computes the rows that are missing, and draws them
    python -m benchmarks.scale --check    # compares the model with what benchmarks.network measured, and mathematics

Who exchanges with whom and how replicas mix are the package's own code, and so is the model (`rules/simulation.py`);
time is that of a link (bandwidth, latency) and of computing (even, or with stalls: a step takes 3 times as long with
probability 0.1). A ring all-reduce stands beside it: 2·N·(n − 1)/n bytes and 2·(n − 1) latencies, under the backward
pass as far as it fits.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS
from benchmarks.scale.check import check
from benchmarks.shared import plots
from benchmarks.shared.options import make_parser
from benchmarks.shared.plots import COLOURS, Axes, Figure
from benchmarks.shared.rows import Row, append, find, read
from benchmarks.shared.workloads import TASKS
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.simulation import Clocks, Machine, Replicas, Setting, all_reduce_step, growth, simulate

RANKS = (16, 64, 256, 1024, 4096)
PEERS = ("matching", "uniform", "ring", "exponential")
CLOCKS = ((1.0, 1, 0), (0.125, 1, 0), (1.0, 8, 0), (1.0, 8, 7), (1.0, 32, 0), (1.0, 32, 31))
"""Probability, period and delay."""
DIMENSION = 16
"""Of the vectors that stand for replicas."""
NOISE_STEPS = 256
"""Simulated at period 1; longer periods get 4 times as many, for they have fewer rounds."""
STALLS = 0.1

MLP = TASKS["mlp"].bytes
"""Of the thesis' MNIST network in float32."""
LINKS = {
    "200 Mbit/s": Machine(compute=0.035, payload=MLP, bandwidth=200e6, latency=1e-4),
    "1 Gbit/s": Machine(compute=0.035, payload=MLP, bandwidth=1e9, latency=1e-4),
    "10 Gbit/s": Machine(compute=0.035, payload=MLP, bandwidth=10e9, latency=2e-5),
}

_MILLISECONDS = (50, 100, 200, 500, 1000, 2000)
LINKS_SHOWN = ("200 Mbit/s", "10 Gbit/s")
SHOWN = (("matching", 1, 0), ("matching", 8, 0), ("matching", 8, 7), ("matching", 32, 31), ("uniform", 8, 7))
"""Peers, period and delay in the picture of time."""


@dataclass(frozen=True)
class Run:
    """What a setting does to replicas, and milliseconds of a step on each link, even and with stalls."""

    payloads: float
    to_a_hundredth: int | None
    distance: float
    steps: dict[str, tuple[float, float]]


def run(setting: Setting, ranks: int, links: dict[str, Machine]) -> Run:
    steps = NOISE_STEPS * (1 if setting.period == 1 else 4)
    generator = torch.Generator().manual_seed(setting.seed)
    start = torch.randn(ranks, DIMENSION, dtype=torch.float64, generator=generator)
    still = Replicas(start, noise=0, rule=ElasticMixing(setting.alpha))
    noisy = Replicas(torch.zeros_like(start), noise=1.0, rule=ElasticMixing(setting.alpha))
    clocks = {
        name: (Clocks(ranks, link), Clocks(ranks, replace(link, stall_probability=STALLS)))
        for name, link in links.items()
    }
    payloads = simulate(setting, ranks, steps, [still, noisy, *(clock for pair in clocks.values() for clock in pair)])
    bound = 0.01 * start.var(dim=0, correction=0).mean().sqrt().item()
    reached = (step for step, distance in enumerate(still.distances, start=1) if distance <= bound)
    tail = noisy.distances[-steps // 4 :]
    return Run(
        payloads,
        next(reached, None),
        math.sqrt(sum(d * d for d in tail) / len(tail)),
        {name: (1e3 * growth(even.means), 1e3 * growth(stalled.means)) for name, (even, stalled) in clocks.items()},
    )


def compute(file: Path) -> None:
    """Append the rows that are missing."""
    for ranks in RANKS:
        reduced = {
            name: [1e3 * all_reduce_step(replace(link, stall_probability=p), ranks) for p in (0.0, STALLS)]
            for name, link in LINKS.items()
        }
        for peers, (probability, period, delay) in itertools.product(PEERS, CLOCKS):
            key = _key(peers, probability, period, delay) | {"ranks": ranks}
            if find(read(file), key):
                continue
            result = run(Setting(peers, probability, period, delay), ranks, LINKS)
            consensus = {
                "payloads_a_step": result.payloads,
                "steps_to_a_hundredth": result.to_a_hundredth or "",
                "distance_in_steps_of_noise": result.distance,
            }
            columns = ("step_ms", "step_ms_with_stalls", "all_reduce_ms", "all_reduce_ms_with_stalls")
            times = {n: dict(zip(columns, (*result.steps[n], *reduced[n]), strict=True)) for n in LINKS}
            append(file, [key | {"link": name} | consensus | times[name] for name in LINKS])
            print(f"{ranks} ranks, {peers}, probability {probability:g}, period {period}, delay {delay}", flush=True)


def figure(rows: Sequence[Row]) -> Figure | None:
    """Return a picture of distance and wall time against the number of ranks, None without rows."""
    if not rows:
        return None
    picture = plots.new_figure(9.6, 4.8)
    axes = plots.panels(picture, 3, share_y=False)
    ranks = sorted({int(row["ranks"]) for row in rows})
    for colour, peers in zip(COLOURS, PEERS, strict=False):
        for style, period in (("-", 1), ("--", 8)):
            line = _line(rows, _key(peers, 1.0, period, 0), LINKS_SHOWN[0], "distance_in_steps_of_noise", ranks)
            axes[0].plot(ranks, line, style, color=colour, label=f"{peers}, period {period}")
    axes[0].set(xscale="log", yscale="log", ylabel="Consensus distance, in steps of noise")
    _legend_below(axes[0])
    for panel, link in zip(axes[1:], LINKS_SHOWN, strict=True):
        first = find(rows, _key("matching", 1.0, 1, 0) | {"link": link})
        reduced = {int(row["ranks"]): float(row["all_reduce_ms_with_stalls"]) for row in first}
        panel.plot(ranks, [reduced[n] for n in ranks], color=COLOURS[6], marker="s", label="ring all-reduce")
        for colour, (peers, period, delay) in zip(COLOURS, SHOWN, strict=False):
            line = _line(rows, _key(peers, 1.0, period, delay), link, "step_ms_with_stalls", ranks)
            label = f"{peers}, period {period}" + (f", delay {delay}" if delay else "")
            panel.plot(ranks, line, color=colour, marker="o", label=label)
        own = 1e3 * replace(LINKS[link], stall_probability=STALLS).mean_step
        panel.axhline(own, color="0.5", linestyle=":", label="a rank's own mean step")
        panel.set(xscale="log", yscale="log", title=link, ylabel="Step with stalls (ms)")
    _legend_below(axes[1])
    for panel, ticks in zip(axes, ((1, 2, 5, 10), _MILLISECONDS, _MILLISECONDS), strict=True):
        panel.set_xlabel("Ranks")
        panel.set_xticks(ranks, [f"{n:,}" for n in ranks])
        low, high = panel.get_ylim()
        shown = [tick for tick in ticks if low <= tick <= high]
        panel.set_yticks(shown, [f"{tick:,}" for tick in shown])
        panel.minorticks_off()
    return picture


def _legend_below(axes: Axes) -> None:
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=1)


def _key(peers: str, probability: float, period: int, delay: int) -> dict[str, Any]:
    """Return what tells a setting's rows, as it stands in the file."""
    return {"peers": peers, "probability": f"{probability:g}", "period": period, "delay": delay}


def _line(rows: Sequence[Row], key: dict[str, Any], link: str, column: str, ranks: Sequence[int]) -> list[float]:
    values = {int(row["ranks"]): float(row[column]) for row in find(rows, key | {"link": link})}
    return [values.get(n, math.nan) for n in ranks]


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--check", action="store_true", help="compare only; ends with 1 where something differs")
    parser.add_argument("--plot", action="store_true", help="draw the rows that are there, and compute none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check:
        sys.exit(0 if check(args.out) else 1)
    file = args.out / "scale.csv"
    if not args.plot:
        compute(file)
    plots.draw({args.out / "scale.png": lambda: figure(read(file))})


if __name__ == "__main__":
    main()
