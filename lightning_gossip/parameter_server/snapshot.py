"""The whole server's state: gathered from all shards for a checkpoint, and cut again for any number of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.parameter_server.displacement import Cut
from lightning_gossip.parameter_server.protocol import (
    Message,
    Position,
    encode,
    fields,
    receive_json,
    receive_tensors,
    require,
    size_of,
    state_tensors,
)
from lightning_gossip.parameter_server.questions import Job, ask, ask_for_json
from lightning_gossip.parameter_server.shard import ShardState
from lightning_gossip.transport.header import Header
from lightning_gossip.transport.link import Link

log = logging.getLogger(__name__)


def fetch(cut: Cut, step: int, training: int, link: Link, shard: int) -> ShardState:
    """Get one shard's state, in its link's thread."""
    setup = cut.setups[shard]
    answer = ask_for_json(link, Header(Message.SAVE, step, 0, number=training))
    data = fields(receive_json(link, answer), {"version": int, "pushes": dict, "stepped": bool})
    parameters = setup.allocate()
    optimizer = setup.state_room() if data["stepped"] else None
    tensors = state_tensors(parameters, optimizer)
    following = link.receive_header()
    fits = following.nbytes == size_of(tensors) and following.layout == setup.fingerprint
    require(following.kind == Message.TENSORS and fits, f"expected TENSORS, got {following}")
    receive_tensors(link, tensors)
    pushes = {int(worker): count for worker, count in data["pushes"].items()}
    return ShardState(data["version"], pushes, parameters, optimizer)


def gather(cut: Cut, states: Sequence[ShardState], numbers: Mapping[int, int]) -> dict[str, Any]:
    """Put the shards' states together: tensors, numbers and strings, whatever the number of shards.

    Args:
        cut: of the parameters.
        states: of the shards, in their order.
        numbers: of the last worker of each seat; what is told of workers is told by seats.
    """
    seats = {worker: seat for seat, worker in numbers.items()}
    optimizer = None
    if cut.optimizer is not None and all(state.optimizer is not None for state in states):
        optimizer = []
        for segment in range(len(cut.layout.segments)):
            parts = [state.optimizer[segment] for state in states if state.optimizer is not None]
            # scalars (a count of steps) are the same on all shards, but for those that lost a worker
            optimizer.append(
                {k: v if not v.dim() else torch.cat([part[k] for part in parts]) for k, v in parts[0].items()}
            )
    newest = max(states, key=lambda state: state.version)
    return {
        "layout": cut.layout.fingerprint,
        "version": newest.version,
        "pushes": {str(seats[worker]): count for worker, count in newest.pushes.items() if worker in seats},
        "parameters": [torch.cat(parts) for parts in zip(*(state.parameters for state in states), strict=True)],
        "optimizer_path": None if cut.optimizer is None else cut.optimizer.path,
        "optimizer": optimizer,
    }


def renumbered(state: Mapping[str, Any] | None, workers: Mapping[int, int]) -> dict[str, Any] | None:
    """Return ``state``, of :func:`gather`, for workers of other seats.

    Args:
        state: of the server; None for none.
        workers: their seats now, by those of then; empty where they are the same.
    """
    if state is None or not workers:
        return None if state is None else dict(state)
    pushes = {str(workers[int(worker)]): n for worker, n in state["pushes"].items() if int(worker) in workers}
    return {**state, "pushes": pushes}


def load(cut: Cut, state: Mapping[str, Any], training: int, everybody: bool, numbers: Mapping[int, int]) -> Job:
    """Begin a training from what :func:`gather` returned.

    An optimizer's state that is not this optimizer's is left out, with a warning.

    Args:
        cut: of the parameters.
        state: of the server.
        training: its number.
        everybody: whether all may begin, or only who leads.
        numbers: of the workers, by their seats; what is told of other seats is left out.

    Raises:
        ValueError: if the state belongs to other parameters.
    """
    if state["layout"] != cut.layout.fingerprint:
        raise ValueError("the server's state belongs to other parameters: names, shapes or dtypes differ")
    optimizer = state["optimizer"]
    if optimizer is not None and not _fits(cut, state["optimizer_path"], optimizer):
        log.warning("the server's optimizer begins anew: the state is that of %s", state["optimizer_path"])
        optimizer = None
    pushes = {str(numbers[int(seat)]): n for seat, n in state["pushes"].items() if int(seat) in numbers}
    description = encode({"version": state["version"], "pushes": pushes, "stepped": optimizer is not None})

    def job(link: Link, shard: int) -> Position:
        setup = cut.setups[shard]
        parameters = [_part(cut, shard, whole) for whole in state["parameters"]]
        kept = None if optimizer is None else [{k: _part(cut, shard, v) for k, v in s.items()} for s in optimizer]
        tensors = state_tensors(parameters, kept)
        link.send(Header(Message.LOAD, 0, description.numel(), 0, training, int(everybody)), description)
        header = Header(Message.TENSORS, 0, size_of(tensors), setup.fingerprint, training)
        return ask(link, header, tensors, answered_as=Message.LOAD)

    return job


def _part(cut: Cut, shard: int, whole: Tensor) -> Tensor:
    return whole[slice(*cut.bounds(whole.numel(), shard))].contiguous() if whole.dim() else whole


def _fits(cut: Cut, path: str | None, optimizer: Sequence[Mapping[str, Tensor]]) -> bool:
    if cut.optimizer is None or cut.optimizer.path != path or len(optimizer) != len(cut.layout.segments):
        return False
    for segment, state in zip(cut.layout.segments, optimizer, strict=True):
        kept = {
            k.name: (k.dtype, () if k.is_scalar else (segment.numel,))
            for k in cut.optimizer.state_tensors(segment.dtype)
        }
        if kept != {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}:
            return False
    return True
