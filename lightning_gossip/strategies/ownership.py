"""That a started process owns its parameters: torch hands tensors to it as memory that is shared with all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def own_parameters(things: Iterable[Any]) -> None:
    """Move all parameters and buffers of modules that are in shared memory to memory of this process.

    What shares a storage (tied weights, views of one flat parameter) goes on sharing it.

    Args:
        things: modules, containers of them, and objects that have some as attributes.
    """
    moved: dict[int, torch.UntypedStorage] = {}
    modules = {id(module): module for thing in things for module in _modules_in(thing, depth=3)}
    for module in modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if is_lazy(tensor):
                continue
            _move(tensor, moved)
            if tensor.grad is not None:
                _move(tensor.grad, moved)


def _modules_in(thing: Any, depth: int) -> Iterator[nn.Module]:
    """Return the modules that ``thing`` is or holds, so many levels down."""
    if isinstance(thing, nn.Module):
        yield thing
        return
    if depth == 0 or isinstance(thing, (str, bytes, Tensor)):
        return
    inside: Iterable[Any] = ()
    if isinstance(thing, Mapping):
        inside = thing.values()
    elif isinstance(thing, (list, tuple, set)):
        inside = thing
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        inside = vars(thing).values()
    for one in inside:
        yield from _modules_in(one, depth - 1)


def _move(tensor: Tensor, moved: dict[int, torch.UntypedStorage]) -> None:
    if tensor.device.type != "cpu":
        return
    data = tensor.data
    if data.layout != torch.strided or type(data) is not Tensor:
        tensor.data = data.clone()  # has no storage of its own, but parts that have
        return
    storage = data.untyped_storage()
    if not storage.is_shared():
        return
    address = storage.data_ptr()
    if address not in moved:
        moved[address] = storage.clone()
    own = torch.empty(0, dtype=data.dtype).set_(moved[address], data.storage_offset(), data.size(), data.stride())
    tensor.data = own
