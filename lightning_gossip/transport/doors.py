"""Links that one end opens at any moment, without the other's doing: for exchanges that no schedule announces.

Every rank has a *door*, a counter in the run's store. Who wants a link to it takes the next number there, leaves its
name under that number, and opens its end; a thread of the other sees it within a tenth of a second, and opens the other
end. So links are made between those that ever ask each other, one for each direction of asking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, Store

from lightning_gossip.control.helper_thread import HelperThread
from lightning_gossip.control.meeting import Process
from lightning_gossip.transport.link import Link, gloo_device

_SOONEST, _LATEST = 0.005, 0.1
"""Seconds between looks at the door: after a visit, and once there has been none for long."""


class Doors:
    """One rank's own links to others, and those that others have opened to it.

    Args:
        store: the run's, on a connection that nobody blocks.
        own: the process of this end.
        timeout: of every wait on a link.
        on_visit: called with the process that has opened a link, and this end of it; in a thread of this object.
    """

    def __init__(
        self,
        store: Store,
        own: Process,
        timeout: timedelta,
        on_visit: Callable[[Process, Link], None],
    ) -> None:
        self._store = store
        self._name = own
        self._timeout = timeout
        self._on_visit = on_visit
        self._device: Any = gloo_device()
        self._lock = threading.Lock()
        self._own: dict[Process, Link] = {}
        self._visitors: dict[Process, Link] = {}
        self._closing = threading.Event()
        self._door = f"door{own}"
        self._thread = HelperThread(self._listen, self._door, self._closing.set)

    def to(self, peer: Process) -> Link:
        """Return this rank's link to ``peer``, on which the other answers; opened when first asked for."""
        with self._lock:
            link = self._own.get(peer)
            if link is None or link.is_closed:
                door = f"door{peer}"
                number = self._store.add(f"{door}/visits", 1)
                link = Link(self._store, self._device, _visitor(self._name, number), door, self._timeout)
                self._own[peer] = link
                self._store.set(f"{door}/{number}", str(self._name))
            return link

    def forget(self, peer: Process, link: Link) -> None:
        """Give up a link that failed: the next :meth:`to` opens another."""
        with self._lock:
            for links in (self._own, self._visitors):
                if links.get(peer) is link:
                    del links[peer]

    def part(self, peer: Process) -> None:
        """Close both links with ``peer``, whatever they wait for."""
        with self._lock:
            links = [links.pop(peer) for links in (self._own, self._visitors) if peer in links]
        for link in links:
            link.close(seconds=0.1)

    def close(self) -> None:
        """Close the door, and every link."""
        self._closing.set()
        self._thread.join()
        with self._lock:
            links = [*self._own.values(), *self._visitors.values()]
            self._own.clear()
            self._visitors.clear()
        for link in links:
            link.close()

    def _listen(self) -> None:
        seen, missing, pause = 0, list[int](), _SOONEST
        try:
            while not self._closing.wait(pause):
                count = self._store.add(f"{self._door}/visits", 0)
                missing += range(seen + 1, count + 1)
                seen = count
                # whoever dies between taking a number and leaving its name holds up nobody
                come = [number for number in missing if self._store.check([f"{self._door}/{number}"])]
                for number in come:
                    self._let_in(number)
                    missing.remove(number)
                pause = _SOONEST if come else min(1.2 * pause, _LATEST)
        except (DistNetworkError, DistStoreError):
            return  # the run's control tells that the store is gone

    def _let_in(self, number: int) -> None:
        visitor = Process.of(self._store.get(key := f"{self._door}/{number}").decode())
        self._store.delete_key(key)
        link = Link(self._store, self._device, self._door, _visitor(visitor, number), self._timeout)
        with self._lock:
            before = self._visitors.get(visitor)
            self._visitors[visitor] = link
        if before is not None:
            before.close(seconds=0.1)  # its other end has given it up
        self._on_visit(visitor, link)


def _visitor(process: Process, number: int) -> str:
    return f"visitor{process}.{number}"
