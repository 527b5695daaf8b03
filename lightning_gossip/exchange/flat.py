"""Many tensors of any dtypes in one flat buffer, so that an exchange is one message."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; every segment starts on a cache line, whatever its dtype


@dataclass(frozen=True)
class Segment:
    """The stretch of a buffer that holds all tensors of one dtype.

    Attributes:
        dtype: of the tensors.
        wire_dtype: in which they lie in the buffer.
        names: of the tensors, in the order in which they lie.
        start: offset in bytes.
        numel: elements.
    """

    dtype: torch.dtype
    wire_dtype: torch.dtype
    names: tuple[str, ...]
    start: int
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes in the buffer."""
        return self.numel * self.wire_dtype.itemsize

    def of(self, storage: Tensor) -> Tensor:
        """Return this segment of ``storage`` (1-D, uint8) as a 1-D view of ``wire_dtype``."""
        return storage[self.start : self.start + self.nbytes].view(self.wire_dtype)


class FlatLayout:
    """Where each of some named tensors lies in a flat buffer, one segment a dtype.

    Args:
        tensors: by name; two ranks that give the same names, shapes and dtypes have the same layout.
        wire_dtype: floating-point tensors that are wider than this are rounded to it; None keeps every dtype.
    """

    def __init__(self, tensors: Mapping[str, Tensor], wire_dtype: torch.dtype | None = None) -> None:
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, tensor in tensors.items():
            by_dtype.setdefault(tensor.dtype, []).append(name)
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.segments: list[Segment] = []
        end = 0
        for dtype, names in by_dtype.items():
            narrows = wire_dtype is not None and dtype.is_floating_point and wire_dtype.itemsize < dtype.itemsize
            numel = sum(self.shapes[name].numel() for name in names)
            on_wire = wire_dtype if wire_dtype is not None and narrows else dtype
            self.segments.append(Segment(dtype, on_wire, tuple(names), end, numel))
            end += -(-self.segments[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = end
        described = repr([(s, [tuple(self.shapes[name]) for name in s.names]) for s in self.segments])
        self.fingerprint = int.from_bytes(hashlib.blake2b(described.encode(), digest_size=7).digest(), "big")

    @property
    def narrows(self) -> bool:
        """Whether some tensor is rounded in the buffer."""
        return any(segment.wire_dtype != segment.dtype for segment in self.segments)

    @cached_property
    def unrounded(self) -> FlatLayout:
        """The layout of the same tensors, each in its own dtype."""
        if not self.narrows:
            return self
        dtypes = {name: segment.dtype for segment in self.segments for name in segment.names}
        shaped = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in self.shapes.items()}
        return FlatLayout(shaped)

    def split(self, storage: Tensor) -> list[Tensor]:
        """Return the segments of ``storage`` (1-D, uint8), each a 1-D view of its ``wire_dtype``."""
        return [segment.of(storage) for segment in self.segments]

    def views(self, segment: Segment, flat: Tensor) -> list[Tensor]:
        """Split ``flat`` (1-D, ``segment.numel`` elements) into shaped views, in the order of ``segment.names``."""
        shapes = [self.shapes[name] for name in segment.names]
        parts = flat.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def travelling(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a replica's parameters that travel: what requires a gradient (design §3)."""
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


class FlatBuffer:
    """Tensors laid out in one storage.

    Args:
        layout: what lies where.
        storage: 1-D, uint8, ``layout.nbytes`` long.
    """

    def __init__(self, layout: FlatLayout, storage: Tensor) -> None:
        self.layout = layout
        self.storage = storage
        self.segments = layout.split(storage)
        self._views = [layout.views(s, flat) for s, flat in zip(layout.segments, self.segments, strict=True)]

    @property
    def views(self) -> dict[str, Tensor]:
        """By name, where each tensor lies: of its shape, in the wire's dtype."""
        pairs = zip(self.layout.segments, self._views, strict=True)
        return {name: view for segment, views in pairs for name, view in zip(segment.names, views, strict=True)}

    @classmethod
    def empty(cls, layout: FlatLayout, device: torch.device) -> FlatBuffer:
        """Return a buffer of its own storage."""
        return cls(layout, torch.empty(layout.nbytes, dtype=torch.uint8, device=device))

    @classmethod
    def packed(cls, tensors: Mapping[str, Tensor]) -> FlatBuffer:
        """Return copies of ``tensors``, on the device of the first."""
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        buffer = cls.empty(FlatLayout(tensors), device)
        buffer.pack(tensors)
        return buffer

    @torch.no_grad()
    def pack(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` in, rounding to the wire's dtype."""
        for segment, views in zip(self.layout.segments, self._views, strict=True):
            torch._foreach_copy_(views, [tensors[name].detach() for name in segment.names])

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what :meth:`pack` copied in back to ``tensors``."""
        for segment, views in zip(self.layout.segments, self._views, strict=True):
            torch._foreach_copy_([tensors[name] for name in segment.names], views)
