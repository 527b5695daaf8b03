"""Curves of test accuracy, drawn from the committed rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.downpour.tables import Runs
from benchmarks.shared import plots
from benchmarks.shared.plots import COLOURS, Axes, Figure

TITLES = {"mnist": "MNIST, perceptron", "cifar10": "CIFAR-10, AlexNet"}
REFERENCES = {"cifar10": (("single process, 1.8 h", 0.695, COLOURS[0]), ("3 workers, 1.1 h", 0.67, "dimgray"))}
"""What the DistBelief project's plot shows at the end: label, test accuracy, colour."""
AXES = (
    ("steps", 1.0, "updates of a worker"),
    ("cpu_seconds", 60.0, "processor time of a worker (min)"),
)


def draw(name: str, lines: dict[str, Runs], folder: Path) -> None:
    """Write ``downpour_<name>.png``: accuracy against updates and time, the mean over seeds with their range.

    Args:
        name: of the experiment.
        lines: see :func:`benchmarks.downpour.tables.gather`; at least one.
        folder: for the picture.
    """
    plots.draw({folder / f"downpour_{name}.png": lambda: _curves(name, lines)})


def _curves(name: str, lines: dict[str, Runs]) -> Figure:
    figure = plots.new_figure(9.0, 3.6)
    axes = plots.panels(figure, 2)
    for plot, (column, unit, label) in zip(axes, AXES, strict=True):
        for number, (who, runs) in enumerate(lines.items()):
            _draw_runs(plot, who, runs, column, unit, COLOURS[number % len(COLOURS)])
        for reference, accuracy, colour in REFERENCES.get(name, ()):
            text = f"DistBelief project: {reference} (other machine and images)"
            plot.axhline(accuracy, color=colour, linestyle=":", linewidth=1.0, label=text)
        plot.set_xlabel(label)
    axes[0].set_ylabel("test accuracy")
    axes[0].set_title(TITLES.get(name, name), loc="left")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _draw_runs(plot: Axes, who: str, runs: Runs, column: str, unit: float, colour: str) -> None:
    x, y = (np.array([[float(p[c]) for p in run] for run in runs.values()]) for c in (column, "test_accuracy"))
    place = x.mean(axis=0) / unit
    label = f"{who} ({len(runs)} seed{'s' * (len(runs) > 1)})"
    plot.plot(place, y.mean(axis=0), color=colour, marker=".", label=label)
    plot.fill_between(place, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, linewidth=0)
