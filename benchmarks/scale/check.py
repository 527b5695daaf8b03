"""The model beside mathematics, and beside what `benchmarks.network` measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.network.schemes import FILES, GOSSIP
from benchmarks.shared.rows import Row, find, read
from benchmarks.shared.workloads import TASKS
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.simulation import Clocks, Machine, Replicas, Setting, all_reduce_step, growth, simulate

TOLERANCE = 0.15
"""Of the model's step time to the measured one."""


def check(folder: Path) -> bool:
    """Print the model beside mathematics and measurements; return whether all agree."""
    return all([check_contraction(), check_measured(read(folder / FILES["rates"]))])


def check_contraction() -> bool:
    """A random matching at α = ½ shrinks the squared distance by (n − 2) / (2 (n − 1)) a round, on the mean.

    Of the second round: in the first, replicas that are independent shrink alike under every matching.
    """
    agree = True
    for ranks, draws in ((4, 400), (16, 100), (256, 4)):
        generator = torch.Generator().manual_seed(1)
        start = torch.randn(ranks, 1024, dtype=torch.float64, generator=generator)
        shrinking = []
        for seed in range(draws):
            replicas = Replicas(start, noise=0, rule=ElasticMixing(0.5))
            simulate(Setting("matching", seed=seed), ranks, 2, [replicas])
            shrinking.append((replicas.distances[1] / replicas.distances[0]) ** 2)
        simulated, expected = sum(shrinking) / draws, (ranks - 2) / (2 * (ranks - 1))
        fits = abs(simulated - expected) < 0.1 * expected
        agree = agree and fits
        print(
            f"matching, {ranks} ranks: squared distance times {simulated:.3f} a round, expected {expected:.3f}"
            + ("" if fits else ": DIFFERS")
        )
    return agree


def check_measured(rows: Sequence[Row]) -> bool:
    """Compare the model with every set-up that was measured.

    Its computing is the step without communication. There all ranks share few cores: the CPU time that an exchange
    takes beyond that (it is measured) is taken from everybody's computing, ranks / cores times as long.
    """
    agree = True
    for rate in sorted({row["rate_mbit"] for row in rows}, key=float):
        at_rate = find(rows, {"rate_mbit": rate})
        crowd = int(at_rate[0]["ranks"]) / int(at_rate[0]["cores"])
        blocks = {name: find(at_rate, {"setup": name}) for name in ("none", "ddp", *GOSSIP)}
        steps, cpu = (
            {name: statistics.median(float(row[column]) for row in found) for name, found in blocks.items() if found}
            for column in ("step_ms", "cpu_ms")
        )
        for name in (name for name in steps if name != "none"):
            extra = max(0.0, cpu[name] - cpu["none"]) * GOSSIP.get(name, {}).get("period", 1)
            link = Machine(
                compute=steps["none"] / 1e3,
                payload=TASKS["mlp"].bytes,
                bandwidth=float(rate) * 1e6,
                latency=1e-4,
                exchange=extra * crowd / 1e3,
            )
            modelled = 1e3 * modelled_step(name, link, int(at_rate[0]["ranks"]))
            deviation = modelled / steps[name] - 1
            agree = agree and abs(deviation) <= TOLERANCE
            print(
                f"{rate} Mbit/s, {name}: measured {steps[name]:.1f} ms, modelled {modelled:.1f} ms ({deviation:+.1%})"
                + ("" if abs(deviation) <= TOLERANCE else ": DIFFERS")
            )
    if not rows:
        print("benchmarks.network has left no rows to compare with")
    return agree and bool(rows)


def modelled_step(name: str, link: Machine, ranks: int) -> float:
    """Return the seconds of a step of a set-up of `benchmarks.network`."""
    if name == "ddp":
        return all_reduce_step(link, ranks)
    arguments = GOSSIP[name]
    if "wire_dtype" in arguments:
        link = replace(link, payload=link.payload * arguments["wire_dtype"].itemsize / 4)
    setting = Setting("matching", period=arguments["period"], delay=arguments.get("delay", 0))
    clocks = Clocks(ranks, link)
    simulate(setting, ranks, 64 * setting.period, [clocks])
    return growth(clocks.means)
