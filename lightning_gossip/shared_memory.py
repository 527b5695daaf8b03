"""Snapshots that other processes of this host read where they were written, in anonymous shared memory.

The memory has no name. A file descriptor of its owner is the only handle, which others reach under
``/proc/<pid>/fd``, and the kernel frees it with the last process that maps it, however that ends: nothing to clean up.
Linux only.
"""

from __future__ import annotations

import mmap
import os
import secrets
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

AVAILABLE = hasattr(os, "memfd_create")

SLOTS = 2
"""Of an outbox: while a slow partner still reads one snapshot, the next can be taken."""

_NAME = "lightning_gossip"
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class Address:
    """Where another process finds an outbox: four integers of 64 bits.

    Attributes:
        pid, descriptor: of the owner.
        token: stands in the memory too, for process numbers mean something else in another container.
        slot_bytes: size of a slot.
    """

    pid: int
    descriptor: int
    token: int
    slot_bytes: int

    def to_tensor(self) -> Tensor:
        """Return the address as it travels: 1-D, uint8."""
        return torch.tensor(astuple(self), dtype=torch.int64).view(torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Address:
        """Read an address that arrived."""
        return cls(*tensor.view(torch.int64).tolist())


ADDRESS_BYTES = Address(0, 0, 0, 0).to_tensor().nbytes


class _Mapped:
    """One process' view of an outbox: its token, for each reader the last step that it has read, and the slots."""

    def __init__(self, descriptor: int, slot_bytes: int, readers: int) -> None:
        memory = mmap.mmap(descriptor, _total_bytes(slot_bytes, readers))
        self.slot_bytes = slot_bytes
        self.words = np.frombuffer(memory, dtype=np.int64, count=1 + readers)
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        self.slots = everything[_slots_start(readers) :].split(slot_bytes)


class Outbox:
    """Slots in which this process puts its snapshots, and who reads them; belongs to one thread.

    Args:
        slot_bytes: size of the largest snapshot.
        readers: number of ranks.
    """

    def __init__(self, slot_bytes: int, readers: int) -> None:
        slot_bytes = -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT
        self._descriptor = os.memfd_create(_NAME)
        os.ftruncate(self._descriptor, _total_bytes(slot_bytes, readers))
        self._mapped = _Mapped(self._descriptor, slot_bytes, readers)
        self._mapped.words[0] = token = secrets.randbits(63)
        self.address = Address(os.getpid(), self._descriptor, token, slot_bytes)
        self._lent: list[dict[int, int]] = [{} for _ in range(SLOTS)]

    @property
    def slots(self) -> tuple[Tensor, ...]:
        """1-D, uint8; they keep the memory alive."""
        return self._mapped.slots

    def lend(self, slot: int, reader: int, step: int) -> None:
        """Note that ``reader`` reads the snapshot of ``step`` in ``slot``, until it says that it has finished."""
        self._lent[slot][reader] = step

    def readers(self, slot: int) -> dict[int, int]:
        """Return who still reads ``slot``, with the step of the snapshot there."""
        read = self._mapped.words[1:]
        self._lent[slot] = {reader: step for reader, step in self._lent[slot].items() if read[reader] < step}
        return self._lent[slot]

    def free_slot(self) -> int | None:
        """Return the first slot that nobody reads: the first of all is likeliest to be in the cache."""
        return next((slot for slot in range(SLOTS) if not self.readers(slot)), None)

    def __del__(self) -> None:
        os.close(self._descriptor)


class Inbox:
    """Another process' outbox, seen from a reader; made by :meth:`open`."""

    def __init__(self, mapped: _Mapped) -> None:
        self._mapped = mapped

    @classmethod
    def open(cls, address: Address, readers: int) -> Inbox | None:
        """Map the outbox at ``address``; None where this process does not see it: on another host, or kept apart."""
        path = f"/proc/{address.pid}/fd/{address.descriptor}"
        try:
            if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
                return None
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size != _total_bytes(address.slot_bytes, readers):
                return None
            mapped = _Mapped(descriptor, address.slot_bytes, readers)
        finally:
            os.close(descriptor)
        return cls(mapped) if int(mapped.words[0]) == address.token else None

    def slot(self, number: int, nbytes: int) -> Tensor | None:
        """Return the first ``nbytes`` of a slot, 1-D, uint8, to be read only; None where there is no such room."""
        if not 0 <= number < SLOTS or nbytes > self._mapped.slot_bytes:
            return None
        return self._mapped.slots[number][:nbytes]

    def finish(self, reader: int, step: int) -> None:
        """Tell the owner that ``reader`` needs the snapshot of ``step``, and those before it, no more.

        The interpreter's lock, taken and given back since the snapshot was read, orders the two for other processors.
        """
        self._mapped.words[1 + reader] = step


def _slots_start(readers: int) -> int:
    return -(-8 * (1 + readers) // mmap.PAGESIZE) * mmap.PAGESIZE


def _total_bytes(slot_bytes: int, readers: int) -> int:
    return _slots_start(readers) + SLOTS * slot_bytes
