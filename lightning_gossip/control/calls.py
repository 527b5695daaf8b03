"""What one rank wants all to do at the end of a step, agreed on without a message in a step (design §4, §11).

A rank *calls* for something, at any moment: a signal handler may. The control threads of all ranks see it, and each
promises for its rank not to go on past the step that follows the present one until it knows where all will stop: at
the largest of the promised steps. So nobody is held up by one that is slow, and nobody has gone past that step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch.distributed import Store

from lightning_gossip.control.lookout import Lookout


class Calls:
    """One rank's view of what is called for; one thing at a time.

    Args:
        name: returns what names a rank's process in the store.
        rank: of this process.
        members: returns the ranks that take part.
        clock: returns the step at which this rank is.
        lookout: looks for what other ranks wait for.

    Attributes:
        together: whether the ranks' clocks go together, and all stop at one step. Where each has a pace of its own,
            every rank stops at the end of the step that follows its present one.
    """

    def __init__(
        self,
        rank: int,
        members: Callable[[], Sequence[int]],
        clock: Callable[[], int],
        name: Callable[[int], str] = str,
        lookout: Lookout | None = None,
    ) -> None:
        self.together = True
        self.lookout = lookout or Lookout(lambda: 0, {})
        self._rank = rank
        self._name = name
        self._members = members
        self._clock = clock
        self._lock = threading.Lock()  # between reading the clock and making the promise this rank must not go on
        self._number = 0  # of the call
        self._noted: str | None = None
        self._wished: str | None = None
        self._called: str | None = None
        self._promised = 0
        self._agreed: int | None = None

    def note(self, what: str) -> None:
        """Call for ``what``, unless it is called for already: for signal handlers, so no more than an assignment."""
        self._noted = what

    def wish(self, what: str) -> None:
        """Call for ``what`` where nothing is noted or called for: it may be forgotten over that."""
        self._wished = what

    @property
    def number(self) -> int:
        """How many things were called for, and done."""
        return self._number

    def begin_at(self, number: int) -> None:
        """Take part from what is called for after ``number`` were done."""
        with self._lock:
            self._number = number

    @property
    def called(self) -> str | None:
        """What is called for, as far as this rank knows."""
        return self._called

    def due(self, step: int, wait: Callable[[Callable[[], int | None]], int]) -> str | None:
        """Return what all do at the end of ``step``, if this is the one; None at most steps, at no cost.

        Args:
            step: that this rank has ended.
            wait: calls what it is given until that returns a number, and returns it.
        """
        with self._lock:
            called, promised = self._called, self._promised
        if called is None or step < promised:
            return None
        return called if step >= wait(lambda: self._agreed) else None

    def finish(self, what: str) -> None:
        """Go on: ``what`` is done, perhaps with ranks of whose call this one has not heard yet."""
        with self._lock:
            if self._noted == what:
                self._noted = None
            self._wished = None
            self._called = self._agreed = None
            self._number += 1

    def look(self, store: Store) -> None:
        """Look at the store, and answer what is there; for the control thread, on its own connection."""
        self.lookout.look(store)
        number = self._number
        key = f"call/{number}"
        if self._called is None:
            self._hear(store, number, key)
        if self._called is not None and self._agreed is None and self._settle(store, key):
            agreed = int(store.get(f"{key}/step"))
            with self._lock:
                if number == self._number:
                    self._agreed = agreed

    def _hear(self, store: Store, number: int, key: str) -> None:
        if not store.check([key]) and (own := self._noted or self._wished) is not None:
            store.compare_set(key, "", own)
        if not store.check([key]):
            return
        what = store.get(key).decode()
        with self._lock:
            if number != self._number:
                return
            self._promised = self._clock() + 1
            self._called = what
            if not self.together:
                self._agreed = self._promised
                return
        store.set(f"{key}/at/{self._name(self._rank)}", str(self._promised))

    def _settle(self, store: Store, key: str) -> bool:
        """Whether it is known where all will stop; found out here where all that take part have promised."""
        if not store.check([f"{key}/step"]):
            promises = [f"{key}/at/{self._name(rank)}" for rank in self._members()]
            if store.check(promises):
                store.compare_set(f"{key}/step", "", str(max(int(store.get(promise)) for promise in promises)))
        return bool(store.check([f"{key}/step"]))
