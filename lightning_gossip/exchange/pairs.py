"""Elastic gossip that nobody waits for: both ranks of a pair send and apply, or neither (see :mod:`partners`)."""

from __future__ import annotations

from typing_extensions import override

from lightning_gossip.exchange.agreement import Word
from lightning_gossip.exchange.partners import Partners
from lightning_gossip.exchange.snapshots import Snapshot
from lightning_gossip.exchange.spoken import may_go_on
from lightning_gossip.transport.header import Header
from lightning_gossip.transport.link import Link


class Pairs(Partners):
    """Elastic gossip: a snapshot serves one exchange; arguments as of :class:`Partners`."""

    @override
    def _answer(self, visitor: int, link: Link, header: Header) -> None:
        word, own, number = self._decide(visitor, header.number)
        if word is not Word.ANSWER or own is None:
            self._say(link, word, number)
            return
        link.send(own.header(word, number))
        link.flush()
        goes_on = may_go_on(link)
        self._hear(Word.GO if goes_on else Word.VOID, visitor, visitor)
        if goes_on:
            self._trade(link, visitor, own, header, leads=False)

    def _decide(self, visitor: int, number: int) -> tuple[Word, Snapshot | None, int]:
        """Return what to say, of which snapshot and with what number, once it is known and that is taken."""
        with self._changed:
            self._side, says = self._side.hear_ask(visitor, number)
            if visitor in self._side.waiting:
                self._changed.wait_for(lambda: visitor not in self._side.waiting or self._closing)
                answers = self._side.is_with(visitor, leads=False)
                return (Word.ANSWER if answers else Word.BUSY), self._own, 0
            for say in says:
                if say.to == visitor:
                    return say.word, self._own, say.number
        with self._still.copying() as may:
            own = self._copy("own") if may else None
            with self._changed:
                self._own = own or self._own
                self._side = (self._side.taken() if may else self._side.decline()).side
                answers = self._side.is_with(visitor, leads=False)
                self._changed.notify_all()
        return (Word.ANSWER if answers else Word.BUSY), own, 0
