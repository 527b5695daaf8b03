"""What moves the snapshots of one exchange between ranks, and knows no algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gossip.transport.header import Header


class PartnerLost(RuntimeError):
    """A partner died or stayed silent past the timeout; ``partner`` is its rank."""

    def __init__(self, message: str, partner: int) -> None:
        super().__init__(message)
        self.partner = partner


@dataclass(frozen=True, slots=True)
class Transferred:
    """What passed between this rank and its partners in one step; one that never began the step is missing.

    Attributes:
        received: what a partner sent, to be read only (1-D, uint8).
        sent_to: partners that got this rank's payload.
    """

    received: Mapping[int, Tensor]
    sent_to: Collection[int]


class Staged(ABC):
    """A payload that is on its way between a device and the host; called in the transport's threads."""

    @abstractmethod
    def ready(self) -> None:
        """Wait until the room holds what is to be sent."""

    @abstractmethod
    def land(self, number: int, payload: Tensor) -> Tensor:
        """Return on the device what arrived on the host.

        Args:
            number: of the payload, from 1, among those of one exchange: each has a place of its own on the device.
            payload: 1-D, uint8; it may change from then on.
        """


class Posted(ABC):
    """Transfers under way."""

    @abstractmethod
    def wait(self) -> Transferred:
        """Wait until everything arrived and left.

        Raises:
            PartnerLost: if a partner died or stayed silent past the timeout.
            RunStopped: if some rank stopped.
        """

    @abstractmethod
    def release(self) -> None:
        """Give up what :meth:`wait` said was received: it may change from now on."""


class Transport(ABC):
    """Moves payloads between ranks, one exchange at a time: from :meth:`room` to :meth:`Posted.release`."""

    @abstractmethod
    def room(self, nbytes: int, at_most: int) -> Tensor:
        """Return where the next payload is to be written (1-D, uint8); wait while somebody reads what is there.

        Args:
            nbytes: of the payload.
            at_most: what ``nbytes`` may grow to while the model stays the same.

        Raises:
            PartnerLost: if a partner did not read it within the timeout.
            RunStopped: if some rank stopped.
        """

    @abstractmethod
    def post(
        self,
        header: Header,
        send_to: Collection[int],
        receive_from: Collection[int],
        staged: Staged | None = None,
    ) -> Posted:
        """Begin the transfers of one step: of what lies in the :meth:`room`, and of as many bytes from others.

        Args:
            header: what both sides must agree on: kind, step, size and layout.
            send_to: partners that get the payload.
            receive_from: partners that send theirs.
            staged: where the room is on the host and the replica on a device: the copies between the two.
        """

    @abstractmethod
    def rewind(self) -> None:
        """The exchange clock was set, perhaps back; called on all ranks alike, with nothing under way."""

    @abstractmethod
    def reset(self, generation: int) -> None:
        """Begin anew with everybody, after partners were skipped; called on all ranks, with nothing on the wire."""

    def position(self) -> dict[str, int]:
        """Return what a rank that takes this one's state has to know to meet the others on their ways."""
        return {}

    def take_place(self, position: Mapping[str, int]) -> None:  # noqa: B027 - a choice, not a duty
        """Meet the others where the rank does whose :meth:`position` this was; before anything was posted."""

    @abstractmethod
    def close(self) -> None:
        """Give up whatever is under way and release connections."""


class Rooms:
    """Numbered buffers of one size, kept from one exchange to the next.

    Args:
        device: where they lie.
        pin_memory: whether host memory is page-locked, for copies from and to a GPU.
    """

    def __init__(self, device: torch.device, pin_memory: bool = False) -> None:
        self._device = device
        self._pin_memory = pin_memory
        self._nbytes = 0
        self._rooms: dict[int, Tensor] = {}

    def resize(self, nbytes: int) -> None:
        """Set the size of every buffer, in bytes; those of another size are given up."""
        if nbytes != self._nbytes:
            self._rooms.clear()
            self._nbytes = nbytes

    def __getitem__(self, number: int) -> Tensor:
        """Return a buffer (1-D, uint8), made when first asked for; several threads may ask, each for its own."""
        if number not in self._rooms:
            self._rooms[number] = torch.empty(
                self._nbytes, dtype=torch.uint8, device=self._device, pin_memory=self._pin_memory
            )
        return self._rooms[number]
