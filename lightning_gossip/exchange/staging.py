"""Between a GPU and host memory, beside training: for transports whose payloads lie on the host.

Who touches which buffer, and what it waits for:

=================  ===========================================================================================
training's stream  packs the snapshot (once the copy of the one before is done); later mixes what has arrived
the copies' own    once the snapshot is packed: snapshot → room; then, as payloads arrive: payload → GPU
a link's thread    sends the room once it holds the snapshot; hands on a payload once it is on the GPU
training's thread  waits for links alone, in ``end()``: never for a stream
=================  ===========================================================================================

A payload's place on the GPU is written again only in a later exchange, whose copies wait for a snapshot that training's
stream packs after it has mixed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gossip.transport.interface import Rooms, Staged


class Staging:
    """Copies between one device and host memory, on a stream of their own.

    Args:
        device: of the snapshots, with streams: all calls from the training thread are for its current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)  # torch.cpu has streams and events that do nothing
        self._stream = self._streams.Stream(device) if device.type == "cuda" else self._streams.Stream()
        self._copied: Any = None  # the event after the last copy to the host
        self._landed = Rooms(device)

    def before_packing(self) -> None:
        """Let training's stream wait until the snapshot of before has been copied; the host waits for nothing."""
        if self._copied is not None:
            self._copied.wait(self._streams.current_stream(self._device))

    def stage(self, snapshot: Tensor, room: Tensor) -> Staged:
        """Begin to copy ``snapshot``, which training's stream has packed, to ``room`` in host memory.

        Args:
            snapshot: 1-D, uint8, on the device.
            room: 1-D, uint8, page-locked.

        Returns:
            What tells when the room holds it, and takes to the device what arrives; for other threads.
        """
        packed, copied = self._event(), self._event()
        packed.record(self._streams.current_stream(self._device))
        packed.wait(self._stream)
        with self._streams.stream(self._stream):
            room.copy_(snapshot, non_blocking=True)
        copied.record(self._stream)
        self._copied = copied
        self._landed.resize(snapshot.numel())
        return _StagedOnStream(self, copied)

    def land(self, number: int, payload: Tensor) -> Tensor:
        """See :meth:`Staged.land`; the calling thread waits for the copy."""
        done = self._event()
        # a new place too is this stream's: memory that training's has just freed may still be written there
        with self._streams.stream(self._stream):  # makes the device current too: a new thread's is the first
            landed = self._landed[number]
            landed.copy_(payload, non_blocking=True)
        done.record(self._stream)
        done.synchronize()
        return landed

    def _event(self) -> Any:
        # a thread that waits for it sleeps, and leaves its core to others
        return self._streams.Event(blocking=True) if self._device.type == "cuda" else self._streams.Event()


class _StagedOnStream(Staged):
    def __init__(self, staging: Staging, copied: Any) -> None:
        self._staging = staging
        self._copied = copied

    def ready(self) -> None:
        self._copied.synchronize()

    def land(self, number: int, payload: Tensor) -> Tensor:
        return self._staging.land(number, payload)
