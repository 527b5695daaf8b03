"""A worker's links to all shards: one question to each at a time, and a sign of life when there is nothing to ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeVar

from torch.distributed import Store, TCPStore

from lightning_gossip.control.helper_thread import HelperThread
from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.run import Control
from lightning_gossip.parameter_server import questions
from lightning_gossip.parameter_server.protocol import ARRIVALS, SHARD, Setup, arrival_key, encode
from lightning_gossip.parameter_server.workers import Workers
from lightning_gossip.transport.link import Link, gloo_device, reason_of

T = TypeVar("T")

GOODBYE = 5.0
"""Seconds in which shards have to answer a goodbye."""


class ShardLost(RuntimeError):
    """A shard died, stayed silent past the timeout or refused this worker; ``shard`` is its number."""

    ends_run = True

    def __init__(self, message: str, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


class Question(Generic[T]):
    """Something asked of every shard; the answers come one by one.

    Attributes:
        settled: set when all shards answered, or one failed.
    """

    def __init__(self, futures: Sequence[Future[T]]) -> None:
        self.settled = threading.Event()
        self._futures = futures
        self._left = len(futures)
        self._lock = threading.Lock()
        for future in futures:
            future.add_done_callback(self._count)

    def _count(self, future: Future[T]) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0 or future.exception() is not None:
                self.settled.set()

    def answers(self) -> list[T]:
        """Return what the shards answered, once settled without a failure."""
        return [future.result() for future in self._futures]

    def failure(self) -> tuple[int, BaseException] | None:
        """Return the first shard that failed, and how."""
        for shard, future in enumerate(self._futures):
            if future.done() and (error := future.exception()) is not None:
                return shard, error
        return None

    def unanswered(self) -> int:
        """Return the first shard that did not answer yet."""
        return next((shard for shard, future in enumerate(self._futures) if not future.done()), 0)


class ShardLinks:
    """The links of one worker to all shards.

    Args:
        addresses: of the shards, in their order.
        control: of the run; its timeout is that of every wait.
        connect: returns a connection to the store at an address.
        clock: returns the worker's step, for messages.

    Attributes:
        workers: their numbers, this one's among them.

    Raises:
        ShardLost: if a shard is not there.
        RunStopped: if some rank stopped.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        control: Control,
        connect: Callable[[str, timedelta], Store],
        clock: Callable[[], int],
    ) -> None:
        self.addresses = tuple(addresses)
        self._control = control
        self._clock = clock
        self._closing = threading.Event()
        self._links: list[Link] = []
        self._last: Sequence[Future[Any]] = ()
        self._failure: tuple[int, BaseException] | None = None  # the first; later ones find its link closed
        self._alive: HelperThread | None = None
        self.workers = Workers(control)
        device = gloo_device()
        own, timeout = f"worker{self.workers.own}", control.timeout
        jobs = [partial(_arrive, connect, address, device, own, timeout) for address in self.addresses]
        arriving = [_in_thread(job) for job in jobs]
        try:
            self._links = self.wait(Question(arriving))
        except BaseException:
            for link in arriving:
                link.add_done_callback(_discard)
            raise

    def greet(self, setups: Sequence[Setup]) -> None:
        """Say hello to every shard, once.

        Raises:
            ShardLost: if a shard is lost, or refuses.
        """
        hellos = [encode({"worker": self.workers.own, "setup": setup.to_json()}) for setup in setups]
        silence = self.wait(self.ask(lambda link, shard: questions.hello(link, hellos[shard])))
        # a sleeping process or a long collection of garbage must not look like death
        interval = min(self._control.timeout.total_seconds(), *silence) / 5
        self._alive = HelperThread(lambda: self._stay_alive(interval), "downpour-alive", self._closing.set)

    def drop_lost(self) -> None:
        """Tell the shards, before anything that is asked from now on, which workers the run has lost.

        What a lost worker sent and a shard has not applied by then, it will not.
        """
        for worker in self.workers.newly_lost():
            self.ask(questions.drop(self._clock(), worker))

    def ask(self, job: Callable[[Link, int], T]) -> Question[T]:
        """Let every link's thread call ``job(link, shard)``, after those before it."""
        futures = [link.submit(partial(job, link, shard)) for shard, link in enumerate(self._links)]
        for shard, future in enumerate(futures):
            future.add_done_callback(partial(self._note, shard))
        self._last = futures
        return Question(futures)

    def wait(self, question: Question[T]) -> list[T]:
        """Wait for the answers to ``question`` and return them.

        Raises:
            ShardLost: if a shard fails, or does not answer within the timeout.
            RunStopped: if some rank stopped.
        """
        limit = self._control.timeout.total_seconds()
        if not self._control.wait(question.settled, time.monotonic() + limit):
            raise self._lost(question.unanswered(), f"it stayed silent for {limit:g} s")
        if (failure := question.failure()) is not None:
            raise self._explain(*(self._failure or failure))
        return question.answers()

    def check(self) -> None:
        """Raise if a link failed meanwhile.

        Raises:
            ShardLost: if a shard is lost.
            RunStopped: if that was the consequence of some rank's stop.
        """
        if self._failure is not None:
            raise self._explain(*self._failure)

    def await_training(self, number: int) -> set[int] | None:
        """Wait until the lead has begun training ``number``, and its warm-up is over on all shards; return None then.

        The lead is the first of the members. If that is this one, return on which shards it has to begin the
        training: on all, unless another one led before.

        Raises:
            ShardLost: if a shard is lost, or, where a lost worker ends the run, worker 0 is gone or does not come
                within the timeout.
            RunStopped: if some rank stopped.
        """
        survives = isinstance(self._control, MemberControl)
        if not survives and self._control.rank == 0:
            return set(range(len(self.addresses)))
        limit = self._control.timeout.total_seconds()
        latest, pause, never = time.monotonic() + limit, 0.005, threading.Event()
        while True:
            leads = self._control.rank == self._control.members[0]  # as of now: those before it are dropped next
            self.drop_lost()
            states = self.wait(self.ask(questions.status))
            if all(state.training == number and state.ready for state in states):
                return None
            if leads:
                return {shard for shard, state in enumerate(states) if state.training < number}
            for shard, state in enumerate(() if survives else states):
                if state.lead == "gone":
                    raise self._explain(shard, RuntimeError("worker 0, which has to initialise it, is gone"))
                if state.lead == "absent" and time.monotonic() > latest:
                    raise self._explain(shard, RuntimeError(f"worker 0 did not come to initialise it in {limit:g} s"))
            self._control.wait(never, time.monotonic() + pause)
            pause = min(2 * pause, 0.1)

    def close(self, goodbye: bool = True) -> None:
        """Say goodbye, unless not wanted, where there is still someone to hear it, and end all links."""
        self._closing.set()
        if self._alive is not None:
            self._alive.join()
        if self._alive is not None and goodbye:
            self.drop_lost()
            self.ask(questions.bye(self._clock())).settled.wait(GOODBYE)
        for link in self._links:
            link.close()
        self._links = []

    # -- inside ---------------------------------------------------------------------------------------------------

    def _note(self, shard: int, future: Future[Any]) -> None:
        if self._failure is None and (error := future.exception()) is not None:
            self._failure = shard, error

    def _explain(self, shard: int, error: BaseException) -> ShardLost:
        """Return what to raise for a failed link, unless a stop of the run explains it, which is raised then."""
        # who was declared lost without knowing it yet is refused too
        explains = isinstance(self._control, MemberControl) or not isinstance(error, questions.Refused)
        if explains and self._control.await_stop(1.0) is not None:
            self._control.check()
        lost = self._lost(shard, reason_of(error))
        lost.__cause__ = error
        return lost

    def _lost(self, shard: int, why: str) -> ShardLost:
        where = f"parameter server shard {shard} ({self.addresses[shard]})"
        return ShardLost(f"worker {self._control.rank} lost {where} at step {self._clock()}: {why}", shard)

    def _stay_alive(self, interval: float) -> None:
        while not self._closing.wait(interval):
            if all(future.done() for future in self._last):
                self.ask(questions.ping(self._clock()))


def connect_store(address: str, timeout: timedelta) -> Store:
    """Return a connection to the store at ``address`` (``host:port``), waiting until it is there."""
    host, _, port = address.rpartition(":")
    return TCPStore(host.strip("[]"), int(port), None, False, timeout, wait_for_workers=False)


def check_addresses(name: str, value: Any) -> tuple[str, ...]:
    """Return ``value`` as a tuple if it is a sequence of distinct addresses ``host:port``.

    Raises:
        ValueError: if it is not.
    """
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    parts = [str(address).rpartition(":") for address in value] if is_sequence else []
    valid = bool(parts) and all(host and port.isdecimal() and 0 < int(port) < 1 << 16 for host, _, port in parts)
    if not valid or len(set(value)) < len(value):
        raise ValueError(f"`{name}` must be a list of distinct strings 'host:port', got {value!r}")
    return tuple(value)


def _arrive(
    connect: Callable[[str, timedelta], Store], address: str, device: object, own: str, timeout: timedelta
) -> Link:
    store = connect(address, timeout)
    number = store.add(ARRIVALS, 1)
    name = f"{own}.{number}"
    store.set(arrival_key(number), name)
    return Link(store, device, name, SHARD, timeout)


def _in_thread(job: Callable[[], T]) -> Future[T]:
    """Call ``job`` in a daemon thread, which nobody waits for at the interpreter's end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            future.set_exception(error)

    HelperThread(run, "downpour-connect", ask_to_end=lambda: None)
    return future


def _discard(arriving: Future[Link]) -> None:
    if arriving.exception() is None:
        arriving.result().close()
