"""Runs read back from TensorBoard event files: one table a rank, one curve a tag with the spread over the
ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tbparse import SummaryReader
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

_EVENT_FILES = "*tfevents*"
_FRAME_BYTES = 16  # length, its checksum and the data's checksum around each record
_VALIDATION_WORDS = {"val", "valid", "validation"}


class UnreadableRunError(Exception):
    """A run that cannot be read, with the reason."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of one or several ranks.

    Args:
        path: its folder.
        metadata: the content of its ``metadata.json``; empty where there is none.
        ranks: for each rank a table of scalars with the columns ``tag``, ``step``, ``seconds`` (since
            training began) and ``value``.
    """

    path: Path
    metadata: dict[str, Any]
    ranks: dict[int, pd.DataFrame]

    @property
    def strategy(self) -> str:
        """The strategy's class, without its module; empty where unknown."""
        strategy = self.metadata.get("strategy")
        return str(strategy.get("class", "")).rsplit(".", 1)[-1] if isinstance(strategy, dict) else ""

    @property
    def evaluated(self) -> str:
        """What its validation looked at: ``"consensus"``, ``"replica"``, or empty where unknown."""
        strategy = self.metadata.get("strategy")
        arguments = strategy.get("arguments") if isinstance(strategy, dict) else None
        return str(arguments.get("evaluate", "")) if isinstance(arguments, dict) else ""

    @property
    def tags(self) -> set[str]:
        """Every tag that any rank logged."""
        return {tag for frame in self.ranks.values() for tag in frame["tag"].unique()}

    def curve(self, tag: str | None, windows: int | None = None) -> pd.DataFrame | None:
        """Return the mean and the spread of ``tag`` over the ranks; None where no rank logged it.

        Ranks that logged at other steps are interpolated linearly, each within its own first and last step.

        Args:
            tag: the tag; None gives None.
            windows: where given, each rank is first averaged over so many equal spans of steps.

        Returns:
            A table with the columns ``step``, ``seconds`` (mean over ranks), ``mean``, ``low``, ``high``,
            ``ranks`` (how many are in the mean).
        """
        tables = [frame[frame["tag"] == tag] for frame in self.ranks.values()]
        tables = [table for table in tables if len(table)]
        if not tables:
            return None
        if windows is not None:
            last = max(table["step"].max() for table in tables)
            tables = [_averaged(table, float(last) / windows) for table in tables]
        steps = np.unique(np.concatenate([table["step"].to_numpy(dtype=float) for table in tables]))

        def on_all_steps(column: str) -> np.ndarray:
            outside = {"left": np.nan, "right": np.nan}
            return np.array([np.interp(steps, table["step"], table[column], **outside) for table in tables])

        values, seconds = on_all_steps("value"), on_all_steps("seconds")
        values[np.isinf(values)] = np.nan
        return pd.DataFrame(
            {
                "step": steps,
                "seconds": np.nanmean(seconds, axis=0),
                "mean": _reduce(np.nanmean, values),
                "low": _reduce(np.nanmin, values),
                "high": _reduce(np.nanmax, values),
                "ranks": np.sum(~np.isnan(seconds), axis=0),
            }
        )

    def last(self, tag: str | None) -> np.ndarray:
        """Return the last value of ``tag`` on each rank that logged it."""
        tables = [frame[frame["tag"] == tag] for frame in self.ranks.values()]
        return np.array([table["value"].iloc[-1] for table in tables if len(table)])

    def validation_tag(self, quantity: str, *, consensus: bool = False) -> str | None:
        """Return the tag that holds a validation quantity; see :func:`choose_tag`."""
        return choose_tag(self.tags, quantity, _VALIDATION_WORDS, consensus=consensus)

    def test_tag(self, quantity: str) -> str | None:
        """Return the tag that holds a test quantity; see :func:`choose_tag`."""
        return choose_tag(self.tags, quantity, {"test"})


def choose_tag(
    tags: Sequence[str] | set[str], quantity: str, stage: set[str], *, consensus: bool = False
) -> str | None:
    """Return the tag that holds ``quantity`` of a stage, as people name it; None where there is none.

    A tag is split into words at anything that is not a letter or a digit. It must have a word of ``stage``
    and a word that begins with ``quantity`` (``val_acc``, ``valid/accuracy``, ``validation-Acc_epoch``), must
    not be a value of single batches (``_step``), and has the word ``consensus`` exactly if that is asked for.
    Of several, the one of fewest words wins, then the first of the alphabet.

    Args:
        tags: the tags to choose from.
        quantity: beginning of the word, for example ``"acc"`` or ``"loss"``.
        stage: words of which the tag has one, for example ``{"val"}``.
        consensus: whether the value is to be one of the consensus model, logged beside the replicas'.
    """

    def fits(words: list[str]) -> bool:
        is_stage = bool(stage.intersection(words)) and any(word.startswith(quantity) for word in words)
        return is_stage and "step" not in words and ("consensus" in words) == consensus

    split = {tag: re.findall(r"[a-z]+|\d+", tag.lower()) for tag in tags}
    return min((tag for tag in tags if fits(split[tag])), key=lambda tag: (len(split[tag]), tag), default=None)


def find_runs(path: Path) -> Iterator[Path]:
    """Yield the run folders in ``path``, itself included: folders with ``rank_*`` folders or event files.

    Folders named ``version_*`` that hold neither are yielded as well, so that they can be reported as empty.

    Raises:
        UnreadableRunError: if there is no such folder.
    """
    if not path.is_dir():
        raise UnreadableRunError("no such folder")
    folders = sorted(
        (entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink()), key=_natural_order
    )
    if any(path.glob("rank_*/")) or any(path.glob(_EVENT_FILES)):
        yield path
        return
    below = [run for folder in folders for run in find_runs(folder)]
    yield from below
    if not below and path.name.startswith("version_"):
        yield path


def read_run(path: Path) -> Run:
    """Read one run folder.

    Raises:
        UnreadableRunError: if there is nothing to read, or a file is damaged or cut off.
    """
    folders = {int(folder.name[5:]): folder for folder in path.glob("rank_*/") if folder.name[5:].isdigit()}
    read = {rank: _read_rank(folder) for rank, folder in sorted((folders or {0: path}).items())}
    frames = {rank: frame for rank, (frame, _) in read.items() if len(frame)}
    if not frames:
        raise UnreadableRunError("no scalars in its event files" if _event_files(path) else "no event files")
    metadata = _read_metadata(path / "metadata.json")
    _add_seconds(frames, _start_times(metadata), [time for _, opened in read.values() for time in opened])
    return Run(path, metadata, {rank: _latest(frame) for rank, frame in frames.items()})


def _event_files(path: Path) -> list[Path]:
    return sorted([*path.glob(_EVENT_FILES), *path.glob(f"rank_*/{_EVENT_FILES}")])


def _read_rank(folder: Path) -> tuple[pd.DataFrame, list[float]]:
    """Return all scalars that one rank logged, and when it opened its files, in seconds since the epoch."""
    frames, opened = [], []
    for file in sorted(folder.glob(_EVENT_FILES)):
        size = file.stat().st_size  # before the records: a run that is under way adds to them
        # the event reader stops at a damaged record without a word
        records = list(RawEventFileLoader(str(file)).Load())
        whole = sum(len(record) + _FRAME_BYTES for record in records)
        if whole < size:
            raise UnreadableRunError(f"{file.relative_to(folder.parent)} is damaged or cut off at byte {whole}")
        opened += [Event.FromString(record).wall_time for record in records[:1]]
        scalars = SummaryReader(str(file), event_types={"scalars"}, extra_columns={"wall_time"}).scalars
        if len(scalars):
            frames.append(scalars)
    if not frames:
        return pd.DataFrame({"tag": [], "step": [], "value": [], "wall_time": []}), opened
    return pd.concat(frames), opened


def _latest(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a rank's scalars in the order of steps; of a step logged twice (a resume) what was logged last."""
    last = frame.sort_values("wall_time", kind="stable").drop_duplicates(["tag", "step"], keep="last")
    return last.sort_values(["tag", "step"], ignore_index=True)


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UnreadableRunError(f"{file.name} cannot be read: {error}") from error
    return metadata if isinstance(metadata, dict) else {}


def _start_times(metadata: dict[str, Any]) -> list[float]:
    """Return when the run was started and resumed, in seconds since the epoch, ascending."""
    try:
        stamps = [record.get("start_time") for record in (*metadata.get("earlier", []), metadata)]
        return sorted(datetime.fromisoformat(stamp).timestamp() for stamp in stamps if stamp is not None)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnreadableRunError(f"start time in metadata.json cannot be read: {error}") from error


def _add_seconds(frames: dict[int, pd.DataFrame], starts: list[float], opened: list[float]) -> None:
    """Turn wall times into seconds of running: a resumed run does not run between its end and its next start.

    A start ends when the first file is opened, where that is known: loading and launching are not training.
    """
    times = np.concatenate([frame["wall_time"].to_numpy(dtype=float) for frame in frames.values()])
    starts = starts or [times.min()]
    ran_before, offsets = 0.0, []
    for start, end in zip(starts, [*starts[1:], np.inf], strict=True):
        within = times[(times >= start) & (times < end)]
        first, last = (within.min(), within.max()) if len(within) else (start, start)
        begin = min((time for time in opened if start <= time <= first), default=start)
        offsets.append(ran_before - begin)
        ran_before += last - begin
    for frame in frames.values():
        wall = frame["wall_time"].to_numpy(dtype=float)
        part = np.clip(np.searchsorted(starts, wall, side="right") - 1, 0, None)
        frame["seconds"] = wall + np.array(offsets)[part]


def _averaged(table: pd.DataFrame, span: float) -> pd.DataFrame:
    """Return the means of a rank's table over spans of steps (0, span], (span, 2 span], …"""
    window = np.ceil(table["step"] / span) if span > 0 else table["step"]
    return table[["step", "seconds", "value"]].groupby(window, as_index=False).mean()


def _reduce(function: Any, values: np.ndarray) -> np.ndarray:
    """Apply a nan-aware reduction over the ranks; a step at which all of them are nan stays nan."""
    known = ~np.all(np.isnan(values), axis=0)
    result = np.full(values.shape[1], np.nan)
    result[known] = function(values[:, known], axis=0)
    return result


def _natural_order(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
