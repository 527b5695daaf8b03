"""What the MNIST rows have to show beside the thesis', decided before they were run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from benchmarks.thesis.results import Results
from benchmarks.thesis.rows import SEED
from benchmarks.thesis.table import published

POINTS, POINTS_AT_MOST = 0.3, 0.45
"""Between a figure and the thesis', of test accuracy in percent: for all gossip figures but one, and for all."""
POINTS_OTHERS = {"AR-4": 0.2, "NC-4": 0.5}
RATES = ("0.125", "0.031", "0.008", "0.002")
SEEDS_RATE, SEEDS = "0.031", 3
"""Where further seeds tell how much a row's accuracy varies, and how many with the first."""
COLUMNS = {"mean": "mean_over_ranks", "consensus": "consensus_test_accuracy"}
"""Of the results, for each figure of a row."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Outcome:
    """A claim and whether it holds; None where rows are missing."""

    claim: str
    holds: bool | None

    def __str__(self) -> str:
        return f"{ {True: 'holds', False: 'FAILS', None: 'open'}[self.holds]:5} {self.claim}"


def check(results: Results, epochs: int) -> list[Outcome]:
    """Return the outcome of each claim, on the rows of ``epochs`` epochs."""
    rows = results.rows[results.rows["epochs"] == epochs]
    first = rows[rows["seed"] == SEED].set_index("id")
    return [
        *_gossip_figures(results, first),
        *_other_rows(results, first),
        _elastic_is_not_worse(rows, first),
    ]


def _gossip_figures(results: Results, first: pd.DataFrame) -> Iterator[Outcome]:
    differences = {}
    for row_id in (f"{method}-4-{rate}" for rate in RATES for method in ("EG", "GS")):
        for name, theirs in zip(COLUMNS, published(results, row_id), strict=True):
            difference = _difference(first, row_id, name, theirs)
            if difference is not None:
                differences[f"{row_id} {name}"] = difference
    figures = len(COLUMNS) * 2 * len(RATES)
    for points, allowed in ((POINTS, 1), (POINTS_AT_MOST, 0)):
        beyond = [f"{name} {value:+.3f}" for name, value in differences.items() if abs(value) > points + _ROUNDING]
        holds = len(beyond) <= allowed if len(differences) == figures or len(beyond) > allowed else None
        claim = f"of {figures} gossip figures at most {allowed} beyond {points} points of the thesis'"
        yield Outcome(f"{claim}: {', '.join(beyond) or 'none'} of the {len(differences)} that are there", holds)


def _other_rows(results: Results, first: pd.DataFrame) -> Iterator[Outcome]:
    for row_id, points in POINTS_OTHERS.items():
        difference = _difference(first, row_id, "mean", published(results, row_id)[0])
        holds = None if difference is None else abs(difference) <= points + _ROUNDING
        yield Outcome(f"{row_id} mean within {points} points of the thesis': {_signed(difference)}", holds)


def _elastic_is_not_worse(rows: pd.DataFrame, first: pd.DataFrame) -> Outcome:
    """The mean over the probabilities of EG - GS, in standard errors from the seeds at one of them."""
    claim = f"EG - GS, mean over p = {', '.join(RATES)}, not below -1 standard error"
    pairs = [[f"{method}-4-{rate}" for method in ("EG", "GS")] for rate in RATES]
    seeds = [rows.loc[rows["id"] == f"{method}-4-{SEEDS_RATE}", "mean_over_ranks"] for method in ("EG", "GS")]
    missing = [row_id for pair in pairs for row_id in pair if row_id not in first.index]
    if min(map(len, seeds)) < SEEDS:
        missing.append(f"further seeds at {SEEDS_RATE}")
    if missing:
        return Outcome(f"{claim}: missing {', '.join(missing)}", None)
    mean = 100 * fmean(first.loc[eg, "mean_over_ranks"] - first.loc[gs, "mean_over_ranks"] for eg, gs in pairs)
    error = 100 * math.sqrt(sum(float(seed.var()) for seed in seeds) / len(RATES))
    return Outcome(f"{claim}: {mean:+.3f} points, standard error {error:.3f} ({len(seeds[0])} seeds)", mean >= -error)


def _difference(first: pd.DataFrame, row_id: str, name: str, theirs: float) -> float | None:
    return 100 * (float(first.loc[row_id, COLUMNS[name]]) - theirs) if row_id in first.index else None


def _signed(difference: float | None) -> str:
    return "no row yet" if difference is None else f"{difference:+.3f}"
