"""What a rank offers to others, and gets of them, where exchanges go by no common clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_gossip.exchange.agreement import Word
from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout
from lightning_gossip.transport.link import Header


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
