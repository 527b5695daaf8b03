"""``lightning-gossip report``: runs compared in plots and a table.

It needs the packages of the ``report`` extra.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_gossip.monitoring import report_plots
from lightning_gossip.monitoring.event_files import Run, UnreadableRunError, find_runs, read_run
from lightning_gossip.monitoring.report_page import write_page

# column of the CSV file, heading in the tables that are read, how a number is printed there
_COLUMNS = (
    ("run", "run", "{}"),
    ("strategy", "strategy", "{}"),
    ("evaluated", "evaluated", "{}"),
    ("ranks", "ranks", "{:.0f}"),
    ("updates", "updates", "{:.0f}"),
    ("seconds", "time (s)", "{:.1f}"),
    ("val_accuracy_percent", "val. accuracy (%)", "{:.2f}"),
    ("val_accuracy_percent_min", "min", "{:.2f}"),
    ("val_accuracy_percent_max", "max", "{:.2f}"),
    ("val_loss", "val. loss", "{:.4g}"),
    ("test_accuracy_percent", "test accuracy (%)", "{:.2f}"),
    ("test_loss", "test loss", "{:.4g}"),
    ("consensus_distance", "consensus distance", "{:.3g}"),
    ("bytes_sent_per_rank", "sent by a rank (MB)", "{:.4g}"),
    ("wait_seconds_per_step", "waiting in a step (ms)", "{:.3g}"),
    ("staleness", "staleness", "{:.3g}"),
)
WORDS = {heading for _, heading, form in _COLUMNS if form == "{}"}
"""Headings of the columns that hold no numbers."""
_SCALE = {"bytes_sent_per_rank": 1e-6, "wait_seconds_per_step": 1e3}


def write_report(
    paths: Sequence[Path], out: Path, accuracy_tag: str | None = None, loss_tag: str | None = None
) -> list[Path]:
    """Compare runs in PNG plots, on a page with all of them (``report.html``), and in ``summary.csv`` and
    ``summary.md``; what cannot be read is named on stderr.

    Args:
        paths: run folders, or folders that contain some.
        out: folder for the results, made if needed.
        accuracy_tag: tag of the accuracy curves; ``None`` to find it by its name in each run.
        loss_tag: the same for the loss.

    Returns:
        The files written; none where no run could be read.
    """
    runs = read_runs(paths)
    if not runs:
        return []
    for tag in filter(None, (accuracy_tag, loss_tag)):
        if not any(tag in run.tags for run in runs.values()):
            known = ", ".join(sorted(set().union(*(run.tags for run in runs.values()))))
            _complain(f"no run has the tag {tag!r}; there are: {known}")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    results = [plot for plot in report_plots.accuracy_and_loss(runs, accuracy_tag, loss_tag) if plot.curves]
    network = [plot for plot in report_plots.network(runs) if plot.curves]
    for plot in results:
        written += [report_plots.draw(plot, runs, out, against=against) for against in ("step", "seconds")]
    written += [report_plots.draw(plot, runs, out) for plot in network]
    table = pd.DataFrame([final_numbers(label, run, accuracy_tag, loss_tag) for label, run in runs.items()])
    table = table.dropna(axis="columns", how="all")
    table.to_csv(out / "summary.csv", index=False)
    (out / "summary.md").write_text(as_markdown(table))
    page = write_page([*results, *network], runs, cells_of(table), WORDS, out / "report.html")
    return [*written, page, out / "summary.csv", out / "summary.md"]


def read_runs(paths: Sequence[Path]) -> dict[str, Run]:
    """Return the runs in ``paths``, each once, by a label for legends; those that cannot be read go to
    stderr."""
    runs: dict[Path, Run] = {}
    for path in paths:
        try:
            folders = list(find_runs(path))
        except (UnreadableRunError, OSError) as error:
            _complain(f"skipped {path}: {error}")
            continue
        if not folders:
            _complain(f"skipped {path}: no event files")
        for folder in folders:
            if folder.resolve() in runs:
                continue
            try:
                run = read_run(folder)
            except (UnreadableRunError, OSError) as error:
                _complain(f"skipped {folder}: {error}")
                continue
            expected = run.metadata.get("world_size")
            if isinstance(expected, int) and expected > len(run.ranks):
                _complain(f"{folder}: scalars of {len(run.ranks)} ranks, of {expected} that ran")
            runs[folder.resolve()] = run
    return {_label(path, list(runs), run): run for path, run in runs.items()}


def final_numbers(label: str, run: Run, accuracy_tag: str | None = None, loss_tag: str | None = None) -> dict[str, Any]:
    """Return one row of the table: each rank's last values, averaged over the ranks; nan where nothing was
    logged."""
    validation = _percent(run.last(accuracy_tag or run.validation_tag("acc")))
    gossip = "gossip" if "gossip/bytes_sent" in run.tags else "downpour"
    logged = pd.concat(run.ranks.values())
    return {
        "run": label,
        "strategy": run.strategy or None,
        "evaluated": run.evaluated or None,
        "ranks": len(run.ranks),
        "updates": _updates(logged),
        "seconds": logged["seconds"].max(),
        "val_accuracy_percent": _mean(validation),
        "val_accuracy_percent_min": validation.min(initial=np.inf) if len(validation) else np.nan,
        "val_accuracy_percent_max": validation.max(initial=-np.inf) if len(validation) else np.nan,
        "val_loss": _mean(run.last(loss_tag or run.validation_tag("loss"))),
        "test_accuracy_percent": _mean(_percent(run.last(run.test_tag("acc")))),
        "test_loss": _mean(run.last(run.test_tag("loss"))),
        "consensus_distance": _mean(run.last("gossip/consensus_distance")),
        "bytes_sent_per_rank": _mean(run.last(f"{gossip}/bytes_sent")),
        "wait_seconds_per_step": _mean(logged.loc[logged["tag"] == f"{gossip}/wait_seconds", "value"].to_numpy()),
        "staleness": _mean(logged.loc[logged["tag"] == "downpour/staleness", "value"].to_numpy()),
    }


def _updates(logged: pd.DataFrame) -> int:
    """Return the number of updates, as far as it was logged.

    Within ``fit`` Lightning logs under the number of the last one, counted from 0, and after it under how many there
    were. Only the tags of ``GossipMonitor`` are known to be logged within.
    """
    within = logged.loc[logged["tag"].str.match("gossip/|downpour/"), "step"] + 1
    return int(max(logged["step"].max(), within.max() if len(within) else 0))


def as_markdown(table: pd.DataFrame) -> str:
    """Return the table of :func:`final_numbers` in Markdown, with an explanation of its columns."""
    head, *rows = cells_of(table)
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(" --- " if heading in WORDS else " ---: " for heading in head) + "|",
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines += [
        "",
        "Updates: up to the last one logged. Accuracy, loss, consensus distance and bytes: each rank's last value,"
        " and the mean over the ranks (min and max: over the ranks). Waiting and staleness: the mean over all logged "
        "steps and ranks.",
    ]
    return "\n".join(lines) + "\n"


def cells_of(table: pd.DataFrame) -> list[list[str]]:
    """Return the table of :func:`final_numbers` as text: headings, then a row a run."""
    columns = [column for column in _COLUMNS if column[0] in table]
    rows = [[_cell(row[name], form, _SCALE.get(name, 1.0)) for name, _, form in columns] for _, row in table.iterrows()]
    return [[heading for _, heading, _ in columns], *rows]


def _cell(value: Any, form: str, scale: float) -> str:
    if isinstance(value, str):
        return value
    return "–" if pd.isna(value) else form.format(value * scale)


def _label(path: Path, paths: list[Path], run: Run) -> str:
    """Return the part of a run's path that the others do not share, and its strategy."""
    common = os.path.commonpath([other.parent for other in paths])
    name = os.path.relpath(path, common)
    strategy = run.strategy.removesuffix("Strategy")
    return f"{name} ({strategy})" if strategy else name


def _percent(values: np.ndarray) -> np.ndarray:
    return values * 100.0 if len(values) and np.nanmax(values) <= 1.0 else values


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _complain(message: str) -> None:
    print(f"lightning-gossip report: {message}", file=sys.stderr)
