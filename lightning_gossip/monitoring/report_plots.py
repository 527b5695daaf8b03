"""The plots of a report: one colour and one marker a run, the mean over ranks as a line, min–max as a band."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_gossip.monitoring.event_files import Run

# Okabe and Ito's palette, told apart with every common colour blindness; its yellow is too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_MARKERS_A_LINE = 10
_WIDTH, _HEIGHT, _LEGEND_LINE = 5.0, 3.3, 0.16  # inches
DPI = 300
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.title_fontsize": 8.0,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
}
_WINDOWS = 25  # of quantities that vary from step to step
_SUBJECTS = {"consensus": ", consensus model", "replica": ", replicas"}
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_TIME_UNITS = ((7200.0, 3600.0, "h"), (600.0, 60.0, "min"), (0.0, 1.0, "s"))


@dataclass(frozen=True)
class Plot:
    """One quantity of several runs.

    Args:
        name: beginning of the file's name.
        label: what the vertical axis shows, with its unit.
        curves: the table of :meth:`Run.curve` of each run that has one, by the run's label.
        consensus: those of the consensus model where it was logged beside the replicas.
        log: whether the vertical axis is logarithmic; otherwise one of ``from_zero`` begins at 0.
        from_zero: see ``log``.
        note: what was done to the values, for the legend.
        subjects: what the values of a run are those of, for the legend.
    """

    name: str
    label: str
    curves: Mapping[str, pd.DataFrame]
    consensus: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    log: bool = False
    from_zero: bool = False
    note: str = ""
    subjects: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_band(self) -> bool:
        """Whether several ranks are in some curve."""
        return any((curve["ranks"] > 1).any() for curve in self.curves.values())


def accuracy_and_loss(
    runs: Mapping[str, Run], accuracy_tag: str | None = None, loss_tag: str | None = None
) -> list[Plot]:
    """Return the plots of validation accuracy and loss; a tag of ``None`` is chosen for each run."""
    plots = []
    for name, quantity, given in (("accuracy", "acc", accuracy_tag), ("loss", "loss", loss_tag)):
        tags = {label: given or run.validation_tag(quantity) for label, run in runs.items()}
        curves = _curves(runs, tags)
        consensus = _curves(runs, {label: run.validation_tag(quantity, consensus=True) for label, run in runs.items()})
        axis = f"Validation {name}" if given is None else given
        if name == "accuracy" and (given is None or "acc" in given.lower()):
            axis += " (%)"
            curves, consensus = (
                {label: as_percent(curve) for label, curve in family.items()} for family in (curves, consensus)
            )
        subjects = {label: _SUBJECTS.get(run.evaluated, "") for label, run in runs.items()}
        plots.append(Plot(name, axis, curves, consensus if curves else {}, subjects=subjects))
    return plots


def network(runs: Mapping[str, Run]) -> list[Plot]:
    """Return the plots of consensus and partner distance, traffic, waiting, staleness and lags."""
    sent = _either(runs, "gossip/bytes_sent", "downpour/bytes_sent")
    largest = max((float(np.nanmax(curve["high"])) for curve in sent.values()), default=0.0)
    scale, unit = next((pair for pair in _BYTE_UNITS if largest >= pair[0]), _BYTE_UNITS[-1])
    sent = {label: _scaled(curve, 1 / scale) for label, curve in sent.items()}
    waits = _either(runs, "gossip/wait_seconds", "downpour/wait_seconds", _WINDOWS)
    waits = {label: _scaled(curve, 1e3) for label, curve in waits.items()}
    distance = _curves(runs, dict.fromkeys(runs, "gossip/consensus_distance"))
    partners = _curves(runs, dict.fromkeys(runs, "gossip/partner_distance"), _WINDOWS)
    staleness = _curves(runs, dict.fromkeys(runs, "downpour/staleness"), _WINDOWS)
    lags = _curves(runs, dict.fromkeys(runs, "gossip/partner_step_lag"), _WINDOWS)
    busy = _curves(runs, dict.fromkeys(runs, "gossip/busy"))
    averaged = f"averaged over {_WINDOWS} spans of steps; "
    return [
        Plot("consensus_distance", "Consensus distance (relative)", distance, log=True),
        Plot("partner_distance", "Distance of partners (relative)", partners, log=True, note=averaged),
        Plot("bytes_sent", f"Sent by a rank since the start ({unit})", sent, from_zero=True),
        Plot("wait_seconds", "Waiting in a step (ms)", waits, from_zero=True, note=averaged),
        Plot("staleness", "Staleness (server updates by others)", staleness, from_zero=True, note=averaged),
        Plot("partner_step_lag", "Steps of which partners are behind", lags, note=averaged),
        Plot("busy", "Share of rounds without a partner", busy, from_zero=True),
    ]


def as_percent(curve: pd.DataFrame) -> pd.DataFrame:
    """Return the curve in percent: as it is, or times 100 where no value is above 1."""
    return _scaled(curve, 100.0 if np.nanmax(curve["high"]) <= 1.0 else 1.0)


def draw(plot: Plot, runs: Mapping[str, Run], out: Path, *, against: str = "step") -> Path:
    """Write ``plot`` as a PNG at 5 inches' width and 300 dots an inch.

    Args:
        plot: what to draw.
        runs: all runs of the report, by label; their order fixes colours, the same in every plot.
        out: an existing folder.
        against: ``"step"`` or ``"seconds"``.

    Returns:
        The file written.
    """
    legend = {label: textwrap.fill(label + plot.subjects.get(label, ""), 72) for label in plot.curves}
    lines = sum(text.count("\n") + 1 for text in legend.values()) + bool(plot.consensus) + 1
    last = max((float(np.nanmax(curve["seconds"])) for curve in plot.curves.values()), default=0.0)
    unit, unit_name = next((seconds, name) for least, seconds, name in _TIME_UNITS if last >= least)
    scale = 1.0 if against == "step" else unit
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT + _LEGEND_LINE * lines), layout="constrained")
        axes = figure.add_subplot(ylabel=plot.label)
        axes.set_xlabel("Updates of each replica" if against == "step" else f"Wall time ({unit_name})")
        if plot.log:
            axes.set_yscale("log")
        moments = {label: changes(run, against) for label, run in runs.items()}
        for index, label in enumerate(runs):
            style: dict[str, Any] = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": _MARKERS[index % len(_MARKERS)],
            }
            if label in plot.curves:
                curve = plot.curves[label]
                every = max(1, len(curve) // _MARKERS_A_LINE)
                # markers are staggered, so that runs which lie on each other all show
                style |= {"markevery": (index * every // len(runs), every), "label": legend[label]}
                if plot.from_zero:
                    style |= {"clip_on": False, "zorder": 3}  # a line at 0 is neither cut in half nor covered
                _draw_curve(axes, curve.assign(x=curve[against] / scale), style, log=plot.log)
            if label in plot.consensus:
                curve = plot.consensus[label]
                axes.plot(curve[against] / scale, curve["mean"], color=style["color"], linestyle="--")
            for tag, moment in moments[label]:
                axes.axvline(moment / scale, color=style["color"], linestyle=CHANGES[tag], linewidth=0.8, zorder=0)
        if plot.consensus:
            axes.plot([], [], color="0.35", linestyle="--", label="consensus model")
        if plot.from_zero:
            axes.set_ylim(bottom=0)
        spread = plot.has_band
        figure.legend(
            loc="outside lower center",
            title=plot.note
            + ("mean over ranks (line), min–max (band)" if spread else "")
            + ("; " if spread and any(moments.values()) else "")
            + ("a rank is lost (dots), or joins (dashes and dots)" if any(moments.values()) else ""),
        )
        file = out / f"{plot.name}_vs_{'updates' if against == 'step' else 'time'}.png"
        figure.savefig(file, dpi=DPI)
    return file


CHANGES = {"gossip/lost": ":", "gossip/joined": "-."}
"""How the moments are drawn at which each of these counts grows."""


def changes(run: Run, against: str) -> list[tuple[str, float]]:
    """Return when ranks were lost or joined: tag, and the step or seconds at which some rank first logged so many."""
    found = []
    for tag in CHANGES:
        if (curve := run.curve(tag)) is not None:
            most = curve["high"].cummax()
            found += [(tag, float(moment)) for moment in curve[against][most > most.shift(fill_value=0)]]
    return found


def _draw_curve(axes: Axes, curve: pd.DataFrame, style: Mapping[str, Any], *, log: bool) -> None:
    # equal replicas are at distance 0, which a logarithmic axis does not have
    shown = curve.where(curve[["mean", "low", "high"]].gt(0).all(axis=1)) if log else curve
    axes.plot(shown["x"], shown["mean"], **style)
    if (curve["ranks"] > 1).any():
        axes.fill_between(shown["x"], shown["low"], shown["high"], color=style["color"], alpha=0.18, linewidth=0)


def _curves(
    runs: Mapping[str, Run], tags: Mapping[str, str | None], windows: int | None = None
) -> dict[str, pd.DataFrame]:
    found = {label: run.curve(tags[label], windows) for label, run in runs.items()}
    # a curve of nothing but nan (a training that diverged at once) has no place on an axis
    return {label: curve for label, curve in found.items() if curve is not None and curve["mean"].notna().any()}


def _either(runs: Mapping[str, Run], first: str, second: str, windows: int | None = None) -> dict[str, pd.DataFrame]:
    return _curves(runs, {label: first if first in run.tags else second for label, run in runs.items()}, windows)


def _scaled(curve: pd.DataFrame, factor: float) -> pd.DataFrame:
    return curve.assign(**{column: curve[column] * factor for column in ("mean", "low", "high")})
