"""The command lines of the benchmarks: one parser, and types of lists."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from typing import TypeVar

T = TypeVar("T")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def make_parser(module: ModuleSpec | None, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for ``python -m`` of a module.

    Args:
        module: its ``__spec__``, which has the name; None for a file that was not started by ``-m``.
        description: what ``--help`` begins with, ``__doc__``.
    """
    prog = None if module is None else f"python -m {module.name.removesuffix('.__main__')}"
    return argparse.ArgumentParser(prog, description=description, formatter_class=_Formatter, allow_abbrev=False)


def listed(convert: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return a type of argument: values separated by commas, each as ``convert`` returns it.

    What ``convert`` refuses by a ``ValueError`` or ``argparse.ArgumentTypeError`` ends the program with its message.
    """

    def convert_all(text: str) -> list[T]:
        try:
            return [convert(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert_all


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """Return a type of argument: one of some names."""
    allowed = list(known)

    def check(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(allowed)}")
        return text

    return check


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of argument: a whole number of at least ``least``."""

    def check(text: str) -> int:
        try:
            number = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return check
