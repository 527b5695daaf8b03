"""The consensus model, the mean of the replicas, and the window during which a module holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout

_CHUNK = 2**22
"""Elements averaged at a time: bounds the memory for sums in a wider dtype."""


class Consensus:
    """The replicas of one module, seen from one rank. Every method is a collective of the default group.

    Args:
        module: this rank's replica.
        world_size: number of replicas.
    """

    def __init__(self, module: nn.Module, world_size: int) -> None:
        self._module = module
        self._world_size = world_size
        self._replica: _Copy | None = None
        self._entered: dict[str, Tensor] = {}  # the consensus model's buffers when the window began

    @property
    def holds(self) -> bool:
        """Whether the module holds the consensus model for the moment (between :meth:`enter` and :meth:`leave`)."""
        return self._replica is not None

    def adopt(self) -> float:
        """Make the module the consensus model for good; return the consensus distance before (design §1)."""
        return self._average(_Copy(self._module))

    def enter(self) -> float:
        """Make the module the consensus model until :meth:`leave`; return the consensus distance."""
        self._replica = _Copy(self._module)
        distance = self._average(_Copy(self._module))
        self._entered = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        return distance

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Give the module its replica back for a moment within the window; not a collective."""
        if self._replica is None:
            yield
            return
        consensus = _Copy(self._module)
        self._put_back(self._replica)
        try:
            yield
        finally:
            consensus.restore()

    def leave(self) -> None:
        """Give the module its replica back, but for buffers that were changed within the window.

        Not a collective, and harmless outside the window.
        """
        if self._replica is not None:
            self._put_back(self._replica)
            self._replica, self._entered = None, {}

    def _put_back(self, replica: _Copy) -> None:
        changed = {
            name: buffer.clone()
            for name, buffer in self._module.named_buffers()
            if name in self._entered and not _same(buffer, self._entered[name])
        }
        replica.restore()
        for name, value in changed.items():
            self._module.get_buffer(name).data.copy_(value)

    def _average(self, copy: _Copy) -> float:
        distance, norm = self._build(copy.parameters).tolist()
        if self._world_size > 1:
            for flat in copy.buffers.segments:
                _average_(flat, self._world_size)
            total = torch.tensor([distance], dtype=torch.float64, device=_collective_device(copy.parameters.storage))
            dist.all_reduce(total)
            distance = float(total) / self._world_size
        copy.restore()
        return (distance / norm) ** 0.5 if norm > 0 else 0.0

    def _build(self, parameters: FlatBuffer) -> Tensor:
        """Replace ``parameters``, this replica's, by the consensus model's: here, the mean over ranks.

        Returns:
            ‖θ_i − θ̄‖² of this rank and ‖θ̄‖², shape (2,), float64.
        """
        squares = torch.zeros(2, dtype=torch.float64)
        if self._world_size > 1:
            for flat in parameters.segments:
                squares += _average_(flat, self._world_size)
        return squares


class _Copy:
    """Copies of all parameters and buffers of a module, flat."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {name: p.data for name, p in module.named_parameters()}
        self._buffers = {name: b.data for name, b in module.named_buffers()}
        self.parameters = _packed(self._parameters)
        self.buffers = _packed(self._buffers)

    def restore(self) -> None:
        """Write the copies back."""
        self.parameters.copy_to(self._parameters)
        self.buffers.copy_to(self._buffers)


def average_state(state: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Return the mean over ranks of a state dict, and rank 0's where an entry has no mean; a collective."""
    tensors = {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}
    if world_size > 1:
        buffer = _packed(tensors)
        for flat in buffer.segments:
            _average_(flat, world_size)
        buffer.copy_to(tensors)
    return {name: tensors.get(name, value) for name, value in state.items()}


def _packed(tensors: dict[str, Tensor]) -> FlatBuffer:
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    buffer = FlatBuffer.empty(FlatLayout(tensors), device)
    buffer.pack(tensors)
    return buffer


@torch.no_grad()
def _average_(flat: Tensor, world_size: int) -> Tensor:
    """Replace ``flat`` (1-D) by the mean over ranks, or by rank 0's values where the dtype has no mean.

    Computed as x_0 + mean(x_i − x_0) in float32 or wider, so that elements on which all ranks agree, infinite ones
    included, stay as they are.

    Returns:
        ‖x_i − x̄‖² of this rank and ‖x̄‖², shape (2,), float64.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    for chunk in flat.split(_CHUNK):
        first = chunk.clone()
        dist.broadcast(first.view(torch.uint8), src=0)
        mean = first
        if chunk.dtype.is_floating_point or chunk.dtype.is_complex:
            wide = torch.promote_types(chunk.dtype, torch.float32)
            base = first.to(wide)
            offset = torch.where(chunk == first, 0, chunk.to(wide) - base)
            dist.all_reduce(torch.view_as_real(offset) if wide.is_complex else offset)
            mean = torch.where(offset == 0, base, base + offset / world_size).to(chunk.dtype)
            squares += _squares(chunk, mean)
        chunk.copy_(mean)
    return squares


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype are alike bit for bit, NaN included."""
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


@torch.no_grad()
def squares_to(flat: Tensor, consensus: Tensor) -> Tensor:
    """Return ‖x_i − x̃‖² and ‖x̃‖², shape (2,), float64, of ``flat`` and ``consensus`` (both 1-D)."""
    chunks = zip(flat.split(_CHUNK), consensus.split(_CHUNK), strict=True)
    return sum((_squares(own, other) for own, other in chunks), torch.zeros(2, dtype=torch.float64))


def _squares(chunk: Tensor, consensus: Tensor) -> Tensor:
    wide = torch.promote_types(chunk.dtype, torch.float32)
    own, mean = (torch.view_as_real(x.to(wide)) if wide.is_complex else x.to(wide) for x in (chunk, consensus))
    difference = torch.where(own == mean, 0, own - mean)
    return torch.stack([torch.linalg.vector_norm(x.double()).cpu() ** 2 for x in (difference, mean)])


def _collective_device(like: Tensor) -> torch.device:
    return like.device if dist.get_backend() == "nccl" else torch.device("cpu")
