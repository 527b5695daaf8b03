"""A pytest plugin, `-p other_lightning`: all of the run's Lightning is `pytorch_lightning`.

The package's classes are bound to it, and what tests import from `lightning.pytorch` and `lightning.fabric` are its
modules under those names.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from lightning_gossip import use_lightning

OTHER = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
"""By the name that tests use."""

ALSO = ("pytorch_lightning.cli", "pytorch_lightning.utilities.model_helpers")
"""Modules that tests import and `pytorch_lightning` itself does not."""


def go_by_the_other_name() -> None:
    use_lightning("pytorch_lightning")
    for name in (*OTHER.values(), *ALSO):
        import_module(name)
    lightning = ModuleType("lightning")
    lightning.__path__ = []
    sys.modules["lightning"] = lightning
    for name, other in OTHER.items():
        setattr(lightning, name.partition(".")[2], sys.modules[other])
        for module in [module for module in sys.modules if module == other or module.startswith(f"{other}.")]:
            sys.modules[name + module.removeprefix(other)] = sys.modules[module]


go_by_the_other_name()
