"""The rows of an experiment beside the published ones, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
from thesis_results import Results
from thesis_rows import Experiment, parse

_OURS = ("row", "seed", "ours: mean (min–max)", "consensus")
_THEIRS = ("thesis: mean", "consensus", "difference: mean", "consensus")
_LEFT = {_OURS[0], _OURS[2]}
"""Columns of text; numbers stand to the right."""


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows by workers, then from the most communication to the least, then by seed."""
    places = [(*parse(row_id).place, seed) for row_id, seed in zip(rows["id"], rows["seed"], strict=True)]
    return rows.iloc[sorted(range(len(rows)), key=places.__getitem__)]


def published(results: Results, row_id: str) -> tuple[float, float]:
    """Return the thesis' test accuracies: mean over the replicas, or rank 0's where that is all there is, and
    the consensus model's; nan for what is not known."""
    if row_id not in results.reference.index:
        return math.nan, math.nan
    row = results.reference.loc[row_id]
    mean = row["rank0_test_accuracy"] if pd.isna(row["mean_over_ranks"]) else row["mean_over_ranks"]
    return float(mean), float(row["consensus_test_accuracy"])


def as_markdown(experiment: Experiment, results: Results) -> str:
    """Return a table for each number of epochs; test accuracies in percent, differences in points."""
    head = [*_OURS, *(() if results.reference.empty else _THEIRS), "sent by a worker (GB)"]
    rule = ["---" if title in _LEFT else "---:" for title in head]
    lines = [f"## {experiment.title}", ""]
    for epochs, rows in sorted(results.rows.groupby("epochs"), key=lambda group: -group[0]):
        whole = epochs == experiment.epochs
        lines += [f"### {epochs} epochs" + ("" if whole else f", of {experiment.epochs} in the whole rows"), ""]
        lines += [_cells(head), _cells(rule), *(_line(results, row, whole) for _, row in in_order(rows).iterrows()), ""]
    lines += [
        "Test accuracy in percent: mean, smallest and largest of the replicas, and of their mean, the consensus model."
        + ("" if results.reference.empty else " Differences in points, where the thesis trained for as many epochs.")
        + " Bytes are counted, and computed for all-reduce: a ring sends 2 N (n - 1) / n a step, N the gradients' bytes"
        " and n the workers.",
    ]
    return "\n".join(lines) + "\n"


def _line(results: Results, row: pd.Series, whole: bool) -> str:
    mean, consensus = row["mean_over_ranks"], row["consensus_test_accuracy"]
    cells = [
        row["id"],
        f"{row['seed']}",
        f"{_percent(mean)} ({_percent(row['min_over_ranks'])}–{_percent(row['max_over_ranks'])})",
        _percent(consensus),
    ]
    if not results.reference.empty:
        theirs = published(results, row["id"]) if whole else (math.nan, math.nan)
        cells += map(_percent, theirs)
        cells += (_percent(ours - other, "+.2f") for ours, other in zip((mean, consensus), theirs, strict=True))
    return _cells([*cells, f"{row['bytes_sent_per_rank'] / 1e9:.1f}"])


def _cells(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _percent(value: float, form: str = ".2f") -> str:
    return "–" if math.isnan(value) else format(100 * value, form)
