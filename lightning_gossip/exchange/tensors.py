"""Tensors of any kind: what they hold, whether it can be written in place, and whether it has a mean."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_WORDS = 2**15
"""64-bit words that are hashed at a time: they and their weights stay in a CPU's cache."""

_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
_AVERAGED = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128} | _FLOAT8
_INTEGERS = {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
_WRITABLE = _AVERAGED | _INTEGERS | {torch.bool}


def describe(tensor: Tensor) -> str:
    """Return shape, dtype and, where it is not the ordinary one, layout, in words."""
    shape = "nested" if tensor.is_nested else f"shape {tuple(tensor.shape)}"
    layout = "" if tensor.layout is torch.strided else f", {tensor.layout}"
    return f"{shape}, {tensor.dtype}{layout}"


def has_mean(tensor: Tensor) -> bool:
    """Whether the dtype is one of numbers of which a mean can be taken and written back."""
    return tensor.dtype in _AVERAGED


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, float32 or wider, in which a mean over tensors of ``dtype`` is taken."""
    return torch.float32 if dtype in _FLOAT8 else torch.promote_types(dtype, torch.float32)


def elements(tensor: Tensor) -> Tensor | None:
    """Return a view of ``tensor`` that has each of its elements in memory once, for reading and writing.

    Of what was made by ``expand`` it has one value along each dimension in which nothing changes.

    Returns:
        None where the tensor cannot be written element by element: sparse, quantized or nested ones, and those whose
        elements overlap otherwise.
    """
    data = tensor.data
    if not _is_plain(data) or data.dtype not in _WRITABLE:
        return None
    for dim, (size, stride) in enumerate(zip(data.shape, data.stride(), strict=True)):
        if size > 1 and stride == 0:
            data = data.narrow(dim, 0, 1)
    needed = 1
    for stride, size in sorted((stride, size) for size, stride in zip(data.shape, data.stride(), strict=True)):
        if size > 1 and stride < needed:
            return None
        needed = max(needed, stride * (size - 1) + needed)
    return data


def digest(tensor: Tensor) -> bytes:
    """Return 8 bytes that tell whether two tensors are alike: in kind, shape, dtype and, bit for bit, contents.

    It reads the tensor once, at about the memory's pace.
    """
    found = hashlib.blake2b(describe(tensor).encode(), digest_size=8)
    for part in _parts(tensor.detach()):
        found.update(f"{part.dtype}{tuple(part.shape)}".encode())
        found.update(_bytes(part.contiguous().view(-1).view(torch.uint8)))
    return found.digest()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an array in memory and nothing more."""
    strided = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    return strided and not (
        tensor.is_meta or tensor.is_conj() or tensor.is_neg() or is_traceable_wrapper_subclass(tensor)
    )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Return plain tensors that hold all that ``tensor`` does."""
    if tensor.is_meta:  # there is nothing in it
        return
    if _is_plain(tensor):
        yield tensor
    elif is_traceable_wrapper_subclass(tensor):  # of torchao, for one
        names, context = tensor.__tensor_flatten__()
        yield _as_tensor(repr(context).encode())
        for name in names:
            yield from _parts(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices()
        yield tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_conj() or tensor.is_neg():
        yield tensor.resolve_conj().resolve_neg()
    else:
        file = io.BytesIO()
        torch.save(tensor, file)
        yield _as_tensor(file.getvalue())


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(flat: Tensor) -> bytes:
    """Return ``flat`` (1-D, uint8), or where it is long a number for each block of it: a weighted sum modulo 2⁶⁴."""
    words = flat.numel() // 8
    if words < _WORDS or flat.storage_offset() % 8:
        return flat.cpu().numpy().tobytes()
    sums = []
    weights = _weights(flat.device)
    for block in flat[: 8 * words].view(torch.int64).split(_WORDS if flat.device.type == "cpu" else words):
        products = [torch.mul(some, weights[: some.numel()]).sum() for some in block.split(_WORDS)]
        sums += products
    return torch.stack(sums).cpu().numpy().tobytes() + flat[8 * words :].cpu().numpy().tobytes()


@cache
def _weights(device: torch.device) -> Tensor:
    """Return odd numbers: whichever single word changes, the weighted sum does."""
    drawn = torch.randint(-(2**62), 2**62, (_WORDS,), generator=torch.Generator().manual_seed(0))
    return (2 * drawn + 1).to(device)
