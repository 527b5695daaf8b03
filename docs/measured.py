"""Where the numbers of the pages come from: rows of ``benchmarks/results/``.

A number that was measured is followed, in a page's source, by a comment that says what it is, in this module's words:

    | every 8 steps | 8.6<!-- to_ddp("period 8") --> |

``python -m docs.measured`` prints those that are not what the rows come to, rounded as they stand there; ``--write``
puts in their place what the rows come to now. `tests/test_docs.py` wants none to be printed, and no number in a table
without such a comment; a table of settings, which nobody has measured, has ``<!-- settings -->`` before it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.shared import rows
from benchmarks.shared.quartiles import without_slowest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

_CLAIM = re.compile(r"(?P<number>\d[\d,]*(?:\.\d+)?)<!-- (?P<source>[^>]+?) -->")


@dataclass(frozen=True)
class Claim:
    """A number of a page, and what it is said to be."""

    page: Path
    line: int
    number: str
    source: str

    def computed(self) -> str:
        """Return what the rows come to, rounded as the number is.

        Raises:
            ValueError: if there is no such row, or the source is not in this module's words.
        """
        return as_written(evaluate(self.source), self.number)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.number} is {self.computed()}: {self.source}"


def claims(page: Path) -> Iterator[Claim]:
    """Find the numbers of a page that say where they come from."""
    for line, text in enumerate(page.read_text().splitlines(), start=1):
        for found in _CLAIM.finditer(text):
            yield Claim(page, line, found["number"], found["source"])


def evaluate(source: str) -> float:
    """Return the value of an expression in this module's words."""
    try:
        return float(eval(source, {"__builtins__": {}}, WORDS))
    except (NameError, SyntaxError, TypeError) as error:
        raise ValueError(f"{source!r} says nothing: {error}") from error


def as_written(value: float, number: str) -> str:
    """Return ``value`` with as many decimals as ``number`` has, and with its commas."""
    decimals = len(number.partition(".")[2])
    return f"{value:{',' if ',' in number else ''}.{decimals}f}"


# -- the words


def value(file: str, column: str, **where: Any) -> float:
    """A column of the one row in which ``where`` holds."""
    found = _rows(file, where)
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows of {file}.csv have {where}, not one")
    return float(found[0][column])


def middle(file: str, column: str, **where: Any) -> float:
    """The median of a column over the rows in which ``where`` holds."""
    found = _rows(file, where)
    if not found:
        raise ValueError(f"no row of {file}.csv has {where}")
    return median(float(row[column]) for row in found)


def to_ddp(setup: str, rate: int = 200) -> float:
    """Steps a second over slow links, to those of DDP."""
    return _ratio("network", "ddp", setup, rate_mbit=rate)


def to_none(setup: str, rate: int = 200) -> float:
    """A step's time over slow links, to that of one without communication."""
    return _ratio("network", setup, "none", rate_mbit=rate)


def outer_to_ddp(setup: str, rate: int = 200) -> float:
    """Steps a second over slow links with outer steps, or what else there is, to those of DDP."""
    return _ratio("network_outer", "ddp", setup, rate_mbit=rate)


def outer_to_none(setup: str, rate: int = 200) -> float:
    """A step's time there, to that of one without communication: torchft's to one of a plain loop."""
    alone = "plain none" if setup.startswith("torchft") else "none"
    return _ratio("network_outer", setup, alone, rate_mbit=rate)


def one_host(setup: str) -> float:
    """A step's time of 4 ranks on one host, to that of one without communication."""
    return _ratio("exchange", setup, "none", model="mlp", ranks=4)


def stalls(setup: str) -> float:
    """A step's time where every rank stalls now and then, to a rank's own mean step."""
    return _ratio("network_stalls", setup, "none")


def straggler(setup: str) -> float:
    """A step's time of the ranks beside a slow one, to theirs without communication."""
    own, alone = (_of_others("network_straggler", name) for name in (setup, "none"))
    return median(own[round_] / alone[round_] for round_ in own.keys() & alone.keys())


def whole(setup: str, slow_rank: int = 0) -> float:
    """A whole training's time with one rank 3 times slower, to that with even ranks."""
    of_all = {"setup": setup, "samples": 60000}
    slower = value("network_whole", "seconds", factor=3, slow_rank=slow_rank, **of_all)
    return slower / value("network_whole", "seconds", factor=1, **of_all)


def updates_to_97(setup: str) -> float:
    """Updates on MNIST after which the consensus model first had 97 % on the validation set."""
    return min(
        int(row["updates"]) for row in _rows("network_accuracy", {"setup": setup}) if float(row["accuracy"]) >= 0.97
    )


def seconds_to_97(setup: str) -> float:
    """Those updates, times a step at 200 Mbit/s."""
    return updates_to_97(setup) * middle("network", "step_ms", setup=setup, rate_mbit=200) / 1e3


def thesis(row: str, column: str) -> float:
    """An accuracy on MNIST after 100 epochs, in per cent."""
    return 100 * value("thesis_mnist", column, id=row, seed=1234, epochs=100)


def thesis_gb(row: str) -> float:
    """Gigabytes that a rank sent meanwhile."""
    return value("thesis_mnist", "bytes_sent_per_rank", id=row, seed=1234, epochs=100) / 1e9


def text(scheme: str, column: str = "loss") -> float:
    """Of the trainings on text with 4 ranks, at the learning rate of the example."""
    return value("text", column, id=scheme, model="nano", lr=0.003, seed=0, ranks=4)


def fault(run: str, column: str) -> float:
    """Of the trainings in which ranks are killed."""
    return value("faults_accuracy", column, run=run, seed=1234)


def storm(scheme: str, column: str = "") -> float:
    """Of a run in a storm of faults; without a column: its steps, to what was possible."""
    runs = [row for row in _rows("faults_storm", {"scheme": scheme}) if row["faults"] != "0"]
    frees = _rows("faults_storm", {"scheme": scheme, "faults": 0})
    if len(runs) != 1 or len(frees) != 1:
        raise ValueError(f"faults_storm.csv has {len(runs)} runs of {scheme!r} with faults and {len(frees)} without")
    (run,), (free,) = runs, frees
    if column:
        return float(run[column])
    return float(run["steps"]) / (float(run["live_s"]) * float(free["steps"]) / float(free["live_s"]))


def frozen(strategy: str, column: str) -> float:
    """What a frozen base costs."""
    return value("frozen", column, label="after", strategy=strategy)


WORDS = {
    word.__name__: word
    for word in (
        value, middle, to_ddp, to_none, outer_to_ddp, outer_to_none, one_host, stalls, straggler, whole, updates_to_97,
        seconds_to_97, thesis, thesis_gb, text, fault, storm, frozen,
    )
}  # fmt: skip


# -- the rows


@cache
def _file(name: str) -> list[rows.Row]:
    found = rows.read(ROOT / "benchmarks" / "results" / f"{name}.csv")
    if not found:
        raise ValueError(f"benchmarks/results/{name}.csv has no rows")
    return found


def _rows(file: str, where: dict[str, Any]) -> list[rows.Row]:
    return rows.find(_file(file), where)


def _ratio(file: str, over: str, under: str, **where: Any) -> float:
    """The median, over the rounds that have both set-ups, of a step's time in one to that in the other."""
    times = [
        {row["round"]: float(row["step_ms"]) for row in _rows(file, {"setup": setup, **where})}
        for setup in (over, under)
    ]
    both = times[0].keys() & times[1].keys()
    if not both:
        raise ValueError(f"{file}.csv has no round of both {over!r} and {under!r}")
    return median(times[0][round_] / times[1][round_] for round_ in both)


def _of_others(file: str, setup: str) -> dict[str, float]:
    """Mean steps of the ranks that are not the slow one, by the round."""
    return {
        row["round"]: without_slowest(float(row["step_ms"]), float(row["step_max_ms"]), int(row["ranks"]))
        for row in _rows(file, {"setup": setup})
    }


def write(page: Path) -> None:
    """Put what the rows come to in the place of the numbers of a page."""

    def corrected(found: re.Match[str]) -> str:
        number = as_written(evaluate(found["source"]), found["number"])
        return f"{number}<!-- {found['source']} -->"

    page.write_text(_CLAIM.sub(corrected, page.read_text()))


def main() -> int:
    """Print, or write, what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="correct the pages")
    arguments = parser.parse_args()
    wrong = [claim for page in PAGES for claim in claims(page) if claim.computed() != claim.number]
    for claim in wrong:
        print(claim)
        if arguments.write:
            write(claim.page)
    return int(bool(wrong) and not arguments.write)


if __name__ == "__main__":
    sys.exit(main())
