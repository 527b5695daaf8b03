"""What workers and shards say to each other, checked field by field. Nothing that arrives is ever unpickled.

A worker asks, the shard answers with a header of the same kind, one question at a time on a link. The header's
``step`` is the worker's clock, ``number`` the training (counted by initialisations of the shard), ``nbytes`` and
``layout`` describe the payload. In answers ``number`` is the shard's version, its number of updates so far, and
``extra`` how many of these other workers made.

**Numbers of workers.** A worker of the beginning has its seat's number. In a run that goes on without those that it
loses a seat may be taken anew, by a process of another number, so that no word about a dead one is taken for one about
the living: seats × (number of the entry of the log of members by which it was taken in) + seat. All workers know it, as
they read one log; ascending numbers are the order of seniority, so that a shard's lead is the first of the members.

==================================  ===================================================================================
event                               what a shard does
==================================  ===================================================================================
HELLO of a worker of the beginning  knows it, unless a later number of its seat was heard of: then it is refused
HELLO of a later number of a seat   knows it; the one before it is dropped, whether or not anybody has said so
HELLO of a number that was dropped  refuses it, with the reason
DROP                                that number changes nothing from now on, nor do those before it of its seat; what
                                    they pushed stays. Those after it do not notice, however late the word comes
DROP of a number never heard of     the same: a process that was lost between its taking in and its HELLO
DROP by one that was dropped        closes its link
PUSH of one that was dropped        closes its link, and changes nothing: it may have slept, and wake up
the lead is dropped                 the lowest number that is left begins trainings, and ends the warm-up
BYE, or the link breaks             goes on for the others
all that are left have gone         ends, if one of them said BYE: then training is over. Where all broke off, one that
                                    has the state of a dead donor may be on its way: it waits for it until its timeout
==================================  ===================================================================================

A worker that joins is given its donor's clock, and the number of the training; it does not initialise, and has no
warm-up. It says HELLO, waits until that training is there, and its warm-up over, and PULLs: what it makes from there is
its own, and the first that it pushes. Where it is the only one left by then it ends the warm-up itself.

====================================  =================================================================================
a worker dies                         what the server holds of it, and of the one that comes after it
====================================  =================================================================================
before its first push, or joining     nothing
in mid-push                           its part, on each shard to which that came whole
after a push                          that push; the next of its seat pulls it, and counts it among those of others
====================================  =================================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.parameter_server.optimizers import ServerOptimizer
from lightning_gossip.transport.header import Header, LinkError
from lightning_gossip.transport.link import Link

MAX_JSON = 1 << 16
"""Bytes of the largest JSON payload."""

_ENTRIES = 32
"""Bits of the number of an entry in the log of members."""

ARRIVALS = "downpour/arrivals"
"""Key of a shard's store: how many links were asked for; the n-th asker leaves its end's name at ``arrival_key(n)``."""

SHARD = "shard"
"""Name of the shard's end of its links."""

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
}


class Message(IntEnum):
    """What a worker asks for (payload in parentheses), and what the shard answers."""

    HELLO = 16
    """First on a link (JSON: the worker's number and :class:`Setup`); answered by the shard's timeout in ms."""

    REFUSED = 17
    """A shard's answer to a HELLO that does not fit (text: why)."""

    INITIALISE = 18
    """The lead, worker 0 or the lowest number that is not dropped, begins a training (parameters); ``extra`` is 1 when
    the others may begin at once."""

    LOAD = 19
    """The lead begins a training from a checkpoint (JSON, then :attr:`TENSORS`)."""

    TENSORS = 20
    """The second half of LOAD and of the answer to SAVE (parameters, then optimizer state)."""

    READY = 21
    """The lead ends the warm-up."""

    STATUS = 22
    """Answered by JSON: :class:`Status`."""

    PUSH = 23
    """A displacement (parameters)."""

    PULL = 24
    """Answered by the shard's parameters."""

    PUSH_PULL = 25
    """Both at once, in this order (parameters), answered by the shard's parameters."""

    PING = 26
    """A sign of life; answered by the position."""

    SAVE = 27
    """Answered by JSON, then TENSORS."""

    BYE = 28
    """Last on a link."""

    DROP = 30
    """The run has lost the worker ``number``, and goes on; only where :attr:`Setup.survives`."""


class ProtocolError(LinkError):
    """What arrived does not fit; the link it came over is closed, and nothing was changed."""


@dataclass(frozen=True)
class Position:
    """Where a shard stood when it did something.

    Attributes:
        version: number of updates until then (that push among them).
        others: how many of them other workers made.
    """

    version: int
    others: int


@dataclass(frozen=True)
class Setup:
    """What all workers and one shard have to agree on.

    Attributes:
        workers: how many seats there are.
        shard, shards: number of this shard, and of all.
        dtypes, numels: of the shard's stretch of each segment of the flat parameters.
        layout: fingerprint of the whole flat parameters.
        optimizer: that the shard runs; None adds.
        survives: whether the run goes on without workers that it loses.
    """

    workers: int
    shard: int
    shards: int
    dtypes: tuple[str, ...]
    numels: tuple[int, ...]
    layout: int
    optimizer: ServerOptimizer | None = None
    survives: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of a payload of parameters."""
        return sum(n * DTYPES[dtype].itemsize for dtype, n in zip(self.dtypes, self.numels, strict=True))

    @property
    def fingerprint(self) -> int:
        """Of a payload of parameters, for headers."""
        described = f"{self.layout} {self.shard}/{self.shards} {self.dtypes} {self.numels}"
        return int.from_bytes(hashlib.blake2b(described.encode(), digest_size=7).digest(), "big")

    def has(self, worker: int) -> bool:
        """Whether a worker may have that number."""
        return 0 <= worker < (self.workers << _ENTRIES if self.survives else self.workers)

    def name_of(self, worker: int) -> str:
        """Return what to call the worker of that number, for people."""
        name = f"worker {worker % self.workers}"
        return name if worker < self.workers else f"{name} (number {worker})"

    def allocate(self) -> list[Tensor]:
        """Return room for parameters: a 1-D tensor a segment."""
        pairs = zip(self.dtypes, self.numels, strict=True)
        return [torch.empty(numel, dtype=DTYPES[dtype]) for dtype, numel in pairs]

    def state_room(self) -> list[dict[str, Tensor]]:
        """Return room for the optimizer's state: by name, a segment."""
        room: list[dict[str, Tensor]] = []
        for dtype, numel in zip(self.dtypes, self.numels, strict=True):
            kept = self.optimizer.state_tensors(DTYPES[dtype]) if self.optimizer is not None else []
            room.append({k.name: torch.empty(() if k.is_scalar else (numel,), dtype=k.dtype) for k in kept})
        return room

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads."""
        optimizer = None if self.optimizer is None else [self.optimizer.path, dict(self.optimizer.keywords)]
        return {
            "workers": self.workers,
            "shard": self.shard,
            "shards": self.shards,
            "dtypes": list(self.dtypes),
            "numels": list(self.numels),
            "layout": self.layout,
            "optimizer": optimizer,
            "survives": self.survives,
        }

    @classmethod
    def from_json(cls, value: Any) -> Setup:
        """Read a set-up that arrived.

        Raises:
            ProtocolError: if it is none.
        """
        types = {"workers": int, "shard": int, "shards": int, "dtypes": list, "numels": list, "layout": int}
        data = fields(value, {**types, "optimizer": object, "survives": bool})
        dtypes, numels, optimizer = data["dtypes"], data["numels"], data["optimizer"]
        require(1 <= data["workers"] <= 1 << 20, "impossible number of workers")
        require(0 <= data["shard"] < data["shards"] <= 1 << 16, "impossible number of shards")
        require(0 <= data["layout"] < 1 << 63, "impossible layout")
        known = all(type(dtype) is str and dtype in DTYPES for dtype in dtypes)
        require(known and len(set(dtypes)) == len(dtypes) == len(numels), "impossible dtypes")
        require(all(type(numel) is int and 0 <= numel < 1 << 48 for numel in numels), "impossible sizes")
        made = None
        if optimizer is not None:
            pair = isinstance(optimizer, list) and [type(part) for part in optimizer] == [str, dict]
            require(pair, "the optimizer is no import path with keywords")
            try:
                made = ServerOptimizer(*optimizer)
            except ValueError as error:
                raise ProtocolError(str(error)) from None
        cut = data["shard"], data["shards"], tuple(dtypes), tuple(numels), data["layout"]
        return cls(data["workers"], *cut, made, data["survives"])


@dataclass(frozen=True)
class Status:
    """How far a shard is.

    Attributes:
        training: number of initialisations.
        ready: whether workers other than the lead may begin.
        lead: worker 0, or the lowest that is not dropped, is ``"absent"``, ``"present"`` or ``"gone"``.
    """

    training: int
    ready: bool
    lead: str


def arrival_key(number: int) -> str:
    """Return the key under which the ``number``-th asker for a link writes the name of its end."""
    return f"downpour/arrival/{number}"


def require(condition: bool, otherwise: str) -> None:
    """Raise :class:`ProtocolError` with the reason ``otherwise`` unless ``condition``."""
    if not condition:
        raise ProtocolError(otherwise)


def fields(value: Any, types: Mapping[str, type]) -> dict[str, Any]:
    """Return ``value`` if it is a dict of just these keys and types.

    Raises:
        ProtocolError: if it is not.
    """
    require(isinstance(value, dict) and value.keys() == types.keys(), f"expected the fields {', '.join(types)}")
    for name, expected in types.items():
        require(expected is object or type(value[name]) is expected, f"'{name}' is no {expected.__name__}")
    return dict(value)


def as_bytes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what of contiguous ``tensors`` travels: uint8 views of those that are not empty."""
    return [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]


def size_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of ``tensors``."""
    return sum(tensor.nbytes for tensor in tensors)


def state_tensors(parameters: Sequence[Tensor], optimizer: Sequence[dict[str, Tensor]] | None) -> list[Tensor]:
    """Return the tensors of a shard's state in the order in which they travel."""
    return [*parameters, *(tensor for state in optimizer or () for _, tensor in sorted(state.items()))]


def encode(value: Any) -> Tensor:
    """Return ``value`` as a JSON payload."""
    return torch.frombuffer(bytearray(json.dumps(value, allow_nan=False).encode()), dtype=torch.uint8)


def receive_json(link: Link, header: Header) -> Any:
    """Receive the JSON payload that ``header`` announced.

    Raises:
        ProtocolError: if it is too long, or no JSON.
    """
    require(0 < header.nbytes <= MAX_JSON, f"a JSON payload of {header.nbytes} bytes")
    payload = torch.zeros(header.nbytes, dtype=torch.uint8)
    link.receive(payload)
    try:
        return json.loads(payload.numpy().tobytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no JSON: {error}") from None


def receive_tensors(link: Link, tensors: Sequence[Tensor]) -> None:
    """Receive a payload of tensors that were sent by :func:`as_bytes`."""
    for part in as_bytes(tensors):
        link.receive(part)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
