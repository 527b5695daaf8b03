"""Rows made into medians: one summary a model, number of ranks and set-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.shared.quartiles import ratios
from benchmarks.shared.rows import Row
from benchmarks.shared.tables import show

PARTS = ("snapshot_ms", "post_ms", "wait_ms", "mix_ms", "python_ms")
"""Where the training thread's time goes; see :class:`benchmarks.shared.meters.PartsMeter`."""


@dataclass(frozen=True)
class Summary:
    """One set-up over all rounds that its reference has too.

    Attributes:
        model, ranks, setup: which.
        rounds: number of them.
        step_ms: median.
        ratio: to the reference's step in the same round: lower quartile, median, upper quartile.
        cpu_ms, helper_cpu_ms: CPU time a step and rank: of all threads, and of those beside the training thread;
            medians.
        network_mb: sent a step and rank, loopback among it; mean.
        payload_mb: of it, snapshots, and those that went through shared memory; mean, nan where nobody counts.
        copies: peak memory a rank beyond the reference's, in sizes of the parameters; median.
        parts: of :data:`PARTS`, means; nan where there are none.
        idle_us: what the strategy adds to a step without an exchange; median, nan where there are none.
    """

    model: str
    ranks: int
    setup: str
    rounds: int
    step_ms: float
    ratio: tuple[float, float, float]
    cpu_ms: float
    helper_cpu_ms: float
    network_mb: float
    payload_mb: float
    copies: float
    parts: dict[str, float]
    idle_us: float


def summarize(rows: Sequence[Row], references: Mapping[str, str]) -> list[Summary]:
    """Return the summaries, in the order in which models, ranks and set-ups first appear in ``references``.

    Args:
        rows: of one file.
        references: for each set-up the one that it is compared with.
    """
    blocks: dict[tuple[str, int, str], dict[int, Row]] = {}
    for row in rows:
        blocks.setdefault((row["model"], int(row["ranks"]), row["setup"]), {})[int(row["round"])] = row
    cells = dict.fromkeys((model, ranks) for model, ranks, _ in blocks)
    found = []
    for model, ranks in cells:
        for setup, reference in references.items():
            own, other = blocks.get((model, ranks, setup), {}), blocks.get((model, ranks, reference), {})
            if common := sorted(own.keys() & other.keys()):
                found.append(_summary((model, ranks, setup), [own[r] for r in common], [other[r] for r in common]))
    return found


def _summary(key: tuple[str, int, str], own: list[Row], reference: list[Row]) -> Summary:
    def column(name: str, rows: list[Row] = own) -> np.ndarray:
        return np.array([float(row[name] or "nan") for row in rows])

    def mean(name: str) -> float:
        values = column(name)
        return float(np.nan if np.isnan(values).all() else np.nanmean(values))

    idle = column("idle_us")
    copies = (column("peak_mb") - column("peak_mb", reference)) / column("parameters_mb")
    return Summary(
        *key,
        rounds=len(own),
        step_ms=float(np.median(column("step_ms"))),
        ratio=ratios(column("step_ms"), column("step_ms", reference)),
        cpu_ms=float(np.median(column("cpu_ms"))),
        helper_cpu_ms=float(np.median(column("helper_cpu_ms"))),
        network_mb=mean("network_mb"),
        payload_mb=mean("payload_mb"),
        copies=float(np.median(copies)),
        parts={part: mean(part) for part in PARTS},
        idle_us=float(np.nan if np.isnan(idle).all() else np.nanmedian(idle)),
    )


def print_table(summaries: Sequence[Summary]) -> None:
    """Print the summaries of one model and number of ranks."""
    titles = ("set-up", "rounds", "step", "ratio", "quartiles", "CPU", "helpers'", "sent", "copies")
    parts = (part.removesuffix("_ms") for part in PARTS)
    title = f"{summaries[0].model}, {summaries[0].ranks} ranks; ms and MB a step and rank"
    show(title, (*titles, *parts, "idle, µs"), map(_cells, summaries))


def _cells(s: Summary) -> list[str]:
    low, median, high = s.ratio
    return [
        s.setup, str(s.rounds), _text(s.step_ms, 1), _text(median, 3), f"{low:.2f}–{high:.2f}", _text(s.cpu_ms, 1),
        _text(s.helper_cpu_ms, 1), _text(s.network_mb, 2), _text(s.copies, 2),
        *(_text(value, 2) for value in s.parts.values()), _text(s.idle_us, 0),
    ]  # fmt: skip


def _text(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{value:.{digits}f}"
