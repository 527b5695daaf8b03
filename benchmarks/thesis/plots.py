"""The thesis' plots from our rows: accuracy beside its tables, against updates and bytes, and the sweeps.

Rows of fewer epochs than the thesis' are drawn as far as they go: the beginning of a training does not depend on its
length.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.shared import plots
from benchmarks.shared.plots import COLOURS, Axes, Figure
from benchmarks.thesis.results import Results
from benchmarks.thesis.rows import DEFAULT_ALPHA, METHODS, SEED, Experiment, Row, parse
from benchmarks.thesis.table import in_order, published

_METHOD_COLOURS = {"EG": COLOURS[0], "GS": COLOURS[1], "AR": COLOURS[6], "NC": "0.55"}
_RATE_STYLES = {1 / 8: "-", 1 / 32: "--", 1 / 128: "-.", 1 / 512: ":"}
_SHOWN_FROM = {"mnist": 96.0}
"""Percent at which the vertical axis begins, as in the thesis' plots, unless a row ends below."""
_BAND = "mean over the replicas (line), min–max (band)"


def draw(experiment: Experiment, results: Results, folder: Path) -> list[Path]:
    """Draw what the rows are there for.

    Args:
        experiment: whose rows they are.
        results: of that experiment.
        folder: for the PNG files; exists.

    Returns:
        The files written.
    """
    pictures: dict[str, Callable[[Experiment, Results], Figure | None]] = {
        "table": _table,
        "evolution": _evolution,
        "all": _together,
        "bytes": _bytes,
        "alpha": _alphas,
        "periods": _periods,
    }
    return plots.draw({
        folder / f"thesis_{experiment.name}_{name}.png": partial(picture, experiment, results)
        for name, picture in pictures.items()
    })  # fmt: skip


def _table(experiment: Experiment, results: Results) -> Figure | None:
    """Test accuracy of each whole row, every seed, beside the thesis'."""
    rows = in_order(results.rows[results.rows["epochs"] == experiment.epochs])
    if rows.empty:
        return None
    ids = list(dict.fromkeys(rows["id"]))
    figure = plots.new_figure(max(4.0, 0.55 * len(ids) + 1.5), 3.6)
    axes = figure.add_subplot(ylabel="Test accuracy (%)")
    for place, row_id in enumerate(ids):
        seeds, gossips = rows[rows["id"] == row_id], parse(row_id).probability is not None
        for nth, (_, row) in enumerate(seeds.iterrows()):
            x = place - 0.26 + 0.1 * nth
            low, mean, high = (100 * row[f"{name}_over_ranks"] for name in ("min", "mean", "max"))
            spread = [[mean - low], [high - mean]]
            axes.errorbar(x, mean, spread, fmt="o", color=COLOURS[0], elinewidth=1, label="ours: mean, min–max")
            if gossips:
                consensus = 100 * row["consensus_test_accuracy"]
                axes.plot(x + 0.04, consensus, "D", color=COLOURS[1], label="ours: consensus")
        if results.compared:
            mean, consensus = (100 * value for value in published(results, row_id))
            axes.plot(place + 0.18, mean, "o", color=COLOURS[0], mfc="none", label="thesis: mean (one run)")
            axes.plot(place + 0.26, consensus, "D", color=COLOURS[1], mfc="none", label="thesis: consensus")
    axes.set_xticks(range(len(ids)), ids, rotation=45, ha="right")
    axes.set_xlim(-0.5, len(ids) - 0.5)
    _legend(figure, axes, columns=2, title=f"{experiment.title}, {experiment.epochs} epochs; a point a seed")
    return figure


def _evolution(experiment: Experiment, results: Results) -> Figure | None:
    """Validation accuracy against updates, a panel a number of workers and a probability."""
    rows = _main_rows(results)
    panels = list(dict.fromkeys((row.workers, row.rate) for row in rows if row.probability is not None))
    if not panels:
        return None
    figure, all_axes = _panels(len(panels))
    for axes, (workers, rate) in zip(all_axes, panels, strict=True):
        for row in (row for row in rows if row.workers == workers):
            gossips = row.probability is not None
            if gossips and row.rate != rate:
                continue
            curve = _curve(results, row)
            label = METHODS[row.method][0]
            _draw(axes, curve, curve["updates"], label, color=_METHOD_COLOURS[row.method], lw=1.4 if gossips else 0.8)
            if gossips:
                _mark_test(axes, results, row, experiment.epochs, curve["updates"].min() * experiment.epochs)
        axes.plot([], [], "o", color="0.35", label="test accuracy, ours")
        if results.compared:
            axes.plot([], [], "o", color="0.35", mfc="none", label="test accuracy, thesis")
        axes.set_title(f"{workers} workers, probability 1/{1 / rate:g}", fontsize=8)
        _finish(axes, experiment, "Updates of each replica")
    _legend(figure, all_axes[0], columns=3, title=f"{experiment.title}: {_BAND}")
    return figure


def _mark_test(axes: Axes, results: Results, row: Row, epochs: int, last: float) -> None:
    """Mark the mean test accuracy after all epochs, ours and the thesis', right of update ``last``."""
    rows = results.rows
    ours = rows.loc[(rows["id"] == row.id) & (rows["seed"] == SEED) & (rows["epochs"] == epochs), "mean_over_ranks"]
    style: dict[str, Any] = {"color": _METHOD_COLOURS[row.method], "marker": "o", "ls": "none", "zorder": 4}
    axes.plot([1.03 * last] * len(ours), 100 * ours, **style)
    axes.plot(1.06 * last, 100 * published(results, row.id)[0], mfc="none", **style)


def _together(experiment: Experiment, results: Results) -> Figure | None:
    """Validation accuracy against updates, all rows in one."""
    rows = _main_rows(results)
    if not rows:
        return None
    figure = plots.new_figure(6.0, 4.6)
    axes = figure.add_subplot(ylabel="Validation accuracy (%)")
    for row in rows:
        curve = _curve(results, row)
        _draw(axes, curve, curve["updates"], row.id, **_style(row))
    _finish(axes, experiment, "Updates of each replica")
    _legend(figure, axes, columns=4, title=f"{experiment.title}: {_BAND}")
    return figure


def _bytes(experiment: Experiment, results: Results) -> Figure | None:
    """Validation accuracy against bytes sent by a worker."""
    rows = _main_rows(results)
    if not any(row.rate for row in rows):
        return None
    figure = plots.new_figure(6.0, 4.6)
    axes = figure.add_subplot(ylabel="Validation accuracy (%)", xscale="log")
    for row in rows:
        curve = _curve(results, row)
        if row.rate:
            _draw(axes, curve, curve["bytes_sent_per_rank"] / 1e9, row.id, **_style(row))
        else:  # a logarithmic axis has no 0
            axes.axhline(100 * curve["mean"].iloc[-1], label=f"{row.id}, at the end", **_style(row))
    _finish(axes, experiment, "Sent by a worker since the start (GB)")
    _legend(figure, axes, columns=4, title=f"{experiment.title}: {_BAND}")
    return figure


def _alphas(experiment: Experiment, results: Results) -> Figure | None:
    """Rows of elastic gossip that share workers and probability and differ in α."""
    rows = (row for row in _first_seed(results) if row.method == "EG" and row.period == 1)
    return _sweeps(experiment, results, _alike(rows), lambda row: f"α = {row.alpha:g}")


def _periods(experiment: Experiment, results: Results) -> Figure | None:
    """Rows of a method that exchange equally often: by chance at every step, or every so many, at once or late."""
    rows = (row for row in _first_seed(results) if row.probability is not None and row.alpha in (None, DEFAULT_ALPHA))
    groups = {key: group for key, group in _alike(rows).items() if any(row.period > 1 for row in group)}
    return _sweeps(experiment, results, groups, lambda row: row.id)


_Group = tuple[str, int, float]
"""Method, workers and rate."""


def _alike(rows: Iterable[Row]) -> dict[_Group, list[Row]]:
    """Return the groups of more than one row."""
    groups: defaultdict[_Group, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.method, row.workers, row.rate].append(row)
    return {key: group for key, group in sorted(groups.items()) if len(group) > 1}


def _sweeps(
    experiment: Experiment, results: Results, groups: Mapping[_Group, Sequence[Row]], name: Callable[[Row], str]
) -> Figure | None:
    """Validation accuracy against updates, as far as the shortest row of a group goes, and test accuracies."""
    if not groups:
        return None
    known = results.curves[results.curves["seed"] == SEED]
    figure, all_axes = _panels(2 * len(groups))
    for nth, ((method, workers, rate), group) in enumerate(groups.items()):
        curves, tests = all_axes[2 * nth : 2 * nth + 2]
        epochs = min(known.loc[known["id"] == row.id, "epochs"].max() for row in group)
        names = [name(row) for row in group]
        for row, label, colour in zip(group, names, COLOURS, strict=False):
            curve = _curve(results, row, epochs)
            _draw(curves, curve, curve["updates"], label, color=colour)
        of = "" if epochs == experiment.epochs else f" of {experiment.epochs}"
        curves.set_title(
            f"{METHODS[method][0]}, {workers} workers, rate 1/{1 / rate:g}: {epochs}{of} epochs", fontsize=8
        )
        _finish(curves, experiment, "Updates of each replica")
        curves.legend(loc="lower right")
        _compare_tests(tests, experiment, results, group, names, epochs)
    return figure


def _compare_tests(
    axes: Axes, experiment: Experiment, results: Results, group: Sequence[Row], names: Sequence[str], epochs: int
) -> None:
    rows = results.rows[(results.rows["seed"] == SEED) & (results.rows["epochs"] == epochs)].set_index("id")
    ours = [100 * rows["mean_over_ranks"].get(row.id, math.nan) for row in group]
    axes.plot(names, ours, "o", color=COLOURS[0], label=f"ours, {epochs} epochs")
    theirs = [100 * published(results, row.id)[0] for row in group]
    axes.plot(names, theirs, "o", color=COLOURS[0], mfc="none", label=f"thesis, {experiment.epochs} epochs")
    axes.set_ylabel("Test accuracy (%), mean")
    axes.margins(x=0.15, y=0.4)
    axes.legend(loc="best")


def _first_seed(results: Results) -> list[Row]:
    """Return the rows whose curves are there for the thesis' seed."""
    ids = results.curves.loc[results.curves["seed"] == SEED, "id"].unique()
    return sorted(map(parse, ids), key=lambda row: row.place)


def _main_rows(results: Results) -> list[Row]:
    """Return the rows that no sweep is about: one of each method, number of workers and probability."""
    return [row for row in _first_seed(results) if row.period == 1 and row.alpha in (None, DEFAULT_ALPHA)]


def _curve(results: Results, row: Row, epochs: int | None = None) -> pd.DataFrame:
    """Return the first ``epochs`` epochs of the row's shortest run that has as many; None for its longest run."""
    curves = results.curves[(results.curves["id"] == row.id) & (results.curves["seed"] == SEED)]
    lengths = curves["epochs"].unique()
    length = max(lengths) if epochs is None else min(length for length in lengths if length >= epochs)
    return curves[curves["epochs"] == length].sort_values("updates").head(epochs or length)


def _panels(number: int) -> tuple[Figure, Sequence[Axes]]:
    columns = 1 if number == 1 else 2
    lines = math.ceil(number / columns)
    figure = plots.new_figure(max(5.6, 4.0 * columns), 2.8 * lines + 0.3)
    return figure, [figure.add_subplot(lines, columns, n + 1, ylabel="Validation accuracy (%)") for n in range(number)]


def _style(row: Row) -> dict[str, Any]:
    return {"color": _METHOD_COLOURS[row.method], "ls": _RATE_STYLES.get(row.rate, "-")}


def _draw(axes: Axes, curve: pd.DataFrame, x: pd.Series, label: str, **style: Any) -> None:
    axes.plot(x, 100 * curve["mean"], label=label, **style)
    axes.fill_between(x, 100 * curve["min"], 100 * curve["max"], color=style["color"], alpha=0.18, linewidth=0)


def _finish(axes: Axes, experiment: Experiment, abscissa: str) -> None:
    axes.set_xlabel(abscissa)
    ends = [float(line.get_ydata()[-1]) for line in axes.lines if len(line.get_ydata())]  # type: ignore[arg-type,index]
    if experiment.name in _SHOWN_FROM:
        axes.set_ylim(min(_SHOWN_FROM[experiment.name], *(end - 1.0 for end in ends)), max(ends) + 0.25)


def _legend(figure: Figure, axes: Axes, *, columns: int, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=columns, title=title)
