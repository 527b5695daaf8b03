"""A report as one page: the plots of ``report_plots``, of which runs can be picked, in a file that needs no other.

Drawn by plotly, whose script is in the page. A box a run shows and hides it in all plots, and one choice sets what
all of them run against.
"""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plotly import graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.offline import get_plotlyjs

from lightning_gossip.monitoring.event_files import Run
from lightning_gossip.monitoring.report_plots import COLOURS, Plot, changes

_AGAINST = {"step": "Updates of each replica", "seconds": "Wall time (s)"}
_EVENTS = {"gossip/lost": ("dot", "a rank is lost"), "gossip/joined": ("dashdot", "a rank joins")}
_EVENT_AXIS = "y2"
"""Of moments at which ranks are lost or join: from the bottom of a plot to its top."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1240px; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th.word, td.word { text-align: left }
#choices { position: sticky; top: 0; background: #fffd; padding: .5rem 0; z-index: 9 }
#choices { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem }
#plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 1rem }
.plot { height: 380px } .swatch { display: inline-block; width: 1.1em; height: .7em; margin-right: .3em }
p.note { color: #555; font-size: 13px }
"""

_SCRIPT = """
const BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
const plots = [...document.querySelectorAll(".plot")];
const figures = JSON.parse(document.getElementById("figures").textContent);
const shown = run => document.getElementById("run" + run).checked;
const against = () => document.querySelector("input[name=against]:checked").value;
function draw() {
  plots.forEach((plot, n) => {
    const figure = structuredClone(figures[n]);
    for (const trace of figure.data) {
      trace.visible = shown(trace.meta.run);
      trace.x = trace.meta[against()];
    }
    figure.layout.xaxis.title = {text: NAMES[against()]};
    Plotly.react(plot, figure.data, figure.layout, {responsive: true, displaylogo: false, modeBarButtons: BUTTONS});
  });
}
document.querySelectorAll("input").forEach(input => input.addEventListener("change", draw));
draw();
"""


def write_page(
    plots: Iterable[Plot], runs: Mapping[str, Run], table: Sequence[Sequence[str]], words: Collection[str], file: Path
) -> Path:
    """Write the page.

    Args:
        plots: what to draw; those without curves are left out.
        runs: all runs of the report, by label; their order fixes colours.
        table: headings, then a row a run, as text.
        words: headings of the columns that hold no numbers.
        file: to write.

    Returns:
        ``file``.
    """
    drawn = [plot for plot in plots if plot.curves]
    figures = [json.loads(_figure(plot, runs).to_json()) for plot in drawn]
    for figure in figures:
        figure["layout"].pop("template", None)
    boxes = [
        f'<label><input type="checkbox" id="run{n}" checked>'
        f'<span class="swatch" style="background:{_colour(n)}"></span>{html.escape(label)}</label>'
        for n, label in enumerate(runs)
    ]
    choices = [
        f'<label><input type="radio" name="against" value="{key}"{" checked" * (key == "step")}>'
        f"{html.escape(name)}</label>"
        for key, name in _AGAINST.items()
    ]
    file.write_text(
        "\n".join(
            [
                '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>lightning-gossip report</title>',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>",
                f"<h1>{len(runs)} run{'s' * (len(runs) > 1)}</h1>",
                f'<div id="choices">{"".join(boxes)}{"".join(choices)}</div>',
                f'<div id="plots">{"".join(_place(plot, runs) for plot in drawn)}</div>',
                f"<h2>Last values</h2>{_table(table, words)}",
                f'<script type="application/json" id="figures">{_inert(json.dumps(figures))}</script>',
                f"<script>const NAMES = {_inert(json.dumps(_AGAINST))};{_SCRIPT}</script></body></html>",
            ]
        )
    )
    return file


def _place(plot: Plot, runs: Mapping[str, Run]) -> str:
    notes = [plot.note.rstrip("; "), "mean over ranks (line), min–max (band)" if plot.has_band else ""]
    notes.append("consensus model (dashes)" if plot.consensus else "")
    if any(changes(run, "step") for label, run in runs.items() if label in plot.curves):
        notes.append("a rank is lost (dots), or joins (dashes and dots)")
    note = "; ".join(filter(None, notes))
    return f'<div><div class="plot" id="{html.escape(plot.name)}"></div><p class="note">{html.escape(note)}</p></div>'


def _figure(plot: Plot, runs: Mapping[str, Run]) -> go.Figure:
    figure = go.Figure()
    for number, (label, run) in enumerate(runs.items()):
        line = {"color": _colour(number)}
        if label in plot.curves:
            curve = plot.curves[label]
            if (curve["ranks"] > 1).any():
                r, g, b = hex_to_rgb(_colour(number))
                hidden = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
                figure.add_trace(_trace(curve, "low", number, plot.log, **hidden))
                fill = {"fill": "tonexty", "fillcolor": f"rgba({r},{g},{b},0.18)"}
                figure.add_trace(_trace(curve, "high", number, plot.log, **hidden, **fill))
            name = label + plot.subjects.get(label, "")
            figure.add_trace(_trace(curve, "mean", number, plot.log, name=name, mode="lines+markers", line=line))
        if label in plot.consensus:
            dashed = line | {"dash": "dash"}
            name = f"{label}, consensus model"
            figure.add_trace(_trace(plot.consensus[label], "mean", number, plot.log, name=name, line=dashed))
        if label in plot.curves or label in plot.consensus:
            figure.add_traces(_moments(run, number))
    axis: dict[str, Any] = {"title": {"text": plot.label}, "gridcolor": "#e5e5e5", "exponentformat": "power"}
    axis |= {"type": "log"} if plot.log else {"rangemode": "tozero"} if plot.from_zero else {}
    figure.update_layout(
        showlegend=False,
        margin={"l": 70, "r": 15, "t": 15, "b": 50},
        plot_bgcolor="white",
        hovermode="closest",
        xaxis={"gridcolor": "#e5e5e5", "zeroline": False},
        yaxis=axis,
        yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    )
    figure.update_traces(marker={"size": 4}, selector={"mode": "lines+markers"})
    return figure


def _trace(curve: pd.DataFrame, column: str, run: int, log: bool, **options: Any) -> go.Scatter:
    """Return one line of a curve; on a logarithmic axis what is not above 0 is left out."""
    shown = curve[curve[["mean", "low", "high"]].gt(0).all(axis=1)] if log else curve
    values = [None if np.isnan(value) else float(value) for value in shown[column]]
    meta = {"run": run} | {key: shown[key].astype(float).tolist() for key in _AGAINST}
    return go.Scatter(x=meta["step"], y=values, meta=meta, **({"hovertemplate": "%{y:.4g}"} | options))


def _moments(run: Run, number: int) -> list[go.Scatter]:
    """Return lines at the moments at which ranks were lost or joined."""
    traces = []
    for tag, (dash, name) in _EVENTS.items():
        meta: dict[str, Any] = {"run": number}
        for key in _AGAINST:
            moments = [moment for found, moment in changes(run, key) if found == tag]
            meta[key] = [x for moment in moments for x in (moment, moment, None)]
        if meta["step"]:
            heights = [0, 1, None] * (len(meta["step"]) // 3)
            line = {"color": _colour(number), "dash": dash, "width": 1}
            options = {"name": name, "mode": "lines", "line": line, "yaxis": _EVENT_AXIS, "hovertemplate": name}
            traces.append(go.Scatter(x=meta["step"], y=heights, meta=meta, **options))
    return traces


def _table(table: Sequence[Sequence[str]], words: Collection[str]) -> str:
    head, *rows = table

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=word' * (heading in words)}>{html.escape(cell)}</{tag}>"
            for heading, cell in zip(head, cells, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _inert(text: str) -> str:
    """Return JSON that ends no script, whatever a run is called."""
    return text.replace("<", "\\u003c")
