"""The run's store: who stops and why, who has arrived, who is alive.

One thread a rank holds its own connection to the store. It writes a heartbeat and looks for the stop word, which the
first rank that stops writes for all: every wait of this package looks at what it found. Nothing here knows Lightning.

Nobody blocks in the store: a wait there that times out makes torch log a warning each time.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import NoReturn, TypeVar

from torch.distributed import DistNetworkError, DistStoreError, Store

from lightning_gossip.control.calls import Calls
from lightning_gossip.control.helper_thread import HelperThread
from lightning_gossip.control.lookout import Lookout
from lightning_gossip.control.meeting import Heartbeats, Meeting, Process
from lightning_gossip.control.stop import LOOK, Stop, Stoppable, raise_stop

T = TypeVar("T")

log = logging.getLogger(__name__)

HEARTBEAT = 1.0
"""Seconds from one sign of life to the next."""

_STOP, _END = "stop", "end"


class Control(Stoppable):
    """One rank's view of the run.

    Args:
        connect: returns a connection to the run's store that nobody else uses; called once a connection.
        rank: of this process.
        world_size: number of ranks.
        timeout: how long a rank waits for one that gives no sign of life.
        clock: returns the step at which this rank is, for messages.
        raise_stop: raises what a :class:`Stop` should look like in this program.

    Attributes:
        calls: what ranks want all to do at the end of a step.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        rank: int,
        world_size: int,
        timeout: timedelta,
        clock: Callable[[], int] = lambda: 0,
        raise_stop: Callable[[Stop], NoReturn] = raise_stop,
    ) -> None:
        super().__init__(rank, clock, raise_stop)
        self.world_size = world_size
        self.timeout = timeout
        self._waits: Counter[str] = Counter()  # calls of `await_all`
        self.calls = Calls(
            rank, lambda: self.members, clock, self._name, Lookout(lambda: self._meetings + 1, self._waits)
        )
        self._end_asked_at = 0  # the meeting at which a rank waits that wants training to end
        self._meetings = 0
        self._lock = threading.Lock()
        self._store, self._thread_store = connect(), connect()
        self._heartbeats = Heartbeats(self._store)
        self._watch = Heartbeats(self._thread_store)
        self._pause = threading.Event()  # set where the thread has to look at once
        self._thread = HelperThread(self._listen, f"control-{rank}", self._ask_to_end)

    # -- stopping -----------------------------------------------------------------------------------------------

    def stop(self, kind: str, cause: str, lost: int = -1) -> Stop:
        """Write the stop word, unless another rank did first, and return the one that holds.

        Args:
            kind, cause, lost: see :class:`Stop`; the other ranks will report the cause.
        """
        stop = Stop(kind, self.rank, self._clock(), cause, lost)
        with self._lock:
            try:
                self._receive(self._store.compare_set(_STOP, "", json.dumps(asdict(stop))))
            except (DistNetworkError, DistStoreError):
                self._lose_store()
        return self.stopped or stop

    # -- whom it loses: the run ends with any ---------------------------------------------------------------------

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part, as far as this rank knows, ascending."""
        return tuple(range(self.world_size))

    @property
    def whole(self) -> tuple[int, ...]:
        """Those of :attr:`members` that train already."""
        return self.members

    def incarnation_at(self, step: int, rank: int) -> int:
        """Return which process of ``rank`` is meant at ``step``: how many were there before it."""
        return 0

    def incarnation_of(self, rank: int) -> int:
        """Return which process of ``rank`` takes part now, or was the last to, as far as this rank knows."""
        return 0

    def process_of(self, rank: int) -> Process:
        """Return the process that takes part as ``rank`` now, or was the last to, as far as this rank knows."""
        return Process(rank, self.incarnation_of(rank))

    def is_lost(self, rank: int, incarnation: int) -> bool:
        """Whether that process of ``rank`` is known to take part no more, while the run goes on.

        It is to be named: another may have come to the rank's seat before this one asks.
        """
        return False

    def goes_on_without(self, rank: int, why: str, incarnation: int) -> bool:
        """Whether the run goes on without that process of ``rank``, whom this rank can not reach any more."""
        return False

    def _name(self, rank: int) -> str:
        """Return what stands for ``rank`` in keys that a later process of the same rank must not find."""
        return str(rank)

    def patience(self) -> float:
        """Return until when (of :func:`time.monotonic`) this rank may wait for a partner that gives a sign of life."""
        return time.monotonic() + self.timeout.total_seconds()

    # -- meeting ------------------------------------------------------------------------------------------------

    def meet(self, reason: str, ending: bool = False, follow: Callable[[str], bool] | None = None) -> Meeting:
        """Wait until every rank calls this with the same ``reason``: what comes before any collective.

        A rank that is slow but alive is waited for without limit; one without a sign of life for ``timeout`` is not.
        While it waits here a rank takes part in no exchange: :meth:`has_left` tells its partners.

        Args:
            reason: in words.
            ending: whether this rank wants all to end training soon (see :attr:`asked_to_end`).
            follow: called with the reason for which others meet, where it is another one: may meet for that first, and
                says whether it did.

        Raises:
            RuntimeError: if ranks meet for different reasons, or a rank is dead.
            RunStopped: if some rank stops meanwhile.
        """
        self.check()
        if self.world_size == 1:
            self._meetings += 1
            return Meeting(self._clock(), skipped=False, ending=ending, number=self._meetings, members=(self.rank,))
        self._claim_or_follow(reason, follow)
        self._meetings += 1
        key = f"meet/{self._meetings}"
        with self.reaching_store():
            self._announce(key, ending)
            if self._store.add(f"{key}/count", 1) == self.world_size:
                clock = max(self._whereabouts(rank)[1] for rank in range(self.world_size))
                notes = [int(self._store.check([f"{key}/{note}"])) for note in ("skipped", "ending")]
                self._store.set(f"{key}/go", ":".join(map(str, (clock, *notes))))
            self._await(lambda: self._store.check([f"{key}/go"]) or None, self._meetings, reason)
            clock, skipped, some_ending = map(int, self._store.get(f"{key}/go").decode().split(":"))
            if self.rank == 0:
                # everybody has left the meeting before this one
                for field in ("reason", "count", "go", "skipped", "ending"):
                    self._store.delete_key(f"meet/{self._meetings - 1}/{field}")
        return Meeting(clock, bool(skipped), bool(some_ending), self._meetings, tuple(range(self.world_size)))

    def _claim_or_follow(self, reason: str, follow: Callable[[str], bool] | None) -> None:
        """Let the next meeting be for ``reason``, once this rank has met for what others are at."""
        while (first := self.claim(reason))[1] != reason:
            if follow is None or not follow(first[1]):
                raise RuntimeError(
                    f"the ranks disagree on what comes next: rank {first[0]} is at '{first[1]}',"
                    f" rank {self.rank} at '{reason}'"
                )

    def _announce(self, key: str, ending: bool) -> None:
        """Tell that this rank is at the meeting, and with which clock."""
        if ending:
            self._store.set(f"{key}/ending", "1")
            self._store.set(_END, str(self._meetings))
        self._store.set(f"at/{self._name(self.rank)}", f"{self._meetings}:{self._clock()}")

    def claim(self, reason: str) -> tuple[int, str]:
        """Let ``reason`` be that of the next meeting, unless another is; return the rank that came first, and its.

        Raises:
            RunStopped: as :meth:`check`.
        """
        if self.world_size == 1:
            return self.rank, reason
        with self.reaching_store():
            word = self._store.compare_set(f"meet/{self._meetings + 1}/reason", "", f"{self.rank}|{reason}").decode()
        rank, _, first = word.partition("|")
        return int(rank), first

    def await_all(self, reason: str, follow: Callable[[str], None], ending: bool = False) -> Meeting:
        """Wait until every rank calls this, and meet; until then take part in whatever the others meet for.

        A rank that is slow but alive is waited for without limit, and partners skip this rank, as in :meth:`meet`.

        Args:
            reason: in words.
            follow: called with the reason of a meeting to which another rank has come; has to meet for that.
            ending: as for :meth:`meet`.

        Raises:
            RuntimeError: if a rank is dead.
            RunStopped: if some rank stops meanwhile.
        """
        if self.world_size > 1:
            self._waits[reason] += 1
            arrivals = f"await/{reason}/{self._waits[reason]}"
            with self.reaching_store():
                self._store.set(f"{arrivals}/{self._name(self.rank)}", "1")
                self.calls.lookout.tell(self._store, reason)
            while (called := self._await_call(reason, arrivals, ending)) != reason:
                follow(called)
        return self.meet(reason, ending)

    def _await_call(self, reason: str, arrivals: str, ending: bool) -> str:
        """Return the reason of the next meeting, once a rank has come to it or all wait here."""
        meeting = self._meetings + 1
        key = f"meet/{meeting}/reason"

        def look() -> str | None:
            if self._store.check([key]):
                return self._store.get(key).decode().partition("|")[2]
            return reason if self._store.check([f"{arrivals}/{self._name(rank)}" for rank in self.members]) else None

        with self.reaching_store():
            if ending:
                self._store.set(_END, str(meeting))
            self._store.set(f"at/{self._name(self.rank)}", f"{meeting}:{self._clock()}")
            return self._await(look, meeting, reason)

    @property
    def asked_to_end(self) -> bool:
        """Whether a rank that wants training to end waits at a meeting that this rank has not reached."""
        return self._end_asked_at > self._meetings

    def has_left(self, rank: int, step: int) -> bool:
        """Whether ``rank`` waits at a meeting that this rank has not reached, and never began ``step``.

        Raises:
            RunStopped: as :meth:`check`.
        """
        with self.reaching_store():
            meeting, clock = self._whereabouts(rank)
        return meeting > self._meetings and clock < step

    def note_skip(self) -> None:
        """Record for the next meeting that this rank skipped a partner.

        Raises:
            RunStopped: as :meth:`check`.
        """
        with self.reaching_store():
            self._store.set(f"meet/{self._meetings + 1}/skipped", "1")

    @contextmanager
    def reaching_store(self) -> Iterator[None]:
        """Tell a store that is gone as the end of the run that it is."""
        try:
            yield
        except DistNetworkError:
            self._lose_store()
            self.check()
            raise

    def _whereabouts(self, rank: int) -> tuple[int, int]:
        """Return the number of the last meeting at which ``rank`` arrived, and its clock then."""
        key = f"at/{self._name(rank)}"
        if not self._store.check([key]):
            return 0, 0
        meeting, clock = map(int, self._store.get(key).decode().split(":"))
        return meeting, clock

    def _await(self, look: Callable[[], T | None], meeting: int, reason: str) -> T:
        """Call ``look`` until it finds something, as long as all who have not come to ``meeting`` are alive."""
        limit = self.timeout.total_seconds()
        while (found := self.poll(look, time.monotonic() + min(2.0, limit / 4))) is None:
            for rank in range(self.world_size):
                late = rank != self.rank and self._whereabouts(rank)[0] < meeting
                if late and self._heartbeats.silence(rank) > limit:
                    raise RuntimeError(
                        f"rank {self.rank} waited at '{reason}' for rank {rank},"
                        f" which gave no sign of life for {limit:g} s"
                    )
        return found

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self, grace: float = 10.0) -> None:
        """Leave the run. The rank that holds the store (rank 0) stays up to ``grace`` seconds for the others to leave.

        After an error they still have to read the stop word; those without a heartbeat are not waited for.
        """
        if self._closing.is_set():
            return
        try:
            self._store.set(f"gone/{self._name(self.rank)}", "1")
            self._leave(grace)
        except (DistNetworkError, DistStoreError) as error:
            log.debug("rank %d left a run whose store is gone: %s", self.rank, error)
        self._ask_to_end()
        self._thread.join(timeout=2 * HEARTBEAT)

    def _ask_to_end(self) -> None:
        self._closing.set()
        self._pause.set()

    def _leave(self, grace: float) -> None:
        """Stay up to ``grace`` seconds for the others, where this process holds the store."""
        self._store.add("left", 1)
        deadline = time.monotonic() + grace
        while self.rank == 0 and self._store.add("left", 0) < self.world_size and time.monotonic() < deadline:
            staying = [rank for rank in range(1, self.world_size) if not self._store.check([f"gone/{rank}"])]
            if all(self._heartbeats.silence(rank) > 3 * HEARTBEAT for rank in staying):
                return
            self._closing.wait(0.01)

    # -- the thread ---------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        store = self._thread_store
        beaten = -HEARTBEAT
        try:
            while True:
                beats = time.monotonic() - beaten >= HEARTBEAT  # by the clock: over a slow link a look takes its time
                beaten = time.monotonic() if beats else beaten
                self._look(store, beats)
                self._pause.wait(LOOK)
                self._pause.clear()
                if self._closing.is_set():
                    return
        except (DistNetworkError, DistStoreError):
            self._lose_store()

    def _look(self, store: Store, beats: bool) -> None:
        """Look at the store, on the thread's own connection; give a sign of life where ``beats``."""
        self._beat(store, beats)
        if self.stopped is None and store.check([_STOP]):
            self._receive(store.get(_STOP))
        if store.check([_END]):
            self._end_asked_at = int(store.get(_END))
        self.calls.look(store)

    def _beat(self, store: Store, beats: bool) -> None:
        """Give a sign of life, where ``beats``."""
        if beats:
            store.add(f"alive/{self.rank}", 1)

    def _receive(self, word: bytes) -> None:
        self.stopped = Stop(**json.loads(word))

    def _lose_store(self) -> None:
        if self.stopped is None:
            cause = "the run's store is gone: the process that held it (rank 0's, or the launcher's) has ended"
            self.stopped = Stop("error", -1, self._clock(), cause)
