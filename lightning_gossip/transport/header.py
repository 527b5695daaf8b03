"""What goes before a payload, and what a link raises: a typed header of fixed size.

A payload of the wrong kind, step or size is noticed before a byte of it is received.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MAGIC = 0x6C67_0001  # "lg", version 1 of the header


class Kind(IntEnum):
    """What a message between two ranks is."""

    SNAPSHOT = 1
    """Of a replica, at the step in the header; ``extra``: how often the sender's exchange clock was set back."""

    OUTBOX = 2
    """Where the sender's outbox is (:mod:`~lightning_gossip.transport.shared_memory`)."""

    NEAR = 3
    """``number`` 1: the sender of this can read the other's outbox; 0: it can not."""

    REDUCTION = 4
    """Of an all-reduce (:mod:`~lightning_gossip.transport.all_reduce`); ``number``: which part of the model."""

    STATE = 5
    """Of a whole rank, for one that joins (:mod:`~lightning_gossip.transport.handover`); ``layout``: a checksum."""


class LinkError(RuntimeError):
    """A link failed or was closed; it carries nothing any more."""


class LayoutMismatch(LinkError):
    """The other end sent a payload of the kind and step that were expected, but of other tensors."""


class SendFailed(LinkError):
    """The other end is gone before it took what was sent; :attr:`received` came whole, None where nothing did."""

    def __init__(self, message: str, received: Tensor | None) -> None:
        super().__init__(message)
        self.received = received


@dataclass(frozen=True, slots=True)
class Header:
    """What goes before a payload: 8 integers of 64 bits.

    Attributes:
        kind: see :class:`Kind`.
        step: the sender's exchange clock.
        nbytes: of the payload that follows, 0 for none.
        layout: fingerprint of names, shapes and dtypes in the payload.
        number, extra: free for each kind.
    """

    kind: int
    step: int
    nbytes: int
    layout: int = 0
    number: int = 0
    extra: int = 0

    def to_tensor(self) -> Tensor:
        """Return the header as it travels."""
        return torch.tensor([_MAGIC, *astuple(self), _MAGIC], dtype=torch.int64)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Header:
        """Read a header that arrived.

        Raises:
            LinkError: if it is none.
        """
        begin, *fields, end = tensor.tolist()
        if (begin, end) != (_MAGIC, _MAGIC):  # at the end too: gloo accepts less than was asked for
            raise LinkError(f"what arrived is no header of this version of lightning-gossip ({begin} … {end})")
        return cls(*fields)
