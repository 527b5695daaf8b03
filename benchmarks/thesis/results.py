"""The results: finished rows, their validation curves, and the published numbers.

``thesis_<experiment>.csv`` has a line a finished row, ``thesis_<experiment>_curves.csv`` a line an epoch of each. A row
is known by id, seed and epochs. Files are replaced whole, so that a kill leaves the old ones or the new ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from benchmarks import RESULTS
from benchmarks.shared.rows import read, write
from lightning_gossip.monitoring.event_files import read_run

KEY = ("id", "seed", "epochs")
COLUMNS = (
    "id,method,workers,probability,period,alpha,seed,epochs,updates,rank0_test_accuracy,mean_over_ranks,min_over_ranks,"
    "max_over_ranks,consensus_test_accuracy,seconds,bytes_sent_per_rank,version"
).split(",")
CURVE_COLUMNS = [*KEY, "updates", "mean", "min", "max", "bytes_sent_per_rank"]
_FRAME_BYTES = 16  # of an event file: length, its checksum and the data's checksum around each record

Key = tuple[str, int, int]
Line = Mapping[str, object]


@dataclass(frozen=True, eq=False)
class Results:
    """What is known of an experiment.

    Args:
        rows: the finished rows, in the order in which they finished.
        curves: validation accuracy over the replicas and bytes sent, an epoch a line.
        reference: the published rows, by id; empty where there are none.
    """

    rows: pd.DataFrame
    curves: pd.DataFrame
    reference: pd.DataFrame

    @property
    def compared(self) -> bool:
        """Whether there are published rows to stand beside."""
        return not self.reference.empty


def load(folder: Path, experiment: str, reference: str | None) -> Results:
    """Return the results in ``folder``; tables without lines where there are none yet."""
    published = pd.DataFrame(columns=COLUMNS).set_index("id")
    if reference is not None:
        published = pd.read_csv(RESULTS / f"reference_{reference}.csv", comment="#").set_index("id")
        published = published.reindex(columns=[*published.columns.union(["mean_over_ranks"], sort=False)])
    rows_file, curves_file = _files(folder, experiment)
    return Results(_table(rows_file, COLUMNS), _table(curves_file, CURVE_COLUMNS), published)


def _table(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=columns)


def finished(folder: Path, experiment: str) -> set[Key]:
    """Return the keys of the rows that are there."""
    return {_key(line) for line in read(_files(folder, experiment)[0])}


def add(folder: Path, experiment: str, row: Line, curve: Sequence[Line]) -> None:
    """Add a finished row and its curve, in place of those with its key.

    Args:
        folder: of the results; made if needed.
        experiment: its name.
        row: a value for each of :data:`COLUMNS`.
        curve: for each epoch a value for each of :data:`CURVE_COLUMNS`.
    """
    rows_file, curves_file = _files(folder, experiment)
    for file, columns, lines in (
        (curves_file, CURVE_COLUMNS, curve),
        (rows_file, COLUMNS, [row]),
    ):  # the row comes last
        write(file, columns, [*(line for line in read(file) if _key(line) != _key(row)), *lines])


def read_curve(folder: Path, key: Key, bytes_sent_per_rank: float) -> list[Line]:
    """Return a run's validation accuracy for each epoch.

    Args:
        folder: of the run's event files.
        key: of its row.
        bytes_sent_per_rank: in the whole run, for methods that send the same in each step and do not log it.

    Raises:
        RuntimeError: where no rank logged one.
    """
    run = read_run(folder)
    accuracy, sent = run.curve("val_accuracy"), run.curve("gossip/bytes_sent")
    if accuracy is None:
        raise RuntimeError(f"no val_accuracy in the event files of {folder}")
    updates = accuracy["step"].to_numpy() + 1  # Lightning logs under the number of the last one, counted from 0
    if sent is None:
        total = bytes_sent_per_rank * updates / updates[-1]
    else:  # logged every few steps only, and it grows evenly
        total = np.interp(updates, sent["step"] + 1, sent["mean"])
    values = zip(updates, accuracy["mean"], accuracy["low"], accuracy["high"], total, strict=True)
    return [
        dict(zip(CURVE_COLUMNS, [*key, int(step), *(round(v, 6) for v in spread), int(sum_)], strict=True))
        for step, *spread, sum_ in values
    ]


def cut_torn_event_files(folder: Path) -> None:
    """Cut the event files in ``folder`` behind their last whole record: a killed process leaves half of one."""
    for file in folder.rglob("*tfevents*"):
        whole = sum(len(record) + _FRAME_BYTES for record in RawEventFileLoader(str(file)).Load())
        if whole < file.stat().st_size:
            os.truncate(file, whole)


def _files(folder: Path, experiment: str) -> tuple[Path, Path]:
    return folder / f"thesis_{experiment}.csv", folder / f"thesis_{experiment}_curves.csv"


def _key(line: Line) -> Key:
    return str(line["id"]), int(str(line["seed"])), int(str(line["epochs"]))
