"""Which of Lightning's two names this process's classes are bound to, decided once (design §13).

Lightning is published twice, as ``lightning.pytorch`` (with ``lightning.fabric``) and as ``pytorch_lightning`` (with
``lightning_fabric``): the same code in different modules, so that a strategy of one is none to a Trainer of the other.

====================================================  ============================================================
when the first of our classes is needed               they are bound to
====================================================  ============================================================
``use_lightning(name)`` was called                    that one
a Trainer of one looks up a strategy by its name      that one
only one of the two is imported                       that one
both are, or none                                     ``lightning.pytorch``, or ``pytorch_lightning`` where the former
                                                      is not installed
a started process unpickles our launcher              that of the process which started it
====================================================  ============================================================

Nothing here imports Lightning; :mod:`~lightning_gossip.strategies.lightning_names` does, by what is decided here.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

Family = Literal["lightning.pytorch", "pytorch_lightning"]

FAMILIES: tuple[Family, ...] = ("lightning.pytorch", "pytorch_lightning")

_MODULES = {
    "lightning.pytorch": {"lightning.pytorch", "lightning.fabric"},
    "pytorch_lightning": {"pytorch_lightning", "lightning_fabric"},
}
"""Of which a program imports one or both."""

_bound: list[Family] = []
"""The one that was decided on, if it was."""

_asked: list[Family] = []
"""What was asked for before anything was decided; the last one holds."""


def use_lightning(name: Family) -> None:
    """Bind this package's classes to ``lightning.pytorch`` or to ``pytorch_lightning``.

    Only where a program imports both does it have to say so, before it imports any of our classes.

    Args:
        name: of the one whose Trainer will train.

    Raises:
        ValueError: if it is none of the two.
        RuntimeError: if classes are bound to the other one already.
    """
    if name not in FAMILIES:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, FAMILIES))}; got {name!r}")
    if _bound and _bound[0] != name:
        raise RuntimeError(other_family(name))
    _asked.append(name)


def bound() -> Family:
    """Return the one to which this package's classes are bound; from the first call on it stays that."""
    if not _bound:
        _bound.append(_asked[-1] if _asked else _imported())
    return _bound[0]


def _imported() -> Family:
    imported = [name for name in FAMILIES if not _MODULES[name].isdisjoint(sys.modules)]
    if len(imported) == 1:
        return imported[0]
    return "lightning.pytorch" if find_spec("lightning") is not None else "pytorch_lightning"


def other_family(name: Family) -> str:
    """Return what to do where a Trainer of ``name`` gets a strategy that is bound to the other one."""
    return (
        f"this process's lightning_gossip is bound to `{bound()}`, and the Trainer is `{name}`'s: take the Trainer from"
        f" `{bound()}`, or say `lightning_gossip.use_lightning({name!r})` before anything of lightning_gossip is used"
    )


def for_whom() -> str:
    """Return for whose Trainer a strategy is, and what to do for one of the other, where that is imported too."""
    others = [name for name in FAMILIES if name != bound() and name in sys.modules]
    return "; ".join([f"for a Trainer of `{bound()}`", *(f"but: {other_family(name)}" for name in others)])


def reduced(thing: Any) -> tuple[Any, ...]:
    """Return what ``thing.__reduce__`` has to, so that a process which unpickles it takes this one's family first."""
    kind = type(thing)
    return _new, (bound(), kind.__module__, kind.__qualname__), thing.__getstate__()


def _new(name: Family, module: str, class_name: str) -> Any:
    use_lightning(name)
    kind = getattr(import_module(module), class_name)
    return kind.__new__(kind)
