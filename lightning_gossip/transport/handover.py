"""A rank's whole state on its way to one that joins: a file that comes over a link (design §10)."""

from __future__ import annotations

import io
import math
import pickle
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store
from torch.utils._pytree import tree_map_only

from lightning_gossip.control.meeting import Process
from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.transport.header import Header, Kind, LinkError
from lightning_gossip.transport.link import Link, gloo_device

_PIECE = 64 * 2**20
"""Bytes that are sent at once."""


class TornState(LinkError):
    """What arrived is not what was sent."""


def differences(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return in words in what a process that joins differs from the others, where each has something by name."""
    names = [*theirs, *(name for name in own if name not in theirs)]
    differing = [
        f"{name} is {own.get(name, 'missing')!s} here but {theirs.get(name, 'missing')!s} there"
        for name in names
        if own.get(name) != theirs.get(name)
    ]
    return "; ".join(differing[:5])


def check_travels(name: str, state: dict[str, Any]) -> None:
    """Raise if ``state`` could not be given to one that joins.

    Raises:
        ValueError: naming what returned it, ``name``, and what is allowed.
    """
    try:
        _unpacked(_packed(state))
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`{name}` must return tensors, numbers, strings and containers of them, which a process that joins takes"
            f" as `torch.load(weights_only=True)` does; got {type(state).__name__} with something else: {error}"
        ) from error


def donors_link(store: Store, donor: int, seat: int, incarnation: int, timeout: timedelta) -> Link:
    """Return a donor's end of the link on which it serves the process that comes to ``seat``."""
    return Link(store, gloo_device(), f"donor{donor}", f"guest{seat}.{incarnation}", timeout)


def serve(link: Link, step: int, state: Callable[[], dict[str, Any]]) -> Future[None]:
    """Send a state, from the link's thread; the link ends once the guest has it.

    Args:
        link: of :func:`donors_link`.
        step: the donor's exchange clock.
        state: returns tensors, and what :func:`torch.load` takes with ``weights_only``; called in that thread.
    """

    def send() -> None:
        payload = _packed(state())
        link.send(Header(Kind.STATE, step, payload.nbytes, _checksum(payload)), *payload.split(_PIECE))
        link.flush()
        link.receive_header()  # what was sent is on its way until the other end has it

    future = link.submit(send)
    link.finish()
    return future


class Donor:
    """What a member does for one that it takes in: a copy between two steps, and the rest beside training.

    Args:
        control: of this rank.
        store: of the run, on a connection that nobody blocks.
    """

    def __init__(self, control: MemberControl, store: Store) -> None:
        self._control = control
        self._store = store
        self._links: list[Link] = []

    def serve(self, guest: tuple[int, int], step: int, state: dict[str, Any]) -> None:
        """Send ``state`` to seat and incarnation ``guest``, as it is now."""
        copied = tree_map_only(Tensor, _on_host, state)
        link = donors_link(self._store, self._control.rank, *guest, self._control.timeout)
        self._links = [link, *(before for before in self._links if not before.has_ended)]
        serve(link, step, lambda: copied).add_done_callback(lambda _: copied.clear())

    def close(self) -> None:
        """Give up what is under way."""
        for link in self._links:
            link.close()
        self._links.clear()


def state_of(donor: Process, control: MemberControl, store: Store) -> dict[str, Any] | None:
    """Return the state that ``donor`` serves this process, its tensors on the CPU.

    Args:
        donor: who has taken this process in.
        control: of this process.
        store: of the run, on a connection that nobody blocks.

    Returns:
        The state; None where the donor is lost, or what came was not whole.

    Raises:
        RunStopped: if the run ends.
        pickle.UnpicklingError, AttributeError: if it holds what :func:`torch.load` refuses with ``weights_only``.
    """
    guest = f"guest{control.rank}.{control.incarnation}"
    link = Link(store, gloo_device(), guest, f"donor{donor.rank}", control.timeout)
    try:
        future = _fetch(link)
        lost = partial(control.is_lost, *donor)
        done = control.poll(lambda: True if future.done() else False if lost() else None, math.inf, longest=0.002)
        failure = future.exception() if done else None
        if isinstance(failure, (pickle.UnpicklingError, AttributeError)):
            raise failure
        return future.result() if done and failure is None else None
    finally:
        link.close()


def _fetch(link: Link) -> Future[dict[str, Any]]:
    """Receive a state; the future raises ``TornState`` or ``LinkError`` where that does not come whole."""

    def receive() -> dict[str, Any]:
        header = link.receive_header()
        if header.kind != Kind.STATE:
            raise LinkError(f"{link.peer} sent {header}, not the state of a rank")
        payload = torch.empty(header.nbytes, dtype=torch.uint8)
        for piece in payload.split(_PIECE):
            link.receive(piece)
        if _checksum(payload) != header.layout:
            raise TornState(f"the state that {link.peer} sent, {header.nbytes:,} bytes, did not arrive whole")
        link.send(Header(Kind.STATE, header.step, 0))
        link.flush()
        return _unpacked(payload)

    return link.submit(receive)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _packed(state: dict[str, Any]) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpacked(payload: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(payload.numpy().data), map_location="cpu", weights_only=True)
    return state


def _checksum(payload: Tensor) -> int:
    return zlib.crc32(payload.numpy().data)
