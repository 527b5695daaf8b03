"""Snapshots that other processes of this host read where they were written, in anonymous shared memory.

The memory has no name. A file descriptor of its owner is the only handle, which others reach under
``/proc/<pid>/fd``, and the kernel frees it with the last process that maps it, however that ends: nothing to clean up.
Linux only.

A rank's outbox holds its snapshots and says which they are; readers look, read, and write there what they have read.
Words are written one at a time, the one that makes the others count last. Between a snapshot and its word the
interpreter's lock changes hands, which orders the two for other processors.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import secrets
import weakref
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gossip.transport.header import Header

log = logging.getLogger(__name__)

AVAILABLE = hasattr(os, "memfd_create")

SLOTS = 2
"""Of an outbox: while a slow partner still reads one snapshot, the next can be taken."""

_NAME = "lightning_gossip"
_TOKEN, _CLOCK, _HEADERS = 0, 1, 2  # places of words; a header a slot, then a word a reader
_HEADER_WORDS = len(astuple(Header(0, 0, 0)))
_READERS = _HEADERS + SLOTS * _HEADER_WORDS


_ERA = 2**40  # more steps than a training has


def moment(header: Header) -> int:
    """Return a number that grows from one exchange to the next, also where the clock was set back (``extra``)."""
    return header.extra * _ERA + header.step


def step_of(moment: int) -> int:
    """Return the step at a :func:`moment`."""
    return moment % _ERA


@dataclass(frozen=True, slots=True)
class Address:
    """Where another process finds an outbox: four integers of 64 bits.

    Attributes:
        pid, descriptor: of the owner; process 0 has none.
        token: stands in the memory too, for process numbers mean something else in another container.
        slot_bytes: size of a slot.
    """

    pid: int = 0
    descriptor: int = 0
    token: int = 0
    slot_bytes: int = 0

    @property
    def path(self) -> str:
        """Where the operating system shows the memory."""
        return f"/proc/{self.pid}/fd/{self.descriptor}"

    def to_tensor(self) -> Tensor:
        """Return the address as it travels: 1-D, uint8."""
        return torch.tensor(astuple(self), dtype=torch.int64).view(torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Address:
        """Read an address that arrived."""
        return cls(*tensor.view(torch.int64).tolist())


ADDRESS_BYTES = Address().to_tensor().nbytes


class _Mapped:
    """One process' view of an outbox: its words, and the slots."""

    def __init__(self, descriptor: int, slot_bytes: int, readers: int) -> None:
        memory = mmap.mmap(descriptor, _total_bytes(slot_bytes, readers))
        self.words = np.frombuffer(memory, dtype=np.int64, count=_READERS + readers)
        self._whole = torch.frombuffer(memory, dtype=torch.uint8)[_slots_start(readers) :]
        self.slots = self._whole.split(slot_bytes)

    def pin(self) -> None:
        """Page-lock the slots, for copies from and to a GPU beside training.

        Raises:
            PinningError: if the operating system or the driver does not do that.
        """
        code = int(torch.cuda.cudart().cudaHostRegister(self._whole.data_ptr(), self._whole.nbytes, 0))
        if code != 0:
            raise PinningError(f"cudaHostRegister answered {code} for {self._whole.nbytes} bytes of shared memory")
        weakref.finalize(self, _unpin, self._whole)


class Outbox:
    """Slots in which this process puts its snapshots, and who reads them; belongs to one thread.

    Args:
        nbytes: of the largest snapshot; pages that are never written take no memory.
        readers: number of ranks.

    Raises:
        OSError: where the operating system has no such memory for this process; see :meth:`where_possible`.
    """

    def __init__(self, nbytes: int, readers: int) -> None:
        slot_bytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if not hasattr(os, "memfd_create"):
            raise OSError(errno.ENOSYS, "this platform has no memfd_create")
        descriptor = os.memfd_create(_NAME)
        self.close = weakref.finalize(self, os.close, descriptor)
        """Let nobody else find the outbox; who has, keeps the memory."""
        os.ftruncate(descriptor, _total_bytes(slot_bytes, readers))
        self._mapped = _Mapped(descriptor, slot_bytes, readers)
        self._mapped.words[_TOKEN] = token = secrets.randbits(63)
        self.address = Address(os.getpid(), descriptor, token, slot_bytes)
        self._lent: list[dict[int, int]] = [{} for _ in range(SLOTS)]
        self.pin = self._mapped.pin

    @classmethod
    def where_possible(cls, nbytes: int, readers: int) -> Outbox | None:
        """Return an outbox, or None where there can be none: in a sandbox, under a limit, on an old kernel."""
        try:
            return cls(nbytes, readers)
        except OSError as error:
            log.info("snapshots travel on links, also on this host: shared memory can not be had (%s)", error)
            return None

    @property
    def slots(self) -> tuple[Tensor, ...]:
        """1-D, uint8; they keep the memory alive."""
        return self._mapped.slots

    def announce(self, slot: int, header: Header) -> None:
        """Tell readers that the snapshot in ``slot`` is the one of ``header``."""
        words = self._mapped.words
        start = _HEADERS + slot * _HEADER_WORDS
        words[start : start + _HEADER_WORDS] = astuple(header)
        words[_CLOCK] = moment(header)

    def lend(self, slot: int, reader: int, when: int) -> None:
        """Note that ``reader`` reads the snapshot of a :func:`moment` in ``slot``, until it says that it has."""
        self._lent[slot][reader] = when

    def readers(self, slot: int) -> dict[int, int]:
        """Return who still reads ``slot``, with the moment of the snapshot there."""
        read = self._mapped.words[_READERS:]
        self._lent[slot] = {reader: when for reader, when in self._lent[slot].items() if read[reader] < when}
        return self._lent[slot]

    def forget(self, reader: int) -> None:
        """Take back what ``reader`` was lent: it is lost, and reads nothing that counts."""
        for lent in self._lent:
            lent.pop(reader, None)

    def free_slot(self) -> int | None:
        """Return the first slot that nobody reads: the first of all is likeliest to be in the cache."""
        return next((slot for slot in range(SLOTS) if not self.readers(slot)), None)


class Inbox:
    """Another process' outbox, seen from a reader; made by :meth:`open`."""

    def __init__(self, address: Address, mapped: _Mapped) -> None:
        self.address = address
        self._mapped = mapped
        self.pin = mapped.pin

    @classmethod
    def open(cls, address: Address, readers: int) -> Inbox | None:
        """Map the outbox at ``address``; None where this process does not see it: on another host, or kept apart."""
        try:
            if not os.readlink(address.path).startswith(f"/memfd:{_NAME}"):
                return None
            descriptor = os.open(address.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size != _total_bytes(address.slot_bytes, readers):
                return None
            mapped = _Mapped(descriptor, address.slot_bytes, readers)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return cls(address, mapped) if int(mapped.words[_TOKEN]) == address.token else None

    @property
    def owner_lives(self) -> bool:
        """Whether the owner has not ended, nor closed its outbox."""
        return os.path.lexists(self.address.path)

    def has_begun(self, when: int) -> bool:
        """Whether the owner has announced the snapshot of a :func:`moment` or a later one."""
        return bool(self._mapped.words[_CLOCK] >= when)

    def find(self, when: int) -> tuple[Header, Tensor] | None:
        """Return header and slot (1-D, uint8, to be read only) of the snapshot of a moment, if there is one yet."""
        if not self.has_begun(when):
            return None
        for slot, memory in enumerate(self._mapped.slots):
            start = _HEADERS + slot * _HEADER_WORDS
            header = Header(*self._mapped.words[start : start + _HEADER_WORDS].tolist())
            if moment(header) == when:
                return header, memory
        return None

    def finish(self, reader: int, when: int) -> None:
        """Tell the owner that ``reader`` needs the snapshot of a moment, and those before it, no more."""
        self._mapped.words[_READERS + reader] = when


class PinningError(RuntimeError):
    """The operating system or the driver does not page-lock shared memory."""


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _slots_start(readers: int) -> int:
    return -(-8 * (_READERS + readers) // mmap.PAGESIZE) * mmap.PAGESIZE


def _total_bytes(slot_bytes: int, readers: int) -> int:
    return _slots_start(readers) + SLOTS * slot_bytes
