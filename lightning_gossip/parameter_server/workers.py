"""What shards call the workers of a run, as one of them reads it in the log of members (see :mod:`.protocol`)."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.members import JOINING
from lightning_gossip.control.run import Control


class Workers:
    """The numbers of all workers of a run, and whom it has lost.

    Args:
        control: of this worker, which has been taken in where it joins.

    Attributes:
        own: this worker's number.

    Raises:
        RuntimeError: if this worker joins, and nobody has taken it in.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._numbers = list(range(control.world_size))
        self._read = 0  # entries of the log
        self._lost: list[int] = []
        self._told = 0
        self.own = control.rank
        if isinstance(control, MemberControl) and control.incarnation > 0:
            self.own = self._of_joiner(control)

    @property
    def by_seat(self) -> Mapping[int, int]:
        """Of every seat the number of its last worker, whether or not it is lost."""
        self._look()
        return dict(enumerate(self._numbers))

    def newly_lost(self) -> list[int]:
        """Return the numbers of those that the run has lost, each once."""
        self._look()
        lost, self._told = self._lost[self._told :], len(self._lost)
        return [worker for worker in lost if worker != self.own]

    def _look(self) -> None:
        if not isinstance(self._control, MemberControl):
            return
        changes = self._control.changes
        for change in changes[self._read :]:
            if change.kind == JOINING:
                self._numbers[change.seat] = self._number(change.number, change.seat)
            elif change.ends:
                self._lost.append(self._numbers[change.seat])
        self._read = len(changes)

    def _of_joiner(self, control: MemberControl) -> int:
        for change in reversed(control.changes):
            if (change.kind, change.seat, change.incarnation) == (JOINING, control.rank, control.incarnation):
                return self._number(change.number, change.seat)
        raise RuntimeError(f"worker {control.rank} joins, and no member has taken it in")

    def _number(self, entry: int, seat: int) -> int:
        return entry * self._control.world_size + seat
