"""Rows of results in CSV files, where what is there is not measured again, and as tables in Markdown."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Mapping[str, Any]], digits: int = 4) -> None:
    """Append ``rows``, all with the same columns, floats with so many significant ``digits``.

    Raises:
        ValueError: if the file has other columns.
    """
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="") as file:
            there = next(csv.reader(file), None)
        if there != columns:
            raise ValueError(f"{path} has the columns {there}, not {columns}: move it away, or name another file")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({key: text(value, digits) for key, value in row.items()} for row in rows)


def text(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def find(rows: Sequence[Row], given: Mapping[str, Any]) -> list[Row]:
    """Return the rows in which what was ``given`` stands; a float as it is once written and read."""
    return [row for row in rows if all(key in row and _is(row[key], value) for key, value in given.items())]


def _is(text: str, value: Any) -> bool:
    return math.isclose(float(text), value, rel_tol=1e-5) if isinstance(value, float) and text else text == str(value)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> list[str]:
    """Return the lines of a table in Markdown; all columns but those of ``words`` stand to the right."""
    rule = ["---" if place in words else "---:" for place in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
