"""What a rank offers to others, and gets of them, where exchanges go by no common clock."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_gossip.exchange.agreement import Word
from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout
from lightning_gossip.transport.header import Header

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """What stands still: the parameters that travel, as they are at the beginning of ``step``.

    Attributes:
        step, layout, tensors: as they say.
        moment: how often they have changed, by a step's end or an exchange applied between two.
    """

    step: int
    moment: int
    layout: FlatLayout
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A copy of what stood still at the beginning of a step."""

    of: Standing
    buffer: FlatBuffer

    @property
    def step(self) -> int:
        """See :class:`Standing`."""
        return self.of.step

    @property
    def payload(self) -> Tensor:
        """1-D, uint8."""
        return self.buffer.storage

    def header(self, word: Word, number: int = 0) -> Header:
        """Return what is said of it; ``number`` as in :class:`~lightning_gossip.exchange.agreement.Say`."""
        layout = self.buffer.layout
        return Header(word, self.step, layout.nbytes, layout.fingerprint, number, self.of.moment)


@dataclass(frozen=True)
class Received:
    """A partner's snapshot (1-D, uint8), of the beginning of its step; see :class:`Standing`."""

    rank: int
    step: int
    moment: int
    payload: Tensor


@dataclass(frozen=True)
class Agreed:
    """What is to be applied: the own snapshot, and the others', in ascending rank."""

    own: Snapshot
    received: tuple[Received, ...]


class Misfits:
    """Partners of ``rank`` that train other parameters than it does: each is told of once."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._partners: set[int] = set()

    def fits(self, partner: int, own: Snapshot, header: Header) -> bool:
        """Whether the partner's snapshot is of the same tensors; both ends find the same."""
        layout = own.buffer.layout
        if (header.nbytes, header.layout) == (layout.nbytes, layout.fingerprint):
            return True
        if partner not in self._partners:
            self._partners.add(partner)
            log.warning(
                "rank %d at step %d and rank %d at step %d train other parameters (%d and %d bytes): they have no"
                " exchange until they train the same",
                *(self._rank, own.step, partner, header.step, layout.nbytes, header.nbytes),
            )
        return False
