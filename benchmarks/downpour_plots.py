"""Curves of test accuracy, drawn from the committed rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from result_rows import Row, find

from lightning_gossip.report_plots import COLOURS, DPI, STYLE

TITLES = {"mnist": "MNIST, perceptron", "cifar10": "CIFAR-10, AlexNet"}
REFERENCES = {"cifar10": (("single process, 1.8 h", 0.695, COLOURS[0]), ("3 workers, 1.1 h", 0.67, COLOURS[1]))}
"""What the DistBelief project's plot shows at the end: label, test accuracy, colour."""
AXES = (
    ("steps", 1.0, "updates of a worker"),
    ("cpu_seconds", 60.0, "processor time of a worker (min)"),
)
WORKERS = {"1": COLOURS[0], "3": COLOURS[1], "2": COLOURS[2]}


def draw(name: str, rows: Sequence[Row], folder: Path) -> None:
    """Write ``downpour_<name>.png``: accuracy against updates and time, the mean over seeds with their range.

    Args:
        name: of the experiment.
        rows: of its curves, which differ in workers, n_push, checks and seeds only; at least one.
        folder: for the picture.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        axes: list[Axes] = list(figure.subplots(1, 2, sharey=True))
        for plot, (column, unit, label) in zip(axes, AXES, strict=True):
            for who in sorted({name_of(row) for row in rows}, reverse=True):
                draw_runs(plot, who, [row for row in rows if name_of(row) == who], column, unit)
            for reference, accuracy, colour in REFERENCES.get(name, ()):
                text = f"DistBelief project: {reference} (other machine and images)"
                plot.axhline(accuracy, color=colour, linestyle=":", linewidth=1.0, label=text)
            plot.set_xlabel(label)
        axes[0].set_ylabel("test accuracy")
        axes[0].set_title(f"{TITLES.get(name, name)}, {rows[0]['epochs']} epochs", loc="left")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        path = folder / f"downpour_{name}.png"
        figure.savefig(path, dpi=DPI)
    print(path)


def name_of(row: Row) -> str:
    """Return in words what the runs of one line have in common."""
    if row["workers"] == "1":
        return "single process"
    once = ", one validation an epoch" if row["checks"] == "1" else ""
    return f"{row['workers']} workers, n_push {row['n_push']}{once}"


def draw_runs(plot: Axes, who: str, rows: Sequence[Row], column: str, unit: float) -> None:
    seeds = sorted({row["seed"] for row in rows})
    runs = [find(rows, {"seed": seed}) for seed in seeds]
    length = min(len(run) for run in runs)
    x, y = (np.array([[float(p[c]) for p in run[:length]] for run in runs]) for c in (column, "test_accuracy"))
    place = x.mean(axis=0) / unit
    colour, line = WORKERS[rows[0]["workers"]], "--" if rows[0]["n_push"] == "1" else "-"
    label = f"{who} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
    plot.plot(place, y.mean(axis=0), color=colour, linestyle=line, marker=".", label=label)
    plot.fill_between(place, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, linewidth=0)
