"""What runs under Downpour come to, as text: means over seeds, beside the single process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.shared.rows import Row, find
from benchmarks.shared.tables import markdown

Runs = dict[str, list[Row]]
"""Of one setting, by seed: the points of a curve, as many of each."""


def print_summary(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Print means over seeds for each setting, and the differences to the single process of the same seed.

    Args:
        rows: of results.
        names: of the columns that make a setting, the seed apart.
    """
    for found in sorted({tuple(row[name] for name in names) for row in rows}):
        given = dict(zip(names, found, strict=True))
        runs = find(rows, given)
        print(", ".join(f"{name} {value}" for name, value in given.items()), f"({len(runs)} seeds):")
        alone = {row["seed"]: row for row in find(rows, given | {"workers": 1, "n_push": 0, "checks": 1})}
        for accuracy in ("validation_accuracy", "test_accuracy"):
            line = f"    {accuracy} {mean_and_error(percent(runs, accuracy))} %"
            if given["workers"] != "1" and (less := differences(runs, alone, accuracy)):
                line += f"; less the single process': {mean_and_error(less)} points"
            print(line, flush=True)


def gather(rows: Sequence[Row], lr: float) -> dict[str, Runs]:
    """Sort the rows of curves into one line a setting, the single process first.

    Of a seed that was trained twice the longer run counts, and all runs of a line end with the shortest: the learning
    rate does not know how many epochs are to come.

    Args:
        rows: of curves, which differ in workers, n_push, lr, epochs and seeds only.
        lr: the single process', not named in a line's name.
    """
    lines: dict[str, Runs] = {}
    for row in sorted(rows, key=lambda row: (int(row["workers"]), int(row["n_push"]), -float(row["lr"]), row["seed"])):
        lines.setdefault(name_of(row, lr), {}).setdefault(row["seed"], []).append(row)
    for runs in lines.values():
        for seed, points in runs.items():
            runs[seed] = find(points, {"epochs": max(int(point["epochs"]) for point in points)})
        length = min(map(len, runs.values()))
        for points in runs.values():
            del points[length:]
    return lines


def table(lines: dict[str, Runs]) -> str:
    """Return in Markdown what each line comes to at its end, with standard errors over seeds where there are several.

    The difference is to the single process (the first line) of the same seed.
    """
    first = next(iter(lines))
    alone = {seed: points[-1] for seed, points in lines[first].items()}
    head = (
        "",
        "epochs of a worker",
        "seeds",
        "validation accuracy (%)",
        "test accuracy (%)",
        "less the single process'",
    )
    rows = []
    for who, runs in lines.items():
        ends = [points[-1] for points in runs.values()]
        validation, test = (
            mean_and_error(percent(ends, column)) for column in ("validation_accuracy", "test_accuracy")
        )
        less = [] if who == first else differences(ends, alone, "test_accuracy")
        rows.append([who, ends[0]["epoch"], str(len(ends)), validation, test, mean_and_error(less) if less else ""])
    return "\n".join(markdown(head, rows))


def name_of(row: Row, lr: float) -> str:
    """Return in words what the runs of one line have in common; ``lr`` is what goes without saying."""
    other = "" if math.isclose(float(row["lr"]), lr, rel_tol=1e-5) else f", lr {float(row['lr']):.3g}"
    if row["workers"] == "1":
        return f"single process{other}"
    return f"{row['workers']} workers, n_push {row['n_push']}{other}"


def percent(rows: Sequence[Row], column: str) -> list[float]:
    return [100 * float(row[column]) for row in rows]


def differences(rows: Sequence[Row], alone: Mapping[str, Row], column: str) -> list[float]:
    """Return in points how far ``rows`` are above the single process, ``alone`` by seed, where it has their seed."""
    return [100 * (float(row[column]) - float(alone[row["seed"]][column])) for row in rows if row["seed"] in alone]


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean in words, with its standard error where there are several values."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"
