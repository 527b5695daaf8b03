"""Two ends and a typed header: how tensors travel, for gossip and for Downpour alike.

A :class:`Link` is a gloo group of two members. Before each payload goes a header of fixed size, so that a payload of
the wrong kind, step or size is noticed before a byte of it is received. A link's work is done by a thread of its own:
training only waits for an event, so that signals, the stop word and the timeout reach it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store, distributed_c10d

from lightning_gossip.control.helper_thread import HelperThread
from lightning_gossip.transport.header import Header, LinkError, SendFailed

T = TypeVar("T")

ProcessGroupGloo: Any = distributed_c10d.ProcessGroupGloo  # torch ships no types for its methods

_TAG = 0
_POISON_TAG = 1
_GLOO_DECORATION = re.compile(r"^\[\S+\.cc:\d+\] |This is typically caused by.*$")


class _Rendezvous(Store):
    """The run's store as one end of a link sees it: who waits looks again and again, and blocks nobody.

    gloo waits in its store for the other end's address. If it blocked there, the links of a process could not share a
    connection: none would give its own address meanwhile, in a circle of ranks for ever.

    Args:
        store: the run's, on a connection that nobody blocks.
        own, peer: names of the ends.
        timeout: of every wait.
        closed: set where the link is given up.
    """

    def __init__(self, store: Store, own: str, peer: str, timeout: timedelta, closed: threading.Event) -> None:
        super().__init__()
        self._store = store
        self._own, self._peer = own, peer
        self._timeout = timeout
        self._closed = closed
        self._keys = {own}

    def meet(self) -> None:
        """Wait until both ends are there, before gloo does: a process that ends while gloo calls us is aborted.

        Raises:
            LinkError: if the other end does not come within the timeout, or the link is closed.
        """
        self.set(self._own, "here")
        self.get(self._peer)

    def tidy(self) -> None:
        """Delete what the ends have read, once the other has read it too: once something came from it."""
        while self._keys:
            self._store.delete_key(self._keys.pop())

    def set(self, key: str, value: str) -> None:
        """Set ``key``, at once."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, once it is there."""
        self.wait([key])
        self._keys.add(key)
        return self._store.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until ``keys`` are there; raise as :meth:`meet`."""
        limit = (timeout or self._timeout).total_seconds()
        deadline = time.monotonic() + limit
        pause = 0.0005
        while not self._store.check(keys):
            if self._closed.wait(pause):
                raise _closed(self._own, self._peer)
            if time.monotonic() > deadline:
                raise LinkError(f"{self._peer} did not come to its link within {limit:g} s")
            pause = min(2 * pause, 0.02)


class Link:
    """One end of a link.

    Args:
        store: the run's store; both ends meet there when the link is first used.
        device: gloo's, shared by all links of the process.
        own: name of this end.
        peer: name of the other end.
        timeout: of every wait.
    """

    def __init__(self, store: Store, device: Any, own: str, peer: str, timeout: timedelta) -> None:
        self.own, self.peer = own, peer
        first, second = sorted((own, peer))
        self._index = int(own == second)
        self._device, self._timeout = device, timeout
        self._group: Any = None
        self._sending: list[tuple[Any, Tensor]] = []
        self._closed = threading.Event()
        # kept as long as the group, which does not keep it alive
        meeting_place = PrefixStore(f"link/{first}/{second}", store)
        self._rendezvous = _Rendezvous(meeting_place, own, peer, timeout, self._closed)
        self._busy = threading.Event()  # the thread is at a job, which may wait in gloo
        self._ended = threading.Event()  # the thread takes no job any more
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = HelperThread(self._work, f"link-{own}-{peer}", partial(self.close, seconds=0.01))

    # -- from any thread ----------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether it has failed, or was given up."""
        return self._closed.is_set()

    @property
    def has_ended(self) -> bool:
        """Whether its thread does nothing any more."""
        return self._ended.is_set()

    def finish(self) -> None:
        """End the link once what was submitted is done."""
        self._jobs.put(None)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Let the link's thread call ``job``, after those before it, and return its future result.

        A job that raises closes the link, and ends its thread; those after it fail with :class:`LinkError`.
        """
        future: Future[T] = Future()
        self._jobs.put((job, future))
        if self._ended.is_set():
            self._refuse_jobs()
        return future

    def close(self, seconds: float = 5.0) -> None:
        """Give up the link, whatever its thread waits for. The other end notices within milliseconds.

        Args:
            seconds: how long to wait for the thread. Nothing wakes it while gloo connects to an end that is gone: it
                does nothing any more once it returns from there.
        """
        self._closed.set()
        self._jobs.put(None)
        for _ in range(5):
            if self._busy.is_set():
                self._poison()  # once more where the group was only being made
            self._thread.join(timeout=seconds / 5)
            if not self._thread.is_alive():
                return

    # -- from the link's thread ---------------------------------------------------------------------------------

    def send(self, header: Header, *payloads: Tensor) -> None:
        """Begin to send; :meth:`flush` waits until ``payloads`` (each 1-D, uint8, host memory) may change again.

        The other end receives them one by one, in this order.
        """
        group = self._connected()
        for tensor in (header.to_tensor(), *payloads):
            self._sending.append((group.send([tensor], 1 - self._index, _TAG), tensor))

    def flush(self) -> None:
        """Wait until everything sent has left.

        Raises:
            RuntimeError: if the other end is gone, or did not take it within the timeout.
        """
        for work, _ in self._sending:
            work.wait(self._timeout)
        self._sending.clear()

    def receive_header(self, timeout: timedelta | None = None) -> Header:
        """Wait for a header.

        Raises:
            RuntimeError: if the other end is gone, or sent none within ``timeout`` (the link's own by default).
            LinkError: if something else arrived.
        """
        tensor = torch.zeros(8, dtype=torch.int64)
        self._connected().recv([tensor], 1 - self._index, _TAG).wait(timeout or self._timeout)
        self._rendezvous.tidy()
        return Header.from_tensor(tensor)

    def receive(self, payload: Tensor) -> None:
        """Wait for the payload (1-D, uint8, host memory) whose header was received and fits.

        Raises:
            RuntimeError: if the other end is gone, or did not send it within the timeout.
        """
        self._connected().recv([payload], 1 - self._index, _TAG).wait(self._timeout)

    def swap(self, outgoing: Tensor | None, incoming: Tensor | None) -> None:
        """Send and receive the payloads (1-D, uint8, host memory) whose headers have passed and fit, at once.

        The receive is posted before the send: gloo lets a payload go when the other end has said that it is ready for
        it, and behind our own payload in the socket that word would come last. The two directions of a slow link then
        ran one after the other (measured: 0.5 of its rate instead of 0.94).

        Raises:
            RuntimeError: if the other end is gone, or did not send it within the timeout.
            SendFailed: if it sent it whole, and did not take all that was sent to it.
        """
        group = self._connected()
        receiving = None if incoming is None else group.recv([incoming], 1 - self._index, _TAG)
        if outgoing is not None:
            self._sending.append((group.send([outgoing], 1 - self._index, _TAG), outgoing))
        if receiving is not None:
            receiving.wait(self._timeout)
        try:
            self.flush()
        except RuntimeError as error:
            raise SendFailed(str(error), incoming) from error

    # -- inside -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Do what is submitted, until the link is closed or a job fails: nobody has to close it then."""
        while not self._closed.is_set() and (item := self._jobs.get()) is not None:
            job, future = item
            self._busy.set()
            try:
                if self._closed.is_set():
                    raise _closed(self.own, self.peer)
                future.set_result(job())
            except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the future
                self._closed.set()
                self._poison()
                future.set_exception(error)
            finally:
                self._busy.clear()
                del item, job, future  # an error's traceback holds this frame, and with it what was to be sent
        self._ended.set()
        self._refuse_jobs()
        self._sending.clear()
        self._group = None

    def _refuse_jobs(self) -> None:
        """Fail what was submitted and will never be done."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (item := self._jobs.get_nowait()) is not None:
                    item[1].set_exception(_closed(self.own, self.peer))

    def _connected(self) -> Any:
        """Return the group, made when first needed: both ends have to be there."""
        if self._group is None:
            self._rendezvous.meet()
            options = ProcessGroupGloo._Options()
            options._devices = [self._device]
            options._timeout = self._timeout
            options._threads = 1  # sends and receives need none of gloo's own
            self._group = ProcessGroupGloo(self._rendezvous, self._index, 2, options)
            if self._closed.is_set():
                raise _closed(self.own, self.peer)
        return self._group

    def _poison(self) -> None:
        """Make every wait of the group fail: a receive that times out closes a gloo group's connections."""
        if (group := self._group) is not None:
            nothing = torch.empty(1, dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):
                group.recv([nothing], 1 - self._index, _POISON_TAG).wait(timedelta(milliseconds=1))


def _closed(own: str, peer: str) -> LinkError:
    return LinkError(f"the link between {own} and {peer} is closed")


class Links:
    """The links of one process, made when first asked for, on one connection to the run's store.

    Args:
        store: the run's store, on a connection that nobody blocks.
        own: name of this process' end.
        timeout: of every wait.
    """

    def __init__(self, store: Store, own: str, timeout: timedelta) -> None:
        self._run_store = self._store = store
        self._own = own
        self._timeout = timeout
        self._device: Any = None
        self._links: dict[str, Link] = {}
        self._parted: Counter[str] = Counter()  # how many links to a peer were given up since the last reset

    def reset(self, generation: int | str, seconds: float = 5.0) -> None:
        """Close every link; those made from now on meet links of the same generation at the other end.

        Args:
            generation: its name, used once.
            seconds: how long to wait for the thread of each link, see :meth:`Link.close`.
        """
        for link in self._links.values():
            link.close(seconds)
        self._links.clear()
        self._parted.clear()
        self._store = PrefixStore(f"generation/{generation}", self._run_store)

    def to(self, peer: str) -> Link:
        """Return the link to ``peer``."""
        if peer not in self._links:
            self._device = self._device or gloo_device()
            store = PrefixStore(str(self._parted[peer]), self._store)
            self._links[peer] = Link(store, self._device, self._own, peer, self._timeout)
        return self._links[peer]

    def part(self, peer: str) -> None:
        """Close the link to ``peer``, if there is one: both ends do, or meet no more before :meth:`reset`."""
        if link := self._links.pop(peer, None):
            self._parted[peer] += 1
            link.close(seconds=0.1)

    def close(self) -> None:
        """Close every link."""
        for link in list(self._links.values()):  # a helper thread that is late may still ask for one
            link.close()
        self._links.clear()
        self._device = None


def gloo_device() -> Any:
    """Return a gloo device on the interface that ``GLOO_SOCKET_IFNAME`` names, or on the host's default one."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interfaces:
        return ProcessGroupGloo.create_device(interface=interfaces.split(",")[0])
    return ProcessGroupGloo.create_default_device()


def reason_of(error: BaseException) -> str:
    """Return what an error of a link says: what happened, and where, without gloo's source path and advice."""
    return _GLOO_DECORATION.sub("", str(error)).strip()
