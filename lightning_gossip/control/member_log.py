"""The log of members in the run's store: reading it, adding to it, and moving the horizon on (see ``members``)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict

from torch.distributed import Store

from lightning_gossip.control.members import Change, Members


class MemberLog:
    """One rank's reading of the log; several of its threads may use it, each with its own connection to the store.

    Args:
        members: what was read of it, none at first.
        rank: of this process.
        on_change: called with every entry once it is read, whoever wrote it; it must not wait for another thread.
    """

    def __init__(self, members: Members, rank: int, on_change: Callable[[Change], None]) -> None:
        self._members = members
        self._rank = rank
        self._on_change = on_change
        self._lock = threading.RLock()
        self._grown = threading.Condition(self._lock)

    @property
    def horizon(self) -> int:
        """The last step whose members are known."""
        return self._members.horizon

    @property
    def length(self) -> int:
        """Number of entries read."""
        return len(self._members.changes)

    @property
    def folded(self) -> int:
        """See :attr:`Members.folded`."""
        return self._members.folded

    @property
    def changes(self) -> tuple[Change, ...]:
        """The entries read."""
        return tuple(self._members.changes)

    @property
    def present(self) -> tuple[int, ...]:
        """See :attr:`Members.present`."""
        return self._members.present

    @property
    def whole(self) -> tuple[int, ...]:
        """See :attr:`Members.whole`."""
        return self._members.whole

    def incarnation(self, seat: int) -> int:
        """See :meth:`Members.incarnation`."""
        return self._members.incarnation(seat)

    def last_change(self, seat: int) -> Change | None:
        """See :meth:`Members.last_change`."""
        with self._lock:
            return self._members.last_change(seat)

    def at(self, step: int) -> tuple[int, ...]:
        """See :meth:`Members.at`."""
        with self._lock:
            return self._members.at(step)

    def all_at(self, step: int) -> tuple[int, ...]:
        """See :meth:`Members.all_at`."""
        with self._lock:
            return self._members.all_at(step)

    def incarnation_at(self, step: int, seat: int) -> int:
        """See :meth:`Members.incarnation_at`."""
        with self._lock:
            return self._members.incarnation_at(step, seat)

    def incarnations_of(self, number: int, seats: tuple[int, ...]) -> tuple[int, ...]:
        """See :meth:`Members.incarnations_of`."""
        with self._lock:
            return self._members.incarnations_of(number, seats)

    def whole_by(self, number: int) -> tuple[int, ...]:
        """See :meth:`Members.whole_by`."""
        with self._lock:
            return self._members.whole_by(number)

    def step_of(self, number: int) -> int:
        """See :meth:`Members.step_of`."""
        with self._lock:
            return self._members.step_of(number)

    def fold(self, store: Store, number: int) -> tuple[int, ...]:
        """Read the log up to entry ``number`` at least, and let that much of it hold: see :meth:`Members.fold`."""
        with self._lock:
            if self.length < number:
                self.read(store)
            return self._members.fold(number)

    def read(self, store: Store) -> None:
        """Read the log to its end, and give every entry its step."""
        with self._lock:
            while store.check([key := f"change/{self.length + 1}"]):
                self._take(Change(**json.loads(store.get(key))))
            self._give_steps(store)

    def append(self, store: Store, kind: str, seat: int, incarnation: int, step: int, cause: str) -> Change | None:
        """Add an entry, if it still tells something new by then; return it, or None."""
        with self._lock:
            self.read(store)
            while self._members.may_append(kind, seat, incarnation):
                entry = Change(self.length + 1, kind, seat, incarnation, self._rank, step, cause)
                held = store.compare_set(f"change/{entry.number}", "", json.dumps(asdict(entry)))
                written = Change(**json.loads(held))
                self._take(written)
                if written == entry:
                    self._give_steps(store)
                    return entry
            self._give_steps(store)
            return None

    def extend(self, store: Store, horizon: int) -> None:
        """Move the horizon on to ``horizon``."""
        with self._lock:
            if horizon > self.horizon:
                store.set(_horizon(self._rank, self.incarnation(self._rank)), str(horizon))
                self.read(store)
                self._members.hold_horizon(horizon)
                self._grown.notify_all()

    def await_horizon(self, step: int, seconds: float) -> bool:
        """Wait until the horizon has reached ``step``; return whether it has."""
        with self._lock:
            return self._grown.wait_for(lambda: self.horizon >= step, seconds)

    def _take(self, change: Change) -> None:
        self._members.read(change)
        self._on_change(change)

    def _give_steps(self, store: Store) -> None:
        while (change := self._members.without_step) is not None:
            key = f"change/{change.number}/from"
            if not store.check([key]):
                keys = [_horizon(seat, self.incarnation(seat)) for seat in range(self._members.seats)]
                horizons = [int(store.get(key)) for key in keys if store.check([key])]
                store.compare_set(key, "", str(self._members.step_for(horizons)))
            self._members.hold_from(change.number, int(store.get(key)))


def _horizon(seat: int, incarnation: int) -> str:
    return f"horizon/{seat}.{incarnation}"
