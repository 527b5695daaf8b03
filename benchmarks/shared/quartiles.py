"""Medians and quartiles: how the benchmarks say what repeated measurements come to."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


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
