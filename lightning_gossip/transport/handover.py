"""A rank's whole state on its way to one that joins: a file that comes over a link (design §10)."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from lightning_gossip.transport.link import Header, Kind, Link, LinkError, gloo_device

_PIECE = 64 * 2**20
"""Bytes that are sent at once."""


class TornState(LinkError):
    """What arrived is not what was sent."""


def donors_link(store: Store, donor: int, seat: int, incarnation: int, timeout: timedelta) -> Link:
    """Return a donor's end of the link on which it serves the process that comes to ``seat``."""
    return Link(store, gloo_device(), f"donor{donor}", f"guest{seat}.{incarnation}", timeout)


def guests_link(store: Store, donor: int, seat: int, incarnation: int, timeout: timedelta) -> Link:
    """Return the other end."""
    return Link(store, gloo_device(), f"guest{seat}.{incarnation}", f"donor{donor}", timeout)


def serve(link: Link, step: int, state: Callable[[], dict[str, Any]]) -> Future[None]:
    """Send a state, from the link's thread.

    Args:
        link: of :func:`donors_link`.
        step: the donor's exchange clock.
        state: returns tensors, and what :func:`torch.load` takes with ``weights_only``; called in that thread.
    """

    def send() -> None:
        payload = _packed(state())
        link.send(Header(Kind.STATE, step, payload.nbytes, _checksum(payload)), *payload.split(_PIECE))
        link.flush()

    return link.submit(send)


def fetch(link: Link) -> Future[dict[str, Any]]:
    """Receive a state; its tensors are on the CPU.

    The future raises:
        TornState: if it is not whole.
        LinkError, RuntimeError: if the donor is gone, or something else arrived.
    """

    def receive() -> dict[str, Any]:
        header = link.receive_header()
        if header.kind != Kind.STATE:
            raise LinkError(f"{link.peer} sent {header}, not the state of a rank")
        payload = torch.empty(header.nbytes, dtype=torch.uint8)
        for piece in payload.split(_PIECE):
            link.receive(piece)
        if _checksum(payload) != header.layout:
            raise TornState(f"the state that {link.peer} sent, {header.nbytes:,} bytes, did not arrive whole")
        return _unpacked(payload)

    return link.submit(receive)


def _packed(state: dict[str, Any]) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpacked(payload: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(payload.numpy().data), map_location="cpu", weights_only=True)
    return state


def _checksum(payload: Tensor) -> int:
    return zlib.crc32(payload.numpy().data)
