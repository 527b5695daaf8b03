"""What other ranks wait for, where each counts steps of its own: who comes first to a meeting calls the others to it.

The first whose count says so goes to the meeting at once; the control threads of the others see it there, and they come
at the end of their present step (design §11). Nobody sends a message in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.distributed import Store

_NOBODY = "-"


class Lookout:
    """One rank's view of it, which its control thread keeps.

    Args:
        next_meeting: returns the number of this rank's next meeting.
        waits: how often this rank has waited for each reason in :meth:`.Control.await_all`.

    Attributes:
        kept: whether anybody is to look for others at the next meeting.
        watched: a reason of :meth:`.Control.await_all` for which others may wait; empty for none.
    """

    def __init__(self, next_meeting: Callable[[], int], waits: Mapping[str, int]) -> None:
        self.kept = False
        self.watched = ""
        self._next_meeting = next_meeting
        self._waits = waits
        self._meeting = (0, "")  # number and reason of one to which others have come
        self._waiting = ("", 0)  # reason, and how many waits for it there were with that one

    @property
    def called_to(self) -> str | None:
        """For what other ranks wait at the next meeting, as far as this rank knows."""
        number, reason = self._meeting
        return reason if number == self._next_meeting() else None

    def is_awaited(self, reason: str) -> bool:
        """Whether another rank waits for all, for ``reason``, as far as this rank knows."""
        return self._waiting == (reason, self._next_wait(reason))

    def look(self, store: Store) -> None:
        """Look at the store; for the control thread, on its own connection."""
        meeting, reason = self._next_meeting(), self.watched
        if self.kept:  # in one message: the key may go, once this rank has been to that meeting
            word = store.compare_set(f"meet/{meeting}/reason", _NOBODY, _NOBODY).decode()
            if word != _NOBODY:
                self._meeting = meeting, word.partition("|")[2]
        if reason and store.check([_first(reason, number := self._next_wait(reason))]):
            self._waiting = reason, number

    def tell(self, store: Store, reason: str) -> None:
        """Tell the others that this rank is at its present wait for ``reason``, where they may watch for that."""
        if reason == self.watched:
            store.set(_first(reason, self._waits[reason]), "1")

    def _next_wait(self, reason: str) -> int:
        return self._waits.get(reason, 0) + 1


def _first(reason: str, number: int) -> str:
    return f"await/{reason}/{number}/first"
