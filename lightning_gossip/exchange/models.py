"""That all ranks start from one model: the same parameters and buffers, with rank 0's values."""

from __future__ import annotations

import hashlib
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn

Manifest = dict[str, str]
"""What each parameter and buffer is, by name."""


def manifest(module: nn.Module) -> Manifest:
    """Return shape, dtype and whether it requires a gradient, in words, for every parameter and buffer."""
    parameters = {
        f"parameter '{name}'": f"shape {tuple(p.shape)}, {p.dtype}, {'trainable' if p.requires_grad else 'frozen'}"
        for name, p in module.named_parameters()
    }
    buffers = {f"buffer '{name}'": f"shape {tuple(b.shape)}, {b.dtype}" for name, b in module.named_buffers()}
    return parameters | buffers


def check_models_agree(module: nn.Module, rank: int, world_size: int) -> None:
    """Raise on every rank if a parameter or buffer of one differs from rank 0's; a collective of the default group.

    Raises:
        RuntimeError: naming it, the rank, and what both have.
    """
    if world_size == 1:
        return
    own = manifest(module)
    digests: list[str] = [""] * world_size
    dist.all_gather_object(digests, hashlib.sha256(repr(list(own.items())).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    manifests: list[Manifest] = [{}] * world_size
    dist.all_gather_object(manifests, own)
    raise RuntimeError("the ranks have different models: " + "; ".join(_differences(manifests)))


def _differences(manifests: list[Manifest]) -> list[str]:
    first = manifests[0]
    found = []
    for rank, other in enumerate(manifests[1:], start=1):
        for name in [*first, *(name for name in other if name not in first)]:
            here, there = first.get(name, "missing"), other.get(name, "missing")
            if here != there:
                found.append(f"{name} is {here} on rank 0 but {there} on rank {rank}")
                break
        else:
            if list(first) != list(other):
                found.append(f"parameters and buffers are in another order on rank {rank} than on rank 0")
    return found


@torch.no_grad()
def take_rank_zeros(module: nn.Module, world_size: int) -> None:
    """Give every rank rank 0's parameters and buffers; a collective of the default group."""
    if world_size == 1:
        return
    for tensor in chain(module.parameters(), module.buffers()):
        # as bytes, which every backend moves; in the order of the elements, which ranks may lay out differently
        data = tensor.data
        whole = data.contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
        if whole is not data:
            data.copy_(whole)
