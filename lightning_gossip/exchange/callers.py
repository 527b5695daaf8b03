"""Gossiping SGD that nobody waits for: any number may ask, and one snapshot travels (see :mod:`partners`)."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_gossip.exchange.agreement import Word
from lightning_gossip.exchange.partners import Partners
from lightning_gossip.exchange.snapshots import Agreed, Received, Snapshot
from lightning_gossip.exchange.spoken import may_go_on
from lightning_gossip.transport.header import Header
from lightning_gossip.transport.link import Link


class Pulled(Partners):
    """Pull: who is asked sends its snapshot, and goes on as it is; arguments as of :class:`Partners`."""

    @override
    def _answer(self, visitor: int, link: Link, header: Header) -> None:
        with self._still.copying() as may:
            own = self._copy(("asked by", visitor)) if may else None
        if own is None:
            self._say(link, Word.BUSY)
            return
        link.send(own.header(Word.ANSWER))
        link.flush()
        if may_go_on(link) and self._misfits.fits(visitor, own, header):
            self._pass(link, own, None, own.step, lambda: None)


class Pushed(Partners):
    """Push: who asks sends its snapshot; what came since its last step a rank mixes against one snapshot of its own.

    Arguments as of :class:`Partners`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pushed: dict[int, Received] = {}  # and not mixed yet
        self._mine: Snapshot | None = None  # against which they are mixed
        super().__init__(*args, **kwargs)

    @override
    def take(self) -> Agreed | None:
        with self._changed:
            if not self._pushed or self._mine is None:
                return None
            return Agreed(self._mine, tuple(self._pushed[rank] for rank in sorted(self._pushed)))

    @override
    def release(self) -> None:
        with self._changed:
            self._pushed.clear()

    @override
    def _answer(self, visitor: int, link: Link, header: Header) -> None:
        standing = self._standing()
        if self._side.away or visitor in self._pushed:
            self._say(link, Word.BUSY)
            return
        theirs = Snapshot(standing, self._buffer(("pushed by", visitor), standing.layout))
        link.send(theirs.header(Word.ANSWER))
        link.flush()
        if not (may_go_on(link) and self._misfits.fits(visitor, theirs, header)):
            return
        self._pass(link, None, theirs.payload, theirs.step, lambda: None)
        with self._still.copying() as may, self._changed:
            if not may:
                return  # a meeting came between: it is as if the push came too late
            if not self._pushed:
                self._mine = self._copy("mine")
            if self._mine is not None and self._misfits.fits(visitor, self._mine, header):
                self._pushed[visitor] = Received(visitor, header.step, header.extra, theirs.payload)
