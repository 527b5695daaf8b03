"""Pictures: figures in the style of the package's reports, drawn from rows that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_gossip.monitoring.report_plots import COLOURS, DPI, STYLE

__all__ = ["COLOURS", "DPI", "Axes", "Figure", "draw", "new_figure", "panels"]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(figure: Figure, count: int, share_y: bool = True) -> list[Axes]:
    """Return ``count`` panels side by side, by default with one vertical axis."""
    axes: Any = figure.subplots(1, count, sharey=share_y, squeeze=False)
    return list(axes[0])


def draw(plots: Mapping[Path, Callable[[], Figure | None]], dpi: float = DPI) -> list[Path]:
    """Write PNG files, print the names of those written, and return them.

    Args:
        plots: for each file what makes its figure; None where no rows are there for it.
        dpi: of the pictures.
    """
    files = []
    with rc_context(STYLE):
        for file, plot in plots.items():
            figure = plot()
            if figure is not None:
                figure.savefig(file, dpi=dpi)
                files.append(file)
                print(file)
    return files
