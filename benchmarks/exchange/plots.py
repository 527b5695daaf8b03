"""The picture: step times relative to no communication, a panel a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.exchange.summary import Summary
from benchmarks.shared import plots
from benchmarks.shared.plots import COLOURS, Figure


def draw(summaries: Sequence[Summary], bars: Mapping[tuple[str, int, str], float], out: Path) -> None:
    """Write the picture to ``out``.

    Args:
        summaries: what was measured.
        bars: ratios not to be exceeded, by model, ranks and set-up; drawn as short lines.
        out: a PNG file.
    """
    plots.draw({out: lambda: _step_times(summaries, bars)}, dpi=plots.DPI / 2)


def _step_times(summaries: Sequence[Summary], bars: Mapping[tuple[str, int, str], float]) -> Figure:
    models, ranks, setups = (
        list(dict.fromkeys(getattr(s, key) for s in summaries)) for key in ("model", "ranks", "setup")
    )
    ranks.sort()
    height = 0.8 / len(ranks)
    figure = plots.new_figure(2.2 + 2.4 * len(models), 1.3 + 0.34 * len(setups))
    panels = plots.panels(figure, len(models))
    for panel, model in zip(panels, models, strict=True):
        panel.set_title(model)
        panel.axvline(1.0, color="black", linewidth=0.8)
        for index, size in enumerate(ranks):
            chosen = [s for s in summaries if s.model == model and s.ranks == size]
            places = np.array([setups.index(s.setup) + (index - (len(ranks) - 1) / 2) * height for s in chosen])
            low, median, high = np.array([s.ratio for s in chosen]).reshape(-1, 3).T
            panel.errorbar(
                median, places, xerr=[median - low, high - median], fmt="osD"[index % 3],
                color=COLOURS[index], capsize=2, label=f"{size} ranks",
            )  # fmt: skip
            for y, setup in zip(places, (s.setup for s in chosen), strict=True):
                if (limit := bars.get((model, size, setup))) is not None:
                    panel.plot([limit] * 2, [y - 0.45 * height, y + 0.45 * height], color="black", linewidth=1.6)
        panel.set_ylim(len(setups) - 0.5, -0.5)
        panel.set_xlabel("step time / no communication")
    panels[0].set_yticks(range(len(setups)), setups)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ranks),
        title="medians and quartiles over rounds; black: bars that were set",
    )  # fmt: skip
    return figure
