"""A shard that serves: it meets workers at a store, gives each a link and a thread, and ends when the last one left."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import DistError, Store

from lightning_gossip.parameter_server.protocol import ARRIVALS, SHARD, arrival_key
from lightning_gossip.parameter_server.roster import Roster
from lightning_gossip.parameter_server.session import Session
from lightning_gossip.transport.header import LinkError
from lightning_gossip.transport.link import Link, reason_of

log = logging.getLogger(__name__)

_PAUSES = 0.001, 0.1
"""Shortest and longest time, in seconds, between two looks at who has arrived."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


class ShardServer:
    """Serves one shard from threads of this process.

    Args:
        store: the shard's, on a connection that nobody else uses.
        connect: returns another connection to it; called once a link.
        device: gloo's, for all links.
        timeout: how long a worker may give no sign of life, and how long the shard waits for workers that never came
            when all others have left, or have broken off.
        name: of the shard, for the log.
    """

    def __init__(
        self, store: Store, connect: Callable[[], Store], device: Any, timeout: timedelta, name: str = SHARD
    ) -> None:
        self.name = name
        self.roster = Roster()
        self.finished = threading.Event()
        self._store = store
        self._connect = connect
        self._device = device
        self._timeout = timeout
        self._closing = threading.Event()
        self._links: dict[Link, Future[None]] = {}
        self._thread = threading.Thread(target=self._accept, name=f"accept-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving, whoever is still there."""
        self._closing.set()
        self._thread.join()

    # -- in the accepting thread ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            self._accept_until_finished(self._store)
        except DistError as error:
            log.error("%s can not reach its store: %s", self.name, error)
        finally:
            for link in self._links:
                link.close()
            self._links.clear()
            self.finished.set()

    def _accept_until_finished(self, store: Store) -> None:
        asked, missing = 0, set[int]()  # a worker may die between asking for a link and giving its name
        pause = _PAUSES[0]
        while not self._closing.wait(pause) and not self._is_over():
            now = store.add(ARRIVALS, 0)
            pause = _PAUSES[0] if now > asked else min(2 * pause, _PAUSES[1])
            missing.update(range(asked + 1, now + 1))
            asked = now
            for number in sorted(missing):
                if store.check([arrival_key(number)]):
                    missing.discard(number)
                    self._open_link(store.get(arrival_key(number)))
                    store.delete_key(arrival_key(number))

    def _is_over(self) -> bool:
        self._close_ended_links()
        if self.roster.everybody_left():
            log.info("%s served every worker to the end", self.name)
            return True
        if self.roster.deserted_for() > self._timeout.total_seconds():
            log.warning("%s waited in vain for the workers that never came, and ends", self.name)
            return True
        return False

    def _open_link(self, name: bytes) -> None:
        peer = name.decode(errors="replace")
        if not _NAME.fullmatch(peer) or peer == SHARD:
            log.warning("%s ignored one who calls himself %r", self.name, peer[:100])
            return
        link = Link(self._connect(), self._device, SHARD, peer, self._timeout)
        session = Session(link, self.roster, self._timeout)
        future = link.submit(session.serve)
        future.add_done_callback(partial(self._report, session, peer))
        self._links[link] = future

    def _report(self, session: Session, peer: str, future: Future[None]) -> None:
        who = session.name or peer
        error = future.exception()
        if error is None:
            log.info("%s: %s said goodbye", self.name, who)
        elif self._closing.is_set():
            log.info("%s gave up its link to %s", self.name, who)
        elif isinstance(error, LinkError):
            log.warning("%s closed its link to %s, changing nothing: %s", self.name, who, error)
        else:
            log.warning("%s lost %s and serves the others on: %s", self.name, who, reason_of(error))

    def _close_ended_links(self) -> None:
        for link in [link for link, future in self._links.items() if future.done()]:
            link.close()
            del self._links[link]
