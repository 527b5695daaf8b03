"""What a storm's ranks have written down, in numbers, rows and a picture."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.shared import plots, rows
from benchmarks.shared.tables import show

FILE, CURVES, EVENTS = "faults_storm.csv", "faults_storm_steps.csv", "faults_storm_events.csv"
HELD = "faults_storm_held.csv"
OWN_MOST = 20.0
"""Seconds of a fault that count as its own rank's outage at most: a standstill of all is none."""

EVERY = 2.0
"""Seconds from one point of a curve to the next."""
MARKS = {"kill": "x", "stop": "s", "cut": "|"}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        when: in seconds, from the storm's beginning or of the clock.
        kind: ``"kill"``, ``"stop"`` or ``"cut"``.
        rank: to whom.
    """

    when: float
    kind: str
    rank: int


@dataclass(frozen=True)
class Step:
    """A step that a rank has ended.

    Attributes:
        when: in seconds of the clock.
        rank: whose.
        process: names the process.
        number: of the step, as Lightning counts.
        loss: on held-out data; None where it was not looked at.
    """

    when: float
    rank: int
    process: str
    number: int
    loss: float | None


def steps_in(folder: Path) -> list[Step]:
    """Return what is written in a run's folder, in order of time."""
    steps = []
    for path in (folder / "steps").iterdir():
        for line in path.read_text().splitlines():
            when, number, loss = [*line.split(","), "", ""][:3]
            if number:
                rank = int(path.name.partition("_")[0])
                steps.append(Step(float(when), rank, path.name, int(number), float(loss) if loss else None))
    return sorted(steps, key=lambda step: step.when)


def numbers(
    scheme: str, ranks: int, steps: Sequence[Step], faults: Sequence[Fault], began: float, ended: float
) -> dict[str, float | None]:
    """Return what a run has done.

    ``live_s`` is the time of all ranks less what each was kept from training by its own faults, :data:`OWN_MOST`
    seconds by each at most; ``steps`` counts those of all ranks in that time, under DDP what was made twice once.
    """
    within = [step for step in steps if began <= step.when <= ended]
    times = {rank: [step.when for step in within if step.rank == rank] for rank in range(ranks)}
    outage = sum(min(OWN_MOST, _next(times[fault.rank], fault.when, ended) - fault.when) for fault in faults)
    once = (within[-1].number - within[0].number + 1) * ranks
    done = float(once if scheme == "ddp" else len(within))
    gaps, back = [], []
    for fault in faults:
        if fault.kind == "kill":
            others = [rank for rank in range(ranks) if rank != fault.rank]
            gaps.append(max(_next(times[rank], fault.when, ended) for rank in others) - fault.when)
            back.append(_next(times[fault.rank], fault.when, ended) - fault.when)
    losses = [next((s.loss for s in reversed(within) if s.rank == k and s.loss is not None), None) for k in times]
    known = [loss for loss in losses if loss is not None]
    return {
        "live_s": (ended - began) * ranks - outage,
        "steps": done,
        "next_step_s": statistics.median(gaps) if gaps else None,
        "next_step_max_s": max(gaps, default=None),
        "back_s": statistics.median(back) if back else None,
        "back_max_s": max(back, default=None),
        "loss": statistics.mean(known) if known else None,
    }


def _next(times: Sequence[float], when: float, end: float) -> float:
    """Return the first of ``times`` after ``when``; ``end`` where there is none."""
    place = bisect_right(times, when)
    return times[place] if place < len(times) else end


def is_there(results: Path, scheme: str, faults: int, minutes: float) -> bool:
    """Whether a run's row is."""
    return bool(rows.find(rows.read(results / FILE), {"scheme": scheme, "faults": faults, "minutes": minutes}))


def keep(
    results: Path,
    scheme: str,
    minutes: float,
    count: int,
    ranks: int,
    steps: Sequence[Step],
    faults: Sequence[Fault],
    began: float,
    ended: float,
) -> None:
    """Append a run's row, its curves and its events."""
    run = {"scheme": scheme, "minutes": minutes, "faults": count}
    curves = []
    for rank in range(ranks):
        times = [step.when - began for step in steps if step.rank == rank]
        for point in range(int((ended - began) / EVERY) + 1):
            curves.append(run | {"rank": rank, "second": point * EVERY, "steps": bisect_right(times, point * EVERY)})
    rows.append(results / CURVES, curves)
    if faults:
        told = [run | {"rank": f.rank, "second": round(f.when - began, 2), "kind": f.kind} for f in faults]
        rows.append(results / EVENTS, told)
    row: dict[str, Any] = run | {"ranks": ranks} | numbers(scheme, ranks, steps, faults, began, ended)
    rows.append(results / FILE, [row])


def keep_held(results: Path, scheme: str, minutes: float, count: int, held: Sequence[Mapping[str, Any]]) -> None:
    """Append what a run's processes held, a row a look."""
    run = {"scheme": scheme, "minutes": minutes, "faults": count}
    if held:
        rows.append(results / HELD, [run | dict(one) for one in held])


def show_table(results: Path) -> None:
    """Print what is there: the storm's runs beside those without faults."""
    there = rows.read(results / FILE)
    calm = {(row["scheme"], row["minutes"]): row for row in there if row["faults"] == "0"}
    cells = []
    for row in there:
        free = calm.get((row["scheme"], row["minutes"]))
        share = loss = ""
        if free is not None:
            possible = float(row["live_s"]) * float(free["steps"]) / float(free["live_s"])
            share = f"{float(row['steps']) / possible:.3f}"
            loss = f"{float(row['loss']) / float(free['loss']):.3f}" if row["loss"] and free["loss"] else ""
        seconds = [row[name] for name in ("next_step_s", "next_step_max_s", "back_s", "back_max_s")]
        cells.append([row["scheme"], row["minutes"], row["faults"], row["steps"], share, *seconds, row["loss"], loss])
    if cells:
        head = [
            "scheme",
            "minutes",
            "faults",
            "steps",
            "of possible",
            "next step s",
            "max",
            "back s",
            "max",
            "loss",
            "ratio",
        ]
        show("a storm over small ranks", head, cells)


def draw_all(results: Path) -> None:
    """Draw each rank's steps over time, with the faults."""
    plots.draw({results / "faults_storm.png": partial(_figure, results)})


def _figure(results: Path) -> plots.Figure | None:
    curves, events = rows.read(results / CURVES), rows.read(results / EVENTS)
    schemes = list(dict.fromkeys(row["scheme"] for row in events))
    if not schemes:
        return None
    figure = plots.new_figure(5.2 * len(schemes), 4.0)
    for axes, scheme in zip(plots.panels(figure, len(schemes)), schemes, strict=True):
        axes.set(title=scheme, xlabel="seconds", ylabel="steps of each rank")
        mine = [row for row in curves if row["scheme"] == scheme and row["faults"] != "0"]
        for rank in sorted({int(row["rank"]) for row in mine}):
            points = [(float(row["second"]), int(row["steps"])) for row in mine if int(row["rank"]) == rank]
            colour = plots.COLOURS[rank % len(plots.COLOURS)]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=f"rank {rank}")
            for kind, mark in MARKS.items():
                at = [
                    float(e["second"])
                    for e in events
                    if (e["scheme"], e["rank"], e["kind"]) == (scheme, f"{rank}", kind)
                ]
                heights = [max((steps for second, steps in points if second <= when), default=0) for when in at]
                axes.scatter(at, heights, marker=mark, color=colour, s=30, zorder=3)
        axes.legend(fontsize="x-small", title="x killed, ▪ stopped, | cut off", title_fontsize="x-small")
    return figure
