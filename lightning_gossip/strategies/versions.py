"""The versions with which this package is tested, and a warning outside of them: what is newer is not refused."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

TESTED = {"torch": ((2, 13), (2, 14)), "lightning": ((2, 6), (2, 6)), "pytorch-lightning": ((2, 6), (2, 6))}
"""The oldest and the newest minor version of each with which the tests pass."""


def warn_of_untested(package: str) -> None:
    """Warn, once, where the installed version of a package is not among those that are tested.

    Args:
        package: of :data:`TESTED`, by the name under which it is installed.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        return  # it was put there by other means, and says nothing
    oldest, newest = TESTED[package]
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if not oldest <= numbers <= newest:
        tested = _words(oldest) if oldest == newest else f"{_words(oldest)} to {_words(newest)}"
        warnings.warn(
            f"lightning-gossip is tested with {package} {tested}, and {package} {installed} is installed: where it"
            f" fails in a strategy, try `pip install '{package}=={_words(newest)}.*'`",
            stacklevel=2,
        )


def _words(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
