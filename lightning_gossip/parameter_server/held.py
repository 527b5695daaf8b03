"""Which parameters the server holds, and what is refused because it does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lightning_gossip.exchange.flat import FlatLayout


def held_by_server(
    parameters: Mapping[str, Tensor], loaded: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], FlatLayout]:
    """Return those of ``parameters`` that a server holds from the start of a training on, and their layout.

    Args:
        parameters: of a replica, by name.
        loaded: the worker's state from which it goes on, if it does: the server holds what it held then.

    Raises:
        ValueError: if the state belongs to other parameters, or there are none.
    """
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    names = set(trainable if loaded is None else loaded.get("names", trainable))
    held = {name: p for name, p in parameters.items() if name in names}
    layout = FlatLayout(held)
    if loaded is not None and loaded["layout"] != layout.fingerprint:
        raise ValueError("the worker's state belongs to other parameters: names, shapes or dtypes differ")
    if not held:
        raise ValueError("`parameters` must hold at least one that requires a gradient")
    return held, layout


def refuse_new_parameters(known: Collection[str], parameters: Mapping[str, Tensor]) -> None:
    """Raise if some of ``parameters`` are to be trained and are not ``known`` to the server.

    Raises:
        RuntimeError: naming one of them.
    """
    new = [name for name, p in parameters.items() if p.requires_grad and name not in known]
    gone = [name for name in known if name not in parameters]
    if new and gone:
        raise RuntimeError(
            f"parameter '{gone[0]}' was renamed in mid-training, to '{new[0]}' it seems, and the server knows it by"
            " the name of before: prune or parametrize it before the training starts, or under gossip"
        )
    if new:
        raise RuntimeError(
            f"parameter '{new[0]}' requires a gradient, but did not when the training started, and is not on the"
            " server: let it require one from the start, or unfreeze it in a training of its own"
        )
