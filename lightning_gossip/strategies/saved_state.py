"""A checkpoint as Lightning and its hooks made it, parted into this replica's and the consensus model's (design §4)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from lightning_gossip.exchange.consensus import average_state
from lightning_gossip.exchange.tensors import elements

STATE = "state_dict"

CURRENT_STATE = "current_model_state"
"""Where Lightning's ``WeightAveraging`` keeps the model's state if ``state_dict`` is its average."""


class Dumped:
    """A checkpoint that hooks may have changed: entries of the model's state stand wherever they put them.

    What a hook put in place of such an entry, an average of its own or a copy in half precision, stays.

    Args:
        checkpoint: what Lightning made of it.
        state: the model's state, as it was given to the hooks.
    """

    def __init__(self, checkpoint: dict[str, Any], state: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._names = {id(value): name for name, value in state.items() if isinstance(value, Tensor)}

    def of_replica(self, replica: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the checkpoint with a replica's state where the given one stands, and what of it stands nowhere."""
        used: set[str] = set()
        checkpoint = self._with(replica, self._checkpoint, used)
        replaced = {
            name: replica[name]
            for name, value in _mapping(self._checkpoint.get(STATE)).items()
            if name in replica and name not in used and value is not replica[name] and isinstance(replica[name], Tensor)
        }
        return checkpoint, replaced

    def of_consensus(self, consensus: Mapping[str, Any], averaged: Callable[[str], bool]) -> dict[str, Any]:
        """Return the checkpoint with the consensus model's state where the given one stands.

        What hooks replaced is averaged over ranks where all have replaced it alike, and else rank 0's. A collective.

        Args:
            consensus: its state.
            averaged: whether to average an entry of that name, or to take rank 0's.
        """
        foreign = {
            f"{key}/{name}": value
            for key in (STATE, CURRENT_STATE)
            for name, value in _mapping(self._checkpoint.get(key)).items()
            if isinstance(value, Tensor) and id(value) not in self._names
        }
        alike = average_state(foreign, lambda entry: averaged(entry.partition("/")[2]))
        checkpoint = self._with(consensus, self._checkpoint, set())
        for entry, value in alike.items():
            key, _, name = entry.partition("/")
            if checkpoint[key] is self._checkpoint[key]:
                checkpoint[key] = dict(checkpoint[key])
            checkpoint[key][name] = value
        return checkpoint

    def _with(self, state: Mapping[str, Any], value: Any, used: set[str]) -> Any:
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            if name is None or name not in state:
                return value
            used.add(name)
            return state[name]
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._with(state, entry, used)) for key, entry in value.items())
        return value


def copied(state: Mapping[str, Any], touched: Collection[int]) -> dict[str, Any]:
    """Return ``state`` with copies of what lies in ``touched`` memory (see :meth:`Consensus.touched`)."""
    return {name: _copy(value) if _lies_in(value, touched) else value for name, value in state.items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _lies_in(value: Any, touched: Collection[int]) -> bool:
    if not isinstance(value, Tensor):
        return False
    return elements(value) is None or value.untyped_storage().data_ptr() in touched


def in_both(replica: Mapping[str, Any], consensus: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the entries of two checkpoints' states of the model that are the same memory, by ``key/name``."""
    return {
        f"{key}/{name}": value
        for key in (STATE, CURRENT_STATE)
        for name, value in _mapping(replica.get(key)).items()
        if _is_same(value, _mapping(consensus.get(key)).get(name))
    }


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or elements(one) is None:
        return False
    return (one.data_ptr(), one.shape, one.dtype, one.stride()) == (
        other.data_ptr(),
        other.shape,
        other.dtype,
        other.stride(),
    )


def without(checkpoint: dict[str, Any], shared: Collection[str]) -> dict[str, Any]:
    """Return ``checkpoint`` with None for the entries (``key/name``) that stand in another file."""
    return _replaced(checkpoint, dict.fromkeys(shared))


def completed(checkpoint: dict[str, Any], shared: Collection[str], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``checkpoint`` with the entries that :func:`without` left out, from ``other``.

    Raises:
        KeyError: if one does not stand there.
    """
    return _replaced(checkpoint, {entry: other[key][name] for entry in shared for key, name in [_parted(entry)]})


def _replaced(checkpoint: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(checkpoint)
    for key in {_parted(entry)[0] for entry in values}:
        made[key] = type(made[key])((name, values.get(f"{key}/{name}", value)) for name, value in made[key].items())
    return made


def _parted(entry: str) -> tuple[str, str]:
    key, _, name = entry.partition("/")
    return key, name


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
