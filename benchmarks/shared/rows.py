"""Rows of results in CSV files, where what is there is not measured again.

A line that begins with ``#`` says how its file came about; it is no row.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none if there is no file."""
    return list(csv.DictReader(_lines(path))) if path.exists() else []


def append(path: Path, rows: Sequence[Mapping[str, Any]], digits: int = 4) -> None:
    """Append ``rows``, all with the same columns, floats with so many significant ``digits``.

    Raises:
        ValueError: if the file has other columns.
    """
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write(path, columns, rows, digits)
        return
    there = next(csv.reader(_lines(path)), None)
    if there != columns:
        raise ValueError(f"{path} has the columns {there}, not {columns}: move it away, or name another file")
    with path.open("a", newline="") as file:
        _write(file, columns, rows, digits)


def write(
    path: Path,
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    digits: int | None = None,
    comment: str | None = None,
) -> None:
    """Write a whole file in place of the one that is there; a kill leaves the old one or the new one.

    Args:
        path: of it; its folder is made if needed.
        columns: in their order.
        rows: with these columns; None is left empty.
        digits: significant ones of floats; None for all.
        comment: a first line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", newline="") as file:
            if comment is not None:
                file.write(f"# {comment}\n")
            _write(file, columns, [dict(zip(columns, columns, strict=True)), *rows], digits)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    """Return the lines of a file that are no comments, each with its end."""
    with path.open(newline="") as file:
        return [line for line in file if not line.startswith("#")]


def _write(file: Any, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], digits: int | None) -> None:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writerows({key: _text(value, digits) for key, value in row.items()} for row in rows)


def _text(value: Any, digits: int | None) -> str:
    if isinstance(value, float) and digits is not None:
        return f"{value:.{digits}g}"
    return "" if value is None else str(value)


def find(rows: Iterable[Row], given: Mapping[str, Any]) -> list[Row]:
    """Return the rows in which what was ``given`` stands; a float as it is once written and read."""
    return [row for row in rows if all(key in row and _is(row[key], value) for key, value in given.items())]


def _is(text: str, value: Any) -> bool:
    return math.isclose(float(text), value, rel_tol=1e-5) if isinstance(value, float) and text else text == str(value)


def rounds_missing(rows: Iterable[Row], setups: Iterable[str], rounds: int) -> list[int]:
    """Return the rounds, of ``rounds`` in all, of which the block of some set-up is not among ``rows``."""
    there = {(row["setup"], int(row["round"])) for row in rows}
    names = list(setups)
    return [round_ for round_ in range(rounds) if any((name, round_) not in there for name in names)]
