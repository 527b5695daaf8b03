"""The rows of an experiment beside the published ones, in Markdown."""

from __future__ import annotations

import math

import pandas as pd

from benchmarks.shared.tables import markdown
from benchmarks.thesis.results import Results
from benchmarks.thesis.rows import Experiment, parse

_OURS = ("row", "seed", "ours: mean (min–max)", "consensus")
_THEIRS = ("thesis: mean", "consensus", "difference: mean", "consensus")
_BYTES = "sent by a worker (GB)"


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
    head = [*_OURS, *(_THEIRS if results.compared else ()), _BYTES]
    lines = [f"## {experiment.title}", ""]
    for epochs, rows in sorted(results.rows.groupby("epochs"), key=lambda group: -group[0]):
        whole = epochs == experiment.epochs
        lines += [f"### {epochs} epochs" + ("" if whole else f", of {experiment.epochs} in the whole rows"), ""]
        lines += markdown(head, (_cells(results, row, whole) for _, row in in_order(rows).iterrows()), words=(0, 2))
        lines += [""]
    lines += [
        "Test accuracy in percent: mean, smallest and largest of the replicas, and of their mean, the consensus model."
        + (" Differences in points, where the thesis trained for as many epochs." if results.compared else "")
        + " Bytes are counted, and computed for all-reduce: a ring sends 2 N (n - 1) / n a step, N the gradients' bytes"
        " and n the workers.",
    ]
    return "\n".join(lines) + "\n"


def _cells(results: Results, row: pd.Series, whole: bool) -> list[str]:
    """Return a row's cells, one a column of the table."""
    mean, consensus = row["mean_over_ranks"], row["consensus_test_accuracy"]
    compared = []
    if results.compared:
        theirs = published(results, row["id"]) if whole else (math.nan, math.nan)
        differences = (ours - other for ours, other in zip((mean, consensus), theirs, strict=True))
        compared = [*map(_percent, theirs), *(_percent(difference, "+.2f") for difference in differences)]
    return [
        row["id"],
        f"{row['seed']}",
        f"{_percent(mean)} ({_percent(row['min_over_ranks'])}–{_percent(row['max_over_ranks'])})",
        _percent(consensus),
        *compared,
        f"{row['bytes_sent_per_rank'] / 1e9:.1f}",
    ]


def _percent(value: float, form: str = ".2f") -> str:
    return "–" if math.isnan(value) else format(100 * value, form)
