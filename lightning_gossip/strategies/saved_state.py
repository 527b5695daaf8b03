"""A checkpoint as Lightning and its hooks made it, parted into this replica's and the consensus model's (design §4)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_gossip.exchange.consensus import average_state

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


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
