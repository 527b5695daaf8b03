"""The table and the picture of the rows that are there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from language_model import GPT, SIZES
from numpy.typing import NDArray

from benchmarks.shared import plots
from benchmarks.shared.plots import COLOURS, Axes, Figure
from benchmarks.shared.rows import Row as Line
from benchmarks.shared.rows import find, read
from benchmarks.shared.tables import markdown
from benchmarks.text import links, step
from benchmarks.text.schemes import POWERSGD_START, ROWS, TITLES, Row
from benchmarks.text.training import Setting

MARGIN = 1.03
"""Of DDP's last loss: what the time to get there is compared at."""
HIGHEST = 3.3
"""Nats a byte at the top of the picture."""

TICKS = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
"""Of logarithmic axes."""


@dataclass(frozen=True)
class Curve:
    """A training, whole; arrays of one number a look.

    Attributes:
        row, seed: which.
        updates, loss, mb_sent: so far; of the consensus; sent by a rank.
        replicas: losses of all at the end.
        distance: consensus distance at the end, relative.
        seconds: computed on slow links; nan where steps were not measured.
    """

    row: Row
    seed: int
    updates: NDArray[np.float64]
    loss: NDArray[np.float64]
    mb_sent: NDArray[np.float64]
    replicas: list[float]
    distance: float
    seconds: NDArray[np.float64]

    def reaches(self, loss: float) -> float:
        """Return the seconds after which the consensus first has ``loss``, between two looks on a line; nan if never.

        A look lies on the curve where it is the best so far.
        """
        best = np.minimum.accumulate(self.loss)
        if best[-1] > loss:
            return math.nan
        after = int(np.argmax(best <= loss))
        if after == 0:
            return float(self.seconds[0])
        part = (best[after - 1] - loss) / (best[after - 1] - best[after])
        return float(self.seconds[after - 1] + part * (self.seconds[after] - self.seconds[after - 1]))


def payload(model: str) -> int:
    """Return the bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in GPT(SIZES[model]).parameters())


def load(folder: Path, setting: Setting, names: Iterable[str], seeds: Iterable[int]) -> dict[str, list[Curve]]:
    """Return the whole trainings of rows by their ids ``names``, for ``seeds`` in place of the setting's."""
    done, points = read(folder / "text.csv"), read(folder / "text_curves.csv")
    curves: dict[str, list[Curve]] = {}
    for name in names:
        row = ROWS[name]
        machine = {"model": setting.model, "context": setting.context, "windows": setting.batch // row.ranks}
        steps = step.seconds(folder, machine)
        for seed in seeds:
            key = {"id": name, **asdict(replace(setting, seed=seed))}
            if (ends := find(done, key)) and (own := find(points, key)):
                curves.setdefault(name, []).append(_curve(row, seed, own, ends[-1], steps, setting))
    return curves


def tried(folder: Path, setting: Setting) -> str:
    """Return a table in Markdown: losses by learning rate, of rows in which more than one was tried with this seed."""
    given = {key: value for key, value in asdict(setting).items() if key != "lr"}
    losses: dict[str, dict[float, str]] = {}
    for line in find(read(folder / "text.csv"), given):
        losses.setdefault(line["id"], {})[float(line["lr"])] = f"{float(line['loss']):.3f}"
    rates = sorted({rate for own in losses.values() for rate in own})
    rows = [[ROWS[name].title, *(own.get(rate, "") for rate in rates)] for name, own in losses.items() if len(own) > 1]
    return "\n".join(markdown(("learning rate", *(f"{rate:g}" for rate in rates)), rows))


def _curve(
    row: Row, seed: int, points: Sequence[Line], end: Line, steps: Mapping[str, float], setting: Setting
) -> Curve:
    looks = {int(point["updates"]): point for point in points}  # one that was ended in its report is there twice
    columns = {name: np.array([float(p[name]) for p in looks.values()]) for name in ("updates", "loss", "mb_sent")}
    size = payload(setting.model)
    compressed = 0.0
    if row.scheme.startswith("powersgd"):
        in_all = 1e6 * columns["mb_sent"][-1] / links.ring(row.ranks) - POWERSGD_START * size
        compressed = in_all / (columns["updates"][-1] - POWERSGD_START)
    link = links.Link(steps.get("none", math.nan), size, compressed, steps.get(row.scheme, math.nan))
    seconds = np.array([link.seconds(row, int(updates)) for updates in columns["updates"]])
    last = [float(loss) for loss in looks[max(looks)]["replicas"].split()]
    return Curve(row, seed, **columns, replicas=last, distance=float(end["distance"]), seconds=seconds)


def table(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Return a table in Markdown: means over seeds, the smallest and largest in brackets."""
    head = (
        "scheme", "seeds", "loss, consensus", "to DDP's", "replicas", "distance", "MB sent", "to DDP's",
        "s at 200 Mbit/s", f"sooner to DDP's + {100 * MARGIN - 100:.0f} %",
    )  # fmt: skip
    ddp = {curve.seed: curve for curve in curves.get("ddp", [])}
    rows = []
    for own in curves.values():
        losses = [curve.loss[-1] for curve in own]
        both = [(curve, ddp[curve.seed]) for curve in own if curve.seed in ddp]
        of_replicas = [loss for curve in own for loss in curve.replicas]
        sent = float(np.mean([curve.mb_sent[-1] for curve in own]))
        rows.append([
            own[0].row.title, f"{len(own)}", _spread(losses, ".3f"),
            _spread([100 * (curve.loss[-1] / other.loss[-1] - 1) for curve, other in both], "+.1f", " %"),
            f"{min(of_replicas):.3f}–{max(of_replicas):.3f}", f"{np.mean([c.distance for c in own]):.3f}",
            f"{sent:,.0f}", f"{np.mean([c.mb_sent[-1] / o.mb_sent[-1] for c, o in both]):.4f}" if both else "",
            _spread([float(np.mean([curve.seconds[-1] for curve in own]))], ",.0f"),
            _spread([sooner(curve, other) for curve, other in both], ".1f", "×"),
        ])  # fmt: skip
    return "\n".join(markdown(head, rows))


def sooner(curve: Curve, ddp: Curve) -> float:
    """Return DDP's time to its own last loss and a margin, over a curve's to the same loss; nan if it gets nowhere."""
    loss = MARGIN * float(ddp.loss[-1])
    return ddp.reaches(loss) / curve.reaches(loss)


def against_diloco(curves: Mapping[str, Sequence[Curve]]) -> list[str]:
    """Return sentences: elastic gossip with an outer step beside DiLoCo, seed by seed."""
    lines = []
    for name, own in curves.items():
        other = {curve.seed: curve for curve in curves.get(name.replace("elastic-outer", "diloco"), [])}
        pairs = [(curve, other[curve.seed]) for curve in own if curve.seed in other]
        if own[0].row.scheme == "elastic-outer" and pairs:
            more = [100 * (curve.loss[-1] / diloco.loss[-1] - 1) for curve, diloco in pairs]
            sent = np.mean([curve.mb_sent[-1] / diloco.mb_sent[-1] for curve, diloco in pairs])
            lines.append(f"{own[0].row.title}: {_spread(more, '+.2f', ' %')} of DiLoCo's loss, {sent:.3f} of its bytes")
    return lines


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    if not values or any(math.isnan(value) for value in values):
        return "–" if values else ""
    mean = f"{np.mean(values):{form}}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def figure(curves: Mapping[str, Sequence[Curve]], ranks: int = 4) -> Figure | None:
    """Return the picture: the consensus' loss against updates, bytes and time, a band over seeds; None without rows."""
    shown = {name: own for name, own in curves.items() if own[0].row.ranks == ranks}
    if not shown:
        return None
    picture = plots.new_figure(11.0, 4.4)
    panels = plots.panels(picture, 3)
    labels = ("Updates", "MB sent by a rank", "Seconds on links of 200 Mbit/s (computed)")
    for panel, label, axis in zip(panels, labels, ("updates", "mb_sent", "seconds"), strict=True):
        for own in shown.values():
            _draw(panel, own, axis)
        panel.set(xlabel=label, ylim=(None, HIGHEST))
        if axis != "updates":
            panel.set_xscale("log")
            low, high = panel.get_xlim()
            ticks = [tick for tick in TICKS if low <= tick <= high]
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            panel.minorticks_off()
    panels[0].set_ylabel("Validation loss of the consensus (nats a byte)")
    handles, names = panels[0].get_legend_handles_labels()
    picture.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7)
    return picture


def _draw(panel: Axes, own: Sequence[Curve], axis: str) -> None:
    row = own[0].row
    colour = dict(zip(TITLES, ("0.6", *COLOURS), strict=False))[row.scheme]
    style = "--" if row.period == 100 else "-"
    places = np.mean([getattr(curve, axis) for curve in own], axis=0)
    losses = np.array([curve.loss for curve in own])
    seen = places > 0
    panel.plot(places[seen], losses.mean(axis=0)[seen], style, color=colour, linewidth=1.3, label=row.title)
    low, high = losses.min(axis=0)[seen], losses.max(axis=0)[seen]
    panel.fill_between(places[seen], low, high, color=colour, alpha=0.15, linewidth=0)


def draw(curves: Mapping[str, Sequence[Curve]], folder: Path) -> list[Path]:
    """Write the picture and return its file."""
    return plots.draw({folder / "text.png": lambda: figure(curves)})
