"""Curves of test accuracy, drawn from the committed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from result_rows import Row, find, mean_and_error

from lightning_gossip.report_plots import COLOURS, DPI, STYLE

TITLES = {"mnist": "MNIST, perceptron", "cifar10": "CIFAR-10, AlexNet"}
REFERENCES = {"cifar10": (("single process, 1.8 h", 0.695, COLOURS[0]), ("3 workers, 1.1 h", 0.67, "dimgray"))}
"""What the DistBelief project's plot shows at the end: label, test accuracy, colour."""
AXES = (
    ("steps", 1.0, "updates of a worker"),
    ("cpu_seconds", 60.0, "processor time of a worker (min)"),
)
SETTING = ("workers", "n_push", "lr", "momentum", "checks")


Runs = dict[str, list[Row]]
"""Of one setting, by seed: the points of a curve, as many of each."""


def draw(name: str, lines: dict[str, Runs], folder: Path) -> None:
    """Write ``downpour_<name>.png``: accuracy against updates and time, the mean over seeds with their range.

    Args:
        name: of the experiment.
        lines: see :func:`gather`; at least one.
        folder: for the picture.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        axes: list[Axes] = list(figure.subplots(1, 2, sharey=True))
        for plot, (column, unit, label) in zip(axes, AXES, strict=True):
            for number, (who, runs) in enumerate(lines.items()):
                draw_runs(plot, who, runs, column, unit, COLOURS[number % len(COLOURS)])
            for reference, accuracy, colour in REFERENCES.get(name, ()):
                text = f"DistBelief project: {reference} (other machine and images)"
                plot.axhline(accuracy, color=colour, linestyle=":", linewidth=1.0, label=text)
            plot.set_xlabel(label)
        axes[0].set_ylabel("test accuracy")
        axes[0].set_title(TITLES.get(name, name), loc="left")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        path = folder / f"downpour_{name}.png"
        figure.savefig(path, dpi=DPI)
    print(path)


def gather(rows: Sequence[Row], lr: float) -> dict[str, Runs]:
    """Sort the rows of curves into one line a setting, the single process first.

    Of a seed that was trained twice the longer run counts, and all runs of a line end with the shortest: the learning
    rate does not know how many epochs are to come.

    Args:
        rows: of curves.
        lr: the single process', not named in a line's name.
    """
    lines: dict[str, Runs] = {}
    for row in sorted(rows, key=lambda row: (int(row["workers"]), int(row["n_push"]), -float(row["lr"]))):
        runs = lines.setdefault(name_of(row, lr), {})
        if row["seed"] not in runs:
            same = {key: row[key] for key in (*SETTING, "seed")}
            lengths = {each["epochs"] for each in find(rows, same)}
            runs[row["seed"]] = find(rows, same | {"epochs": max(lengths, key=int)})
    for runs in lines.values():
        length = min(map(len, runs.values()))
        runs.update({seed: runs[seed][:length] for seed in sorted(runs)})
    return lines


def table(lines: dict[str, Runs]) -> str:
    """Return in Markdown what each line comes to at its end, with standard errors over seeds where there are several.

    The difference is to the single process (the first line) of the same seed.
    """
    alone = next(iter(lines.values()))
    text = [
        "| | epochs of a worker | seeds | validation accuracy (%) | test accuracy (%) | less the single process' |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for who, runs in lines.items():
        ends = {seed: points[-1] for seed, points in runs.items()}
        validation, test = (
            mean_and_error([100 * float(end[column]) for end in ends.values()])
            for column in ("validation_accuracy", "test_accuracy")
        )
        differences = [
            100 * (float(end["test_accuracy"]) - float(alone[seed][-1]["test_accuracy"]))
            for seed, end in ends.items()
            if runs is not alone and seed in alone
        ]
        less = mean_and_error(differences) if differences else ""
        epochs = next(iter(ends.values()))["epoch"]
        text.append(f"| {who} | {epochs} | {len(ends)} | {validation} | {test} | {less} |")
    return "\n".join(text)


def name_of(row: Row, lr: float) -> str:
    """Return in words what the runs of one line have in common; ``lr`` is what goes without saying."""
    other = "" if math.isclose(float(row["lr"]), lr, rel_tol=1e-5) else f", lr {float(row['lr']):.3g}"
    if row["workers"] == "1":
        return f"single process{other}"
    return f"{row['workers']} workers, n_push {row['n_push']}{other}"


def draw_runs(plot: Axes, who: str, runs: Runs, column: str, unit: float, colour: str) -> None:
    x, y = (np.array([[float(p[c]) for p in run] for run in runs.values()]) for c in (column, "test_accuracy"))
    place = x.mean(axis=0) / unit
    label = f"{who} ({len(runs)} seed{'s' * (len(runs) > 1)})"
    plot.plot(place, y.mean(axis=0), color=colour, marker=".", label=label)
    plot.fill_between(place, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, linewidth=0)
