"""One rank's part in the dealing of work: the deck and the counter in the run's store (see :mod:`.deal`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch.distributed import DistNetworkError, DistStoreError, Store

from lightning_gossip.control.deal import Deck, Hand
from lightning_gossip.control.helper_thread import HelperThread
from lightning_gossip.control.run import Control

_CURRENT = "deal/current"


class Dealer:
    """Draws batches for one rank; a thread asks the counter beside training.

    Args:
        connect: returns a connection to the run's store that nobody else uses.
        control: of this rank.
    """

    def __init__(self, connect: Callable[[], Store], control: Control) -> None:
        self._control = control
        self._store = connect()
        self._thread_store = connect()
        self._lock = threading.Lock()  # of the hand
        self._hand: Hand | None = None
        self._key = ""  # of the present deck
        self._decks = 0
        self._wanted = threading.Event()
        self._answered = threading.Event()
        self._closing = False
        self._error: Exception | None = None
        self._thread = HelperThread(self._ask, f"dealer-{control.rank}", self._ask_to_end)

    @property
    def hand(self) -> Hand:
        """What was drawn from the present deck.

        Raises:
            RuntimeError: if no deck was opened.
        """
        if self._hand is None:
            raise RuntimeError("no deck was opened")
        return self._hand

    def shuffle(self) -> int:
        """Begin a new series of decks, as all ranks do at the same point, and return its number.

        A rank that joins takes part in the present one of the others.
        """
        there = int(self._store.get(_CURRENT)) if self._store.check([_CURRENT]) else 0
        self._decks = max(self._decks + 1, there)
        return self._decks

    def open(self, epoch: int, deck: Deck, joins: bool = False) -> Deck:
        """Open the deck of an epoch: ``deck``, unless another rank has opened it; return the one that holds.

        Args:
            epoch: its number.
            deck: which batches are dealt, and to whom the first.
            joins: whether this process joins in the middle of the epoch, so that nothing was handed out to it.

        Raises:
            RuntimeError: if the ranks' batches are not the same; if the store is gone.
        """
        key = f"deal/{self._decks}/{epoch}"
        try:
            self._tell_current()
            held = Deck.from_json(self._store.compare_set(key, "", deck.to_json()))
            if self._key not in ("", key):  # all have met since they drew from it
                self._store.delete_key(_counter(self._key))
                self._store.delete_key(self._key)
        except (DistNetworkError, DistStoreError) as error:
            self._control.await_stop(1.0)
            self._control.check()
            raise RuntimeError(f"the run's store did not open the deck of epoch {epoch}: {error}") from error
        with self._lock:
            self._hand, self._key = Hand(held, None if joins else self._control.rank), key
        self._wanted.set()
        return held

    def _tell_current(self) -> None:
        """Tell those that join which decks are the present ones; never to go back, though this rank be late."""
        number = str(self._decks)
        there = self._store.compare_set(_CURRENT, "", number)
        while int(there) < int(number):
            there = self._store.compare_set(_CURRENT, there.decode(), number)

    def next(self) -> int | None:
        """Return the number of the next batch, None where there is none; it is known then if it is the last.

        Raises:
            RunStopped: if some rank stops meanwhile.
            RuntimeError: if the store does not answer in time.
        """
        self._await(lambda hand: hand.knows_next)
        with self._lock:
            number = self.hand.issue()
        self._wanted.set()
        if number is not None:
            self._await(lambda hand: hand.knows_next)
        return number

    def issue_again(self, trained: int) -> None:
        """See :meth:`.Hand.issue_again`."""
        with self._lock:
            self.hand.issue_again(trained)

    def even_out(self) -> None:
        """See :meth:`.Hand.even_out`."""
        with self._lock:
            self.hand.even_out()
        self._answered.set()

    def held(self, trained: int) -> list[int]:
        """Return the batches that this rank has drawn and not trained, once no question is under way.

        Raises:
            RunStopped, RuntimeError: as :meth:`next`.
        """
        self._await(lambda hand: not hand.asking and not hand.wants)
        with self._lock:
            return self.hand.held(trained)

    def count(self) -> int:
        """Return where the counter stands."""
        return self._store.add(_counter(self._key), 0)

    def close(self) -> None:
        """End the thread."""
        self._ask_to_end()
        self._thread.join(timeout=5)

    def _ask_to_end(self) -> None:
        self._closing = True
        self._wanted.set()

    def _await(self, known: Callable[[Hand], bool]) -> None:
        timeout = self._control.timeout.total_seconds()
        deadline = time.monotonic() + timeout
        while True:
            self._answered.clear()
            with self._lock:
                if known(self.hand):
                    return
            if self._error is not None:
                self._control.await_stop(1.0)
                self._control.check()
                raise RuntimeError(f"the run's store deals no batches: {self._error}") from self._error
            if not self._control.wait(self._answered, deadline):
                raise RuntimeError(
                    f"rank {self._control.rank} waited for {timeout:g} s for the run's store to deal it a batch"
                )

    # -- the thread -------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        try:
            while True:
                self._wanted.wait()
                self._wanted.clear()
                if self._closing:
                    return
                while (asked := self._question()) is not None:
                    hand, counter = asked
                    count = self._thread_store.add(counter, 1)
                    with self._lock:
                        hand.answer(count)
                    self._answered.set()
        except (DistNetworkError, DistStoreError) as error:
            self._error = error
            self._answered.set()

    def _question(self) -> tuple[Hand, str] | None:
        with self._lock:
            hand = self._hand
            if hand is None or not hand.wants or self._closing:
                return None
            hand.ask()
            return hand, _counter(self._key)


def _counter(key: str) -> str:
    return f"{key}/count"
