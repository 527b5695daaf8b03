"""Medians and quartiles: how the benchmarks say what repeated measurements come to."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T", float, NDArray[Any])


def quartiles(values: ArrayLike) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    low, median, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)


def ratios(times: ArrayLike, references: ArrayLike) -> tuple[float, float, float]:
    """Return the :func:`quartiles` of the ratios round by round."""
    return quartiles(np.asarray(times) / np.asarray(references))


def in_words(values: ArrayLike, form: str = ".3f") -> str:
    """Return the median, and the quartiles in brackets, each formatted by ``form``."""
    low, median, high = (format(value, form) for value in quartiles(values))
    return f"{median} (quartiles {low} to {high})"


def without_slowest(mean: T, slowest: T, ranks: int) -> T:
    """Return the mean of all ranks but the slowest, of the mean of all; numbers or arrays."""
    return (ranks * mean - slowest) / (ranks - 1)
