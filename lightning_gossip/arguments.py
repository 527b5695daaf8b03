"""Checks of arguments: every message names the argument, the value given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import torch


def check_number(
    name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False
) -> float:
    """Return ``value`` as a float if it is a finite real number from ``low`` to ``high``, open ends left out.

    Raises:
        ValueError: if it is not.
    """
    allowed = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or math.isinf(high) else ']'}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (open_low and value == low) or (open_high and value == high):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}")
    return float(value)


def check_integer(name: str, value: Any, *, low: int, high: int | None = None, why: str = "") -> int:
    """Return ``value`` if it is an integer of at least ``low`` (and at most ``high``); ``why`` explains the bound.

    Raises:
        ValueError: if it is not.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"`{name}` must be {allowed}{why and f' ({why})'}, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, choices: Collection[Any], *, otherwise: str = "") -> Any:
    """Return ``value`` if it is one of ``choices``; ``otherwise`` names what else would be allowed.

    Raises:
        ValueError: if it is not.
    """
    # by type too: 1 is not True, and an unhashable value is refused like any other
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}{otherwise and f', or {otherwise}'}; got {value!r}")
    return value


def check_timeout(name: str, value: Any) -> timedelta:
    """Return ``value`` if it is a positive :class:`~datetime.timedelta`.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, timedelta) or value <= timedelta(0):
        raise ValueError(f"`{name}` must be a positive datetime.timedelta, got {value!r}")
    return value


_NICKNAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "16": "float16",
    "half": "float16",
    "fp32": "float32",
    "32": "float32",
}


def check_wire_dtype(name: str, value: Any) -> torch.dtype | None:
    """Return ``value``, a dtype or its name, as the dtype in which parameters can travel.

    Raises:
        ValueError: if they can not.
    """
    by_name = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(value, str) and (meant := _NICKNAMES.get(value)):
        raise ValueError(f"`{name}` must be a dtype or its name: for {value!r} say {meant!r}")
    check_choice(name, value, (None, *by_name.values(), *by_name))
    return by_name.get(value, value)
