"""The consensus model, the mean of the replicas, and the window during which a module holds it.

Parameters and running statistics are averaged in float32 or wider; other buffers are rank 0's; what is alike on all
ranks is left alone (:mod:`~lightning_gossip.exchange.models` says which is which).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gossip.exchange.flat import FlatBuffer
from lightning_gossip.exchange.models import (
    agree,
    all_reduce_,
    averaged_buffers,
    broadcast_,
    collective_device,
    group_size,
    report_misfits,
    shared_buffers,
    shared_parameters,
)
from lightning_gossip.exchange.tensors import elements, has_mean, wide

_CHUNK = 2**22
"""Elements averaged at a time: bounds the memory for sums in a wider dtype."""

_ROUNDING = 16
"""How many units in the last place a parameter may be off, in norm, and still count as not changed."""


class Consensus:
    """The replicas of one module, seen from one rank.

    :meth:`build` is a collective of the default group and leaves the module as it is, so that it can be repeated;
    :meth:`enter` or :meth:`adopt` follows it.

    Args:
        module: this rank's replica.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._built: _Copy | None = None
        self._replica: _Copy | None = None
        self._square_of_alike = 0.0  # ‖·‖² of the parameters on which all ranks agree
        self._norms: dict[str, tuple[bytes, float]] = {}  # of these, and of which contents: most never change
        self._flagged = False  # whether some rank's :meth:`_flag` was raised when the ranks agreed last
        self._consensus: _Copy | None = None  # as it was when the window began; kept after :meth:`leave`

    @property
    def holds(self) -> bool:
        """Whether the module holds the consensus model for the moment (between :meth:`enter` and :meth:`leave`)."""
        return self._replica is not None

    @property
    def kept(self) -> bool:
        """Whether the consensus model was built and not forgotten since."""
        return self._consensus is not None

    def note(self) -> None:
        """Called before others may put something else in place of the replica, to be averaged by :meth:`enter`."""

    def prepare(self) -> None:
        """Called on all ranks before they meet to build; may meet by itself."""

    def build(self) -> float:
        """Average the replicas; return the consensus distance (design §1).

        Raises:
            RuntimeError: naming a parameter that does not fit on all ranks.
        """
        self._built = None
        built = _Copy(self._differing())
        distance = self._average(built)
        self._built = built
        return distance

    def adopt(self) -> None:
        """Make the module the consensus model that was built, for good."""
        self._take_built().restore()
        self.forget()

    def enter(self) -> None:
        """Make the module the consensus model that was built until :meth:`leave`."""
        self._consensus = self._take_built()
        self._replica = self._consensus.now()
        self._consensus.restore()

    def _take_built(self) -> _Copy:
        built, self._built = self._built, None
        if built is None:
            raise RuntimeError("the consensus model was not built")
        return built

    @contextmanager
    def again(self) -> Iterator[None]:
        """Have the module be the consensus model that is kept for a moment; what is changed meanwhile stays."""
        if self._consensus is None:
            yield
            return
        present = self._consensus.now()
        self._consensus.restore()
        try:
            yield
        finally:
            present.restore(except_for=self._consensus.changed())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Give the module its replica back for a moment within the window."""
        if self._replica is None or self._consensus is None:
            yield
            return
        present = self._consensus.now()
        changed = {name for name in self._consensus.changed() if not self._consensus.is_parameter(name)}
        self._replica.restore(except_for=changed)
        try:
            yield
        finally:
            present.restore()

    def leave(self, final: bool = True) -> bool:
        """Give the module its replica back, but for what was changed within the window; harmless outside of it.

        Args:
            final: if False, the window stays open where somebody has put other weights into the module, who is
                going to put back what was there.

        Returns:
            Whether the window is closed.
        """
        if self._replica is None or self._consensus is None:
            return True
        changed = self._consensus.changed()
        if changed and not final:
            moved = self._replica.parameters_unlike(self._consensus)
            if moved and moved <= changed:
                return False
        self._replica.restore(except_for=changed)
        self._replica = None
        return True

    def touched(self) -> frozenset[int]:
        """Return where the memory begins in which the replica and the consensus model may differ, once it is built.

        All else is alike on all ranks, and stays in place where a replica gives way to the consensus model.
        """
        copy = self._built or self._consensus
        return frozenset() if copy is None else copy.addresses()

    def forget(self) -> None:
        """Release the memory of a window that is closed."""
        if self._replica is None:
            self._consensus = None

    def changed(self) -> bool:
        """Whether the module's parameters are not any more what they were when the window began."""
        consensus = self._consensus
        return consensus is not None and any(map(consensus.is_parameter, consensus.changed(rounding=0)))

    def _flag(self) -> bool:
        """Return what the other ranks should know when the consensus model is built."""
        return False

    def _differing(self) -> _Shared:
        """Agree with the other ranks on what to make alike."""
        if group_size() == 1:
            return _Shared(self._module)
        parameters, buffers = shared_parameters(self._module), shared_buffers(self._module)
        statistics = averaged_buffers(self._module)
        tensors: dict[str, Tensor] = {**parameters, **buffers}
        changing = {name for name, p in parameters.items() if p.requires_grad}
        agreement = agree(tensors, changing, self._flag())
        report_misfits(agreement, parameters)
        self._flagged = agreement.flagged
        own = {name: data for name in agreement.differing if (data := elements(tensors[name])) is not None}
        alike = {name: p for name, p in parameters.items() if name not in own}
        self._square_of_alike = sum(self._norm_of(name, p, agreement.contents[name]) ** 2 for name, p in alike.items())
        averaged = parameters.keys() | statistics
        with_mean = [name for name, data in own.items() if has_mean(data)]
        return _Shared(
            self._module,
            parameters=tuple(name for name in with_mean if name in parameters),
            statistics=tuple(name for name in with_mean if name in statistics),
            others=tuple(name for name in own if name not in with_mean or name not in averaged),
        )

    def _norm_of(self, name: str, parameter: Tensor, contents: bytes) -> float:
        known, norm = self._norms.get(name, (b"", 0.0))
        if not contents or known != contents:
            norm = _norm(parameter)
            self._norms[name] = contents, norm
        return norm

    def _average(self, copy: _Copy) -> float:
        distance, norm = self._build(copy.parameters).tolist()
        if group_size() > 1:
            for flat in copy.statistics.segments:
                _average_(flat)
            for flat in copy.others.segments:
                _take_first_(flat)
            total = torch.tensor([distance], dtype=torch.float64, device=collective_device())
            all_reduce_(total)
            distance = float(total) / group_size()
            norm += self._square_of_alike
        return (distance / norm) ** 0.5 if norm > 0 else 0.0

    def _build(self, parameters: FlatBuffer) -> Tensor:
        """Replace ``parameters``, this replica's, by the consensus model's: here, the mean over ranks.

        Returns:
            ‖θ_i − θ̄‖² of this rank and ‖θ̄‖², shape (2,), float64.
        """
        squares = torch.zeros(2, dtype=torch.float64)
        for flat in parameters.segments:
            squares += _average_(flat)
        return squares


@dataclass(frozen=True)
class _Shared:
    """Names of a module's tensors that are to be made alike: those that are averaged, and those that are rank 0's."""

    module: nn.Module
    parameters: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def present(self) -> dict[str, Tensor]:
        """Return what they are now, by name: others may have put other tensors in their place since."""
        now: dict[str, Tensor] = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        found = {name: elements(now[name]) for name in self.parameters + self.statistics + self.others if name in now}
        return {name: own for name, own in found.items() if own is not None}


class _Copy:
    """Flat copies of tensors of a module."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        present = shared.present()
        groups = (shared.parameters, shared.statistics, shared.others)
        self.parameters, self.statistics, self.others = (
            FlatBuffer.packed({name: present[name] for name in names if name in present}) for names in groups
        )

    def now(self) -> _Copy:
        """Return copies of what the same tensors hold now."""
        return _Copy(self._shared)

    @torch.no_grad()
    def restore(self, except_for: Collection[str] = ()) -> None:
        """Write the copies back, where there is a tensor of that name and shape still."""
        present = self._shared.present()
        for copies in self._by_segment():
            fitting = [
                (present[name], copied)
                for name, copied in copies
                if name in present and name not in except_for and _fits(present[name], copied)
            ]
            if fitting:
                torch._foreach_copy_([own for own, _ in fitting], [copied for _, copied in fitting])

    def addresses(self) -> frozenset[int]:
        return frozenset(own.untyped_storage().data_ptr() for own in self._shared.present().values())

    def is_parameter(self, name: str) -> bool:
        return name in self._shared.parameters

    def changed(self, rounding: int = _ROUNDING) -> set[str]:
        """Return the names of the tensors that hold something else now; of parameters, beyond so much rounding."""
        present = self._shared.present()

        def holds(name: str, copied: Tensor) -> bool:
            own = present.get(name)
            if own is None or not _fits(own, copied):
                return False
            return _same(own, copied) or bool(rounding and self.is_parameter(name) and _near(own, copied, rounding))

        return {name for name, copied in self._views() if not holds(name, copied)}

    def parameters_unlike(self, other: _Copy) -> set[str]:
        """Return the names of the parameters that have other copies there."""
        theirs = dict(other._views())
        return {name for name, copied in self._views() if self.is_parameter(name) and not _same(copied, theirs[name])}

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        for buffer in (self.parameters, self.statistics, self.others):
            yield from buffer.views.items()

    def _by_segment(self) -> Iterator[list[tuple[str, Tensor]]]:
        for buffer in (self.parameters, self.statistics, self.others):
            for segment, flat in zip(buffer.layout.segments, buffer.segments, strict=True):
                yield list(zip(segment.names, buffer.layout.views(segment, flat), strict=True))


def average_state(state: Mapping[str, Any], averaged: Callable[[str], bool]) -> dict[str, Any]:
    """Return the mean over ranks of a state dict's entries that fit on all ranks, and the others as they are here.

    A collective of the default group; the ranks may have different entries.

    Args:
        state: tensors, and anything else, by name.
        averaged: whether to take the mean of an entry of that name, where its dtype has one; or else rank 0's.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if group_size() == 1:
        return dict(state)
    made_alike = {}
    for name in agree(tensors).differing:
        own = elements(tensors[name])
        if own is not None:
            copy = own.clone(memory_format=torch.contiguous_format)
            whole = copy.view(-1)
            if averaged(name) and has_mean(own):
                _average_(whole)
            else:
                _take_first_(whole)
            made_alike[name] = copy.expand(tensors[name].shape)
    return {name: made_alike.get(name, value) for name, value in state.items()}


@torch.no_grad()
def _average_(flat: Tensor) -> Tensor:
    """Replace ``flat`` (1-D, of a dtype that has a mean) by the mean over ranks.

    Computed as x_0 + mean(x_i − x_0) in float32 or wider, so that elements on which all ranks agree, infinite ones
    included, stay as they are.

    Returns:
        ‖x_i − x̄‖² of this rank and ‖x̄‖², shape (2,), float64.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    for chunk in flat.split(_CHUNK):
        first = chunk.clone()
        broadcast_(first.view(torch.uint8))
        base, own = first.to(wide(flat.dtype)), chunk.to(wide(flat.dtype))
        offset = torch.where(own == base, 0, own - base)
        all_reduce_(torch.view_as_real(offset) if offset.is_complex() else offset)
        mean = torch.where(offset == 0, base, base + offset / group_size()).to(chunk.dtype)
        squares += _squares(chunk, mean)
        chunk.copy_(mean)
    return squares


@torch.no_grad()
def _take_first_(flat: Tensor) -> None:
    """Replace ``flat`` (1-D) by rank 0's, whatever its dtype: as bytes."""
    for chunk in flat.split(_CHUNK):
        broadcast_(chunk.view(torch.uint8))


def _fits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype are alike bit for bit, NaN included."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(one.dtype.itemsize, torch.int64)
    return torch.equal(*(tensor.reshape(-1).view(word) for tensor in (one, other)))


def _near(one: Tensor, other: Tensor, rounding: int) -> bool:
    difference = _norm(one.to(wide(one.dtype)) - other.to(wide(other.dtype)))
    return not difference > rounding * torch.finfo(one.dtype).eps * _norm(other)


def _norm(tensor: Tensor) -> float:
    """Return ‖x‖ in float64; 0 where it has none."""
    own = elements(tensor)
    if own is None or not has_mean(own):
        return 0.0
    dtype = torch.complex128 if own.is_complex() else torch.float64
    chunks = own.reshape(-1).split(_CHUNK)
    return float(sum(float(torch.linalg.vector_norm(chunk.to(dtype))) ** 2 for chunk in chunks) ** 0.5)


@torch.no_grad()
def squares_to(flat: Tensor, consensus: Tensor) -> Tensor:
    """Return ‖x_i − x̃‖² and ‖x̃‖², shape (2,), float64, of ``flat`` and ``consensus`` (both 1-D)."""
    chunks = zip(flat.split(_CHUNK), consensus.split(_CHUNK), strict=True)
    return sum((_squares(own, other) for own, other in chunks), torch.zeros(2, dtype=torch.float64))


def _squares(chunk: Tensor, consensus: Tensor) -> Tensor:
    own, mean = (x.to(wide(x.dtype)) for x in (chunk, consensus))
    if own.is_complex():
        own, mean = torch.view_as_real(own), torch.view_as_real(mean)
    difference = torch.where(own == mean, 0, own - mean)
    return torch.stack([torch.linalg.vector_norm(x.double()).cpu() ** 2 for x in (difference, mean)])
