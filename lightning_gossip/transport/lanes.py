"""What lies between a rank and each of its partners: a link, or memory that both see."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gossip.transport.header import Header, Kind, LayoutMismatch, LinkError
from lightning_gossip.transport.interface import Staged
from lightning_gossip.transport.link import Link
from lightning_gossip.transport.shared_memory import ADDRESS_BYTES, Address, Inbox, Outbox, PinningError, moment

GLANCE = 0.001
"""Longest pause in seconds between looks at a near partner's outbox."""


class Lane:
    """What lies between this rank and a partner.

    Args:
        outbox: of this rank; None where it shares no memory.
        readers: number of ranks.
        pin_memory: whether the partner's outbox is page-locked here too.
        incarnation: which process of the partner's rank is at the other end.
    """

    def __init__(self, outbox: Outbox | None, readers: int, pin_memory: bool = False, incarnation: int = 0) -> None:
        self.incarnation = incarnation
        self.inbox: Inbox | None = None
        """The partner's outbox, where the two are near; known once a first :meth:`trade` is done."""
        self._outbox = outbox
        self._readers = readers
        self._pins = pin_memory
        self._has_met = False

    def is_near(self, nbytes: int) -> bool:
        """Whether a payload of ``nbytes`` is read where it was written; both ends give the same answer."""
        if self.inbox is None or self._outbox is None:
            return False
        return nbytes <= min(self.inbox.address.slot_bytes, self._outbox.address.slot_bytes)

    def trade(
        self,
        link: Link,
        header: Header,
        outgoing: Tensor | None,
        room: Callable[[], Tensor] | None,
        staged: Staged | None = None,
        land: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """Send and receive on ``link``, unless it turns out that the partner is near; runs in the link's thread.

        Args:
            link: to the partner.
            header: of both payloads.
            outgoing: what to send, if anything.
            room: returns where to put what arrives; None where nothing is to be received.
            staged: see :meth:`Transport.post`.
            land: takes what arrived to the device, where it is staged.

        Returns:
            What arrived on the link.

        Raises:
            LinkError: if the partner sends something else.
            SendFailed, RuntimeError: as :meth:`Link.swap`.
        """
        if not self._has_met:
            self._meet(link, header.step)
        if self.is_near(header.nbytes):
            return None
        if outgoing is not None:
            link.send(header)
        incoming = None
        if room is not None:
            check_header(link.receive_header(), header, link.peer)
            incoming = room()
        if staged is not None and outgoing is not None:
            staged.ready()
        link.swap(outgoing, incoming)
        return incoming if land is None or incoming is None else land(incoming)

    def _meet(self, link: Link, step: int) -> None:
        """Tell the partner where the outbox is, and hear where its is; near is who reads and is read."""
        address = Address() if self._outbox is None else self._outbox.address
        link.send(Header(Kind.OUTBOX, step, ADDRESS_BYTES), address.to_tensor())
        check_header(link.receive_header(), Header(Kind.OUTBOX, step, ADDRESS_BYTES), link.peer)
        offered = torch.empty(ADDRESS_BYTES, dtype=torch.uint8)
        link.receive(offered)
        theirs = Address.from_tensor(offered)
        inbox = Inbox.open(theirs, self._readers) if self._outbox is not None else None
        if inbox is not None and self._pins:
            try:
                inbox.pin()
            except PinningError:
                inbox = None
        link.send(Header(Kind.NEAR, step, 0, number=int(inbox is not None)))
        answer = link.receive_header()
        check_header(answer, Header(Kind.NEAR, step, 0, number=answer.number), link.peer)
        link.flush()
        self.inbox = inbox if answer.number == 1 else None
        self._has_met = True


@dataclass
class Transfer:
    """With one partner.

    Attributes:
        lane: what lies between the two.
        sends, receives: this rank.
        job: on the link, where the partner is not known to be near.
        land: takes what arrives to the device; None where it stays on the host.
        landing: of what a near partner announces, in a thread beside training.
        given_up: nobody waits for the landing any more.
    """

    lane: Lane
    sends: bool
    receives: bool
    job: Future[Tensor | None] | None = None
    land: Callable[[Tensor], Tensor] | None = None
    landing: Future[Tensor | None] | None = None
    given_up: bool = False

    def land_when_announced(self, inbox: Inbox, header: Header) -> Tensor | None:
        """Wait until a near partner has begun the step, and take its snapshot to the device; runs beside training."""
        while not inbox.has_begun(moment(header)):
            if self.given_up:
                return None
            time.sleep(GLANCE)
        return self.take(inbox, header)

    def take(self, inbox: Inbox, header: Header) -> Tensor:
        """Return the snapshot that a near partner has announced, on the device where that is elsewhere.

        Raises:
            LinkError: if it is another one.
        """
        found, memory = inbox.find(moment(header)) or (None, torch.empty(0))
        check_header(found, header, "a near partner")
        snapshot = memory[: header.nbytes]
        return snapshot if self.land is None else self.land(snapshot)


def check_header(arrived: Header | None, expected: Header, peer: str) -> None:
    """Raise :class:`LinkError` where what ``peer`` sent is not what was expected."""
    if arrived == expected:
        return
    if arrived is not None and replace(arrived, layout=expected.layout, nbytes=expected.nbytes) == expected:
        raise LayoutMismatch(f"{peer} sent other tensors: expected {expected}, but {peer} sent {arrived}")
    raise LinkError(f"expected {expected}, but {peer} sent {arrived}")
