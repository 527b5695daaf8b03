"""Which parameters the server holds, and what is refused because it does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor


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
