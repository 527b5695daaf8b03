"""The picture of a plan: a bar a scheme, in a panel for each quantity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_gossip.monitoring.plan import Plan, short
from lightning_gossip.monitoring.report_plots import COLOURS, STYLE

_DAY = 86_400
_DPI = 200


def draw(plan: Plan, file: Path) -> None:
    """Write ``plan`` as a PNG: steps a second, waiting, traffic, distance and memory."""
    outlooks = plan.outlooks.values()
    workload = plan.workload
    panels: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("Steps a second", [outlook.rate for outlook in outlooks], short),
        ("Time waited (%)", [100 * outlook.waited for outlook in outlooks], "{:.0f}".format),
        ("Sent by a rank (GB a day)", [outlook.sent * _DAY / 1e9 for outlook in outlooks], short),
        ("Consensus distance (steps)", [outlook.distance for outlook in outlooks], "{:.1f}".format),
        ("Memory beside the model (MB)", [outlook.memory / 1e6 for outlook in outlooks], short),
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(13.0, 1.4 + 0.24 * len(plan.outlooks)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for panel, (label, values, form) in zip(axes, panels, strict=True):
            _bars(panel, plan, values, form)
            panel.set_xlabel(label)
        axes[0].axvline(workload.rate_alone, color="0.3", linewidth=0.8, linestyle="--")
        axes[0].set_yticks(range(len(plan.outlooks)), [scheme.name for scheme in plan.outlooks])
        axes[0].set_ylim(len(plan.outlooks) - 0.4, -0.6)
        slow = f", one of them {workload.straggler:g} times slower" if workload.straggler > 1 else ""
        figure.suptitle(
            f"{workload.parameters:,} parameters, {workload.ranks} ranks{slow}, {workload.mbit:g} Mbit/s, "
            f"{workload.latency_ms:g} ms, steps of {workload.step_ms:.3g} ms (dashed: without communication); "
            f"orange: recommended",
            fontsize="medium",
        )
        figure.savefig(file, dpi=_DPI)


def _bars(axes: Axes, plan: Plan, values: list[float | None], form: Callable[[float], str]) -> None:
    known = [value for value in values if value is not None]
    for place, (scheme, value) in enumerate(zip(plan.outlooks, values, strict=True)):
        colour = COLOURS[1] if scheme is plan.recommended else COLOURS[0]
        axes.barh(place, value or 0.0, color=colour, height=0.7)
        text = "unknown" if value is None else form(value)
        axes.annotate(
            text,
            (value or 0.0, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
    axes.set_xlim(0, 1.25 * max(known, default=0.0) or 1.0)
    axes.grid(axis="y", visible=False)
