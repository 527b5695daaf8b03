"""The strategies' names in Lightning's registry, without importing Lightning.

``Trainer(strategy="gossip")`` works after ``import lightning_gossip``, in whichever order the two are imported; yet a
process that needs no Lightning must not pay the seconds that its import takes. So where Lightning is there already, the
names are registered at once; where it is not, when its strategies are imported. Each of its two names has a registry.

``"ddp_gossip"`` is ``"gossip"``, and so on for all: for libraries that place a sampler of their own where a strategy's
name says ``ddp`` (scvi-tools).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from itertools import product
from types import ModuleType
from typing import Any

from lightning_gossip.strategies.lightning_family import FAMILIES, Family, use_lightning

STRATEGIES = {
    "gossip": "GossipStrategy",
    "elastic_gossip": "ElasticGossipStrategy",
    "local_sgd": "LocalSGDStrategy",
    "diloco": "DiLoCoStrategy",
    "downpour": "DownpourStrategy",
}
"""Class by name, which is also that of its module in this room."""

_PREFIXES = ("", "ddp_")
"""Of the name; with any of them it is the same strategy."""

_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
"""By suffix of the name."""


def register_with_lightning() -> None:
    """Register the names now where Lightning's strategies are imported, else when they are; harmless if repeated."""
    for family in FAMILIES:
        module = sys.modules.get(_registry_home(family))
        if module is not None and hasattr(module, "StrategyRegistry"):
            _register(family, module)
        elif not any(isinstance(finder, _AwaitLightning) and finder.family == family for finder in sys.meta_path):
            sys.meta_path.insert(0, _AwaitLightning(family))


def _registry_home(family: Family) -> str:
    return f"{family}.strategies"


def _register(family: Family, module: ModuleType) -> None:
    for prefix, (name, class_name), (suffix, start_method) in product(
        _PREFIXES, STRATEGIES.items(), _START_METHODS.items()
    ):
        module.StrategyRegistry.register(
            f"{prefix}{name}{suffix}",
            partial(_make, family, name),
            description=f"{class_name} with `start_method` '{start_method}'",
            override=True,
            start_method=start_method,
        )


def _make(family: Family, name: str, **arguments: Any) -> Any:
    use_lightning(family)
    return getattr(import_module(f"lightning_gossip.strategies.{name}"), STRATEGIES[name])(**arguments)


class _AwaitLightning(MetaPathFinder):
    """Finds Lightning's strategies as they are found without it, and registers ours once they are imported."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _registry_home(self.family):
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(self.family, spec.loader)
        return spec


class _ThenRegister(Loader):
    """A module's own loader, and what follows it."""

    def __init__(self, family: Family, loader: Loader) -> None:
        self._family = family
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # whoever asks for its source finds the loader that knows it
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(self._family, module)
