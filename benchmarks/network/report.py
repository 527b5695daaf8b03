"""Tables and pictures of the rows that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from benchmarks.network.schemes import (
    ACCURACY,
    ACCURACY_FILE,
    ASYNCHRONOUS,
    FILES,
    GOSSIP,
    HOOKED,
    OUTER,
    OUTER_SETUPS,
    SETUPS,
    STALLING,
    TORCHFT,
)
from benchmarks.shared import plots
from benchmarks.shared.plots import COLOURS, Axes, Figure
from benchmarks.shared.quartiles import quartiles, ratios, without_slowest
from benchmarks.shared.rows import Row, find, read
from benchmarks.shared.tables import show

_UNEVEN_LABELS = {
    "stalls": "Step, to a rank's own mean step",
    "straggler": "Step of the other ranks, to their own",
}

Steps = dict[str, NDArray[np.float64]]
"""Milliseconds a step of each set-up, one number a round; all of the same rounds."""


def whole_rounds(rows: Sequence[Row], setups: Sequence[str], column: str = "step_ms") -> Steps:
    """Return ``column`` of those rounds in which all set-ups have run, of rows at one rate; nan where it is empty."""
    by_setup = {name: {row["round"]: row for row in rows if row["setup"] == name} for name in setups}
    rounds = sorted(set.intersection(*(set(blocks) for blocks in by_setup.values())), key=int)
    return {
        name: np.array([float(blocks[round_][column] or "nan") for round_ in rounds])
        for name, blocks in by_setup.items()
    }


def setups_of(kind: str) -> Sequence[str]:
    """Return the names of the set-ups that are measured for a kind of :data:`FILES`."""
    return {"rates": SETUPS, "outer": OUTER_SETUPS}.get(kind, STALLING)


def steps_of(kind: str, rows: Sequence[Row]) -> Steps:
    """Return the steps of all set-ups of a kind at one rate; of those that are there, where torchft may be missing."""
    there = {row["setup"] for row in rows}
    return whole_rounds(rows, [name for name in setups_of(kind) if kind != "outer" or name in there])


def alone(steps: Steps, setup: str) -> NDArray[np.float64]:
    """Return a step without communication, of the loop in which ``setup`` trains."""
    return steps["plain none" if setup.startswith(("plain", "torchft")) else "none"]


def rates_of(rows: Sequence[Row]) -> list[str]:
    return sorted({row["rate_mbit"] for row in rows}, key=float)


def updates_to_accuracy(folder: Path) -> dict[str, int]:
    """Return the updates after which each set-up's consensus model first had :data:`ACCURACY` on the validation set."""
    reached: dict[str, int] = {}
    for row in read(folder / ACCURACY_FILE):
        if float(row["accuracy"]) >= ACCURACY:
            reached[row["setup"]] = min(int(row["updates"]), reached.get(row["setup"], 2**62))
    return reached


def print_tables(folder: Path, kinds: Iterable[str]) -> None:
    """Print what is there, a table a rate."""
    for kind in kinds:
        rows = read(folder / FILES[kind])
        for rate in rates_of(rows):
            at_rate = find(rows, {"rate_mbit": rate})
            steps = steps_of(kind, at_rate)
            if not len(steps["none"]):
                print(f"{kind}: no whole round yet at {rate} Mbit/s")
            elif kind == "rates":
                _show_rates(at_rate, steps, float(rate), updates_to_accuracy(folder))
            elif kind == "outer":
                _show_outer(at_rate, steps, float(rate))
            elif kind == "stalls":
                _show_stalls(steps)
            else:
                _show_straggler(at_rate, steps)


def _show_rates(rows: Sequence[Row], steps: Steps, rate: float, updates: Mapping[str, int]) -> None:
    payload, sent, use = (whole_rounds(rows, SETUPS, name) for name in ("payload_mb", "network_mb", "link_use"))
    of_steps = ("step, ms", "quartiles", "steps/s", "to none", "quartiles", "to DDP's")
    head = ("set-up", *of_steps, "payload, MB", "link, %", "alone, %", "updates to 97 %", "s to 97 %")
    table = []
    for name in SETUPS:
        low, step, high = quartiles(steps[name])
        to_none = ratios(steps[name], steps["none"])
        share = sent[name] * 8e6 / (rate * 1e6) / (steps[name] / 1e3)
        alone = np.median(use[name])
        table.append([
            name, f"{step:.1f}", f"{low:.1f}–{high:.1f}", f"{1e3 / step:.2f}",
            f"{to_none[1]:.2f}", f"{to_none[0]:.2f}–{to_none[2]:.2f}",
            f"{ratios(steps['ddp'], steps[name])[1]:.2f}",
            "" if np.isnan(payload[name]).all() else f"{np.median(payload[name]):.2f}",
            "" if name == "downpour" else f"{100 * np.median(share):.0f}",  # rank 0 reaches it over loopback
            "" if np.isnan(alone) else f"{100 * alone:.1f}",
            f"{updates[name]:,}" if name in updates else "",
            f"{updates[name] * step / 1e3:.0f}" if name in updates else "",
        ])  # fmt: skip
    show(f"{rate:g} Mbit/s, {len(steps['none'])} rounds: medians over rounds", head, table)


def _show_outer(rows: Sequence[Row], steps: Steps, rate: float) -> None:
    columns = ("payload_mb", "network_mb", "peak_mb_s")
    payload, sent, peak = (whole_rounds(rows, list(steps), name) for name in columns)
    head = ("set-up", "step, ms", "to none", "quartiles", "DDP's to it", "payload, MB", "sent, MB", "peak, MB/s")
    table = []
    for name, step in steps.items():
        low, to_none, high = ratios(step, alone(steps, name))
        table.append([
            name, f"{np.median(step):.1f}", f"{to_none:.2f}", f"{low:.2f}–{high:.2f}",
            f"{ratios(steps['ddp'], step)[1]:.1f}",
            "" if np.isnan(payload[name]).all() else f"{np.median(payload[name]):.3f}",
            f"{np.median(sent[name]):.3f}", f"{np.median(peak[name]):.1f}",
        ])  # fmt: skip
    show(f"outer steps, {rate:g} Mbit/s, {len(steps['none'])} rounds: medians over rounds", head, table)
    whole, parts = "DiLoCo, period 32, delay 31", "DiLoCo, period 32, fragments 4, delay 15"
    low, middle, high = ratios(peak[parts], peak[whole])
    print(f"peak of 4 fragments to that of one: {middle:.2f} ({low:.2f}–{high:.2f})")


def _show_stalls(steps: Steps) -> None:
    table = []
    for name in STALLING:
        low, median, high = ratios(steps[name], steps["none"])
        table.append([name, f"{np.median(steps[name]):.1f}", f"{median:.3f}", f"{low:.3f}–{high:.3f}"])
    title = f"stalls, {len(steps['none'])} rounds: to a rank's own mean step (no communication, the same stalls)"
    show(title, ("set-up", "step, ms", "to own mean", "quartiles"), table)


def _show_straggler(rows: Sequence[Row], steps: Steps) -> None:
    slowest = whole_rounds(rows, STALLING, "step_max_ms")
    others = of_others(rows, steps)
    table = []
    for name in STALLING:
        low, median, high = ratios(others[name], others["none"])
        slow = f"{np.median(slowest[name]):.1f}"
        table.append([name, f"{np.median(others[name]):.1f}", f"{median:.2f}", f"{low:.2f}–{high:.2f}", slow])
    title = f"one rank is slow, {len(steps['none'])} rounds: steps of the others, and to theirs without communication"
    show(title, ("set-up", "others, ms", "to own", "quartiles", "slow rank, ms"), table)


def of_others(rows: Sequence[Row], steps: Steps) -> Steps:
    """Return the mean steps of the ranks that are not the slow one."""
    slowest, ranks = whole_rounds(rows, STALLING, "step_max_ms"), int(rows[0]["ranks"])
    return {name: without_slowest(steps[name], slowest[name], ranks) for name in STALLING}


def draw(folder: Path) -> list[Path]:
    """Draw what the rows are there for, and return the files."""
    return plots.draw({
        folder / "network.png": lambda: _rates_figure(folder),
        folder / "network_uneven.png": lambda: _uneven_figure(folder),
        folder / "network_outer.png": lambda: _outer_figure(folder),
    })  # fmt: skip


def _rates_figure(folder: Path) -> Figure | None:
    def shown(rows: Sequence[Row]) -> Steps:
        steps = steps_of("rates", rows)
        return {name: 1e3 / steps[name] for name in SETUPS if name != "none again"}

    return _figure_of_rates(
        read(folder / FILES["rates"]), shown, left=2.0, each=2.4, height=3.4, form="{:.1f}", label="Steps a second"
    )


def _figure_of_rates(
    rows: Sequence[Row],
    shown: Callable[[Sequence[Row]], Steps],
    *,
    left: float,
    each: float,
    height: float,
    form: str,
    label: str,
) -> Figure | None:
    """Draw what is ``shown`` of the rows at each rate that has a whole round; None where none has."""
    at_rates = {rate: shown(find(rows, {"rate_mbit": rate})) for rate in rates_of(rows)}
    at_rates = {rate: values for rate, values in at_rates.items() if all(map(len, values.values()))}
    if not at_rates:
        return None
    figure = plots.new_figure(left + each * len(at_rates), height)
    for axes, (rate, values) in zip(plots.panels(figure, len(at_rates)), at_rates.items(), strict=True):
        axes.set_title(f"{float(rate):,.0f} Mbit/s", fontsize="medium")
        _bars(axes, values, form)
        axes.set_xlabel(label)
    return figure


def _uneven_figure(folder: Path) -> Figure | None:
    panels: list[tuple[str, Steps, str]] = []
    for kind, title in (("stalls", "Every rank stalls now and then"), ("straggler", "One rank takes 3 times as long")):
        rows = read(folder / FILES[kind])
        steps = whole_rounds(rows, STALLING) if rows else {"none": np.zeros(0)}
        if not len(steps["none"]):
            continue
        own = steps if kind == "stalls" else of_others(rows, steps)
        shown = {name: own[name] / own["none"] for name in STALLING if not name.startswith("none")}
        panels.append((title, shown, _UNEVEN_LABELS[kind]))
    if not panels:
        return None
    figure = plots.new_figure(2.0 + 2.8 * len(panels), 2.8)
    for axes, (title, shown, label) in zip(plots.panels(figure, len(panels)), panels, strict=True):
        axes.set_title(title, fontsize="medium")
        _bars(axes, shown, "{:.2f}")
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.set_xlabel(label)
    return figure


def _outer_figure(folder: Path) -> Figure | None:
    def shown(rows: Sequence[Row]) -> Steps:
        steps = steps_of("outer", rows)
        return {name: step / alone(steps, name) for name, step in steps.items() if "none" not in name}

    label = "Step, to one without communication"
    figure = _figure_of_rates(
        read(folder / FILES["outer"]), shown, left=2.8, each=3.2, height=3.8, form="{:.2f}", label=label
    )
    for axes in () if figure is None else figure.axes:
        axes.set_xscale("log")
        axes.set_xlim(0.8, 1.5 * axes.get_xlim()[1])
        axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color="0.3", linewidth=0.8)
    return figure


def _bars(axes: Axes, values: Steps, form: str) -> None:
    """Draw medians with quartiles, the first on top."""
    colours = {"none": "0.6", "ddp": COLOURS[1], "downpour": COLOURS[2]}
    kinds: dict[str, Iterable[str]] = {COLOURS[0]: (*GOSSIP, *OUTER), COLOURS[3]: ASYNCHRONOUS, COLOURS[1]: HOOKED}
    colours |= {name: colour for colour, names in kinds.items() for name in names} | dict.fromkeys(TORCHFT, "0.6")
    for place, (name, value) in enumerate(values.items()):
        low, median, high = quartiles(value)
        error = [[median - low], [high - median]]
        axes.barh(place, median, xerr=error, color=colours[name], height=0.7, error_kw={"elinewidth": 0.8})
        axes.annotate(form.format(median), (high, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    labels = {"none": "no communication", "ddp": "DDP", "downpour": "Downpour"}
    labels |= {name: f"gossip, {name}" for name in (*GOSSIP, *ASYNCHRONOUS)}
    labels |= {name: name.replace("ddp", "DDP") for name in HOOKED}
    axes.set_yticks(range(len(values)), [labels.get(name, name) for name in values])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(quartiles(value)[2] for value in values.values()))
    axes.grid(axis="y", visible=False)
