"""Lets Lightning be imported at half the cost: for programs that tests start for what they do, not how they start.

torchmetrics imports torchvision, SciPy and matplotlib wherever it finds them. Where this folder is on `PYTHONPATH` it
finds what `pip install lightning-gossip` brings, and these are not among it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import Distribution, PackageNotFoundError
from types import ModuleType

NOT_DEPENDED_ON = ("matplotlib", "scipy", "torchvision")


class _Absent(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in NOT_DEPENDED_ON:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


_find = Distribution.from_name


def _find_what_is_there(name: str) -> Distribution:
    if name in NOT_DEPENDED_ON:
        raise PackageNotFoundError(name)
    return _find(name)


sys.meta_path.insert(0, _Absent())
Distribution.from_name = _find_what_is_there  # type: ignore[method-assign]  # lightning_utilities asks for versions
