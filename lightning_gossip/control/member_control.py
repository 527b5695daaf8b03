"""One rank's part in a run of members: meetings of those that are left, votes, who joins (see ``members``)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch.distributed import Store
from typing_extensions import override

from lightning_gossip.control.meeting import Meeting, Process, clocks_told
from lightning_gossip.control.members import JOINED, JOINING, Change
from lightning_gossip.control.run import HEARTBEAT, LOOK
from lightning_gossip.control.store import value_of
from lightning_gossip.control.watching import LOST_AFTER, Survival, WatchingControl, check_lost_after

__all__ = ["LOST_AFTER", "MemberControl", "RunOver", "Survival", "check_lost_after"]

T = TypeVar("T")

OVER = "over"
"""The key that says that training is over, with what is left of it."""


class RunOver(RuntimeError):
    """A process has come to a run whose training is over; :attr:`left` is what is left of it, in words."""

    def __init__(self, left: str) -> None:
        super().__init__(f"the training is over: {left}")
        self.left = left


class MemberControl(WatchingControl):
    """The control of a rank whose run goes on without those that it loses, and takes in who comes for them.

    Args:
        rest: see :class:`~lightning_gossip.control.watching.WatchingControl`.
    """

    def __init__(self, *rest: Any, **options: Any) -> None:
        self._asked = 0  # requests to join that were read
        self._asking: list[Process] = []  # that nobody has answered yet
        self.guest: Process | None = None
        """Whom this rank is to take in at the end of a step."""
        super().__init__(*rest, **options)

    # -- the beginning ------------------------------------------------------------------------------------------

    def begin(self, seconds: float) -> Meeting:
        """Wait until every seat has its process, up to ``seconds``; who has not come by then is lost. Then meet.

        Raises:
            RunStopped: if too few have come, or this rank came too late.
        """
        deadline = time.monotonic() + seconds
        missing = list(range(self.world_size))
        with self.reaching_store():
            while missing:
                missing = [k for k in missing if not (self.is_lost(k, 0) or self._store.check([f"process/{k}.0"]))]
                if time.monotonic() >= deadline:
                    for rank in missing:
                        self._declare(self._store, rank, 0, f"no process came within {seconds:g} s")
                    break
                self.check()
                self._closing.wait(LOOK / 4)
        return self.meet("the beginning")

    # -- meetings -----------------------------------------------------------------------------------------------

    def meet(self, reason: str, ending: bool = False, follow: Callable[[str], bool] | None = None) -> Meeting:
        """Wait until all members that are left call this with the same ``reason``; see :meth:`Control.meet`.

        The meeting names them. One that gives no sign of life for ``lost_after`` is declared lost, and not waited for.
        """
        self.check()
        self._claim_or_follow(reason, follow)
        self._meetings += 1
        key = f"meet/{self._meetings}"
        with self.reaching_store():
            self._announce(key, ending)
            look = self._ended(f"{key}/go", f"{key}/count", lambda: self._end_meeting(key))
            found = self._await(look, self._meetings, reason)
            number, clock, skipped, some_ending = map(int, found.split(b":"))
            members = self._log.fold(self._store, number)
            self.check()
            if self.rank == members[0]:
                # everybody has left the meeting before this one
                before = f"meet/{self._meetings - 1}"
                fields = ["reason", "count", "go", "skipped", "ending", "votes", "verdict", "word"]
                for field in [*fields, *(f"vote/{rank}" for rank in range(self.world_size))]:
                    self._store.delete_key(f"{before}/{field}")
            incarnations = self._log.incarnations_of(number, members)
        return Meeting(clock, bool(skipped), bool(some_ending), self._meetings, members, incarnations)

    @override
    def _await(self, look: Callable[[], T | None], meeting: int, reason: str) -> T:
        """Call ``look`` until it finds something; who has not come to ``meeting`` and is silent is declared lost."""
        while (found := self.poll(look, time.monotonic() + self._look_up)) is None:
            self._declare_late(lambda rank: self._whereabouts(rank)[0] < meeting)
        return found

    def agree(self, meeting: Meeting, succeeded: bool) -> bool:
        """Return whether what the members met for has succeeded on all that are left: else all repeat it.

        Args:
            meeting: that came before it.
            succeeded: whether it has on this rank.

        Raises:
            RunStopped: as :meth:`check`.
        """
        key = f"meet/{meeting.number}"
        with self.reaching_store():
            self._store.set(f"{key}/vote/{self.rank}", str(int(succeeded)))
            look = self._ended(f"{key}/verdict", f"{key}/votes", lambda: self._end_vote(key, meeting))
            while (found := self.poll(look, time.monotonic() + self._look_up)) is None:
                self._declare_late(lambda rank: not self._store.check([f"{key}/vote/{rank}"]))
        self.check()
        return found == b"1"

    def _ended(self, word: str, arrivals: str, end: Callable[[], None]) -> Callable[[], bytes | None]:
        """Arrive, and return what returns the word at key ``word`` once it is there: who comes last writes it.

        Or, where that one dies over it, or the last of those that are left has come already, whoever reads so.
        """
        is_last = self._store.add(arrivals, 1) >= len(self._log.present)
        looked, again = -1 if is_last else self._log.length, time.monotonic() + self._look_up

        def look() -> bytes | None:
            nonlocal looked, again
            if (found := value_of(self._store, word)) is not None:
                return found
            if looked < self._log.length or time.monotonic() > again:
                self._log.read(self._store)
                looked, again = self._log.length, time.monotonic() + self._look_up
                end()
            return None

        return look

    def _end_meeting(self, key: str) -> None:
        """Write the word that ends the meeting, if all that are left have come."""
        number = -1
        while number < self._log.length:  # who took somebody in did so before it came: read that before the word
            members, number = self._log.present, self._log.length
            whereabouts = [self._whereabouts(rank) for rank in members]
            if self.rank not in members or any(meeting < self._meetings for meeting, _ in whereabouts):
                return
            self._log.read(self._store)
        clock = max(clock for _, clock in whereabouts)
        notes = [int(self._store.check([f"{key}/{note}"])) for note in ("skipped", "ending")]
        self._store.compare_set(f"{key}/go", "", ":".join(map(str, (number, clock, *notes))))

    def _end_vote(self, key: str, meeting: Meeting) -> None:
        """Write the verdict, if all that met have said how it went, or are lost."""
        lost = dict(zip(meeting.members, map(self.is_lost, meeting.members, meeting.incarnations), strict=True))
        given = {rank: self._store.check([f"{key}/vote/{rank}"]) for rank in lost}
        if all(has_voted or lost[rank] for rank, has_voted in given.items()):
            votes = [self._store.get(f"{key}/vote/{rank}") for rank, has_voted in given.items() if has_voted]
            self._store.compare_set(f"{key}/verdict", "", str(int(all(vote == b"1" for vote in votes))))

    # -- joining ------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask for a donor, for this process that has come to a seat which was lost."""
        with self.reaching_store():
            number = self._store.add("joins", 1)
            self._store.set(f"join/{number}", self._name(self.rank))

    def await_donor(self) -> Process:
        """Wait until a member has taken this process in, and return it.

        Raises:
            RunStopped, RunOver: as :meth:`await_members`.
        """
        return self.await_members(self._look_for_donor)

    def await_members(self, look: Callable[[], T | None]) -> T:
        """Call ``look`` until it finds what members bring about, for as long as there is one; return that.

        Before it joins a rank watches nobody, and may come to be alone: here it declares lost who has ended, or is
        silent.

        Raises:
            RunStopped: as :meth:`check`; also where nobody is left who could take in this process.
            RunOver: if training is over.
        """

        def find() -> T | None:
            if self._store.check([OVER]):
                raise RunOver(self._store.get(OVER).decode())
            return look()

        with self.reaching_store():
            while (found := self.poll(find, time.monotonic() + self._look_up)) is None:
                self._declare_late(lambda rank: True)
                if not self._log.whole:
                    self.stop("error", f"nobody is left who could take in rank {self.rank}")
        return found

    def _look_for_donor(self) -> Process | None:
        change = self._log.last_change(self.rank)
        if change is None or (change.kind, change.incarnation) != (JOINING, self.incarnation):
            return None
        [incarnation] = self._log.incarnations_of(change.number, (change.by,))
        return Process(change.by, incarnation)

    def take_in(self) -> Change | None:
        """Append that the :attr:`guest` is joining; return the entry, or None where it is no more to be taken in.

        Called at the end of a step; :meth:`position` then tells what comes with this rank's state.
        """
        guest, self.guest = self.guest, None
        if guest is None:
            return None
        with self.reaching_store():
            return self._log.append(self._store, JOINING, *guest, self._clock(), f"from rank {self.rank}")

    @property
    def donor(self) -> int:
        """The first member that is whole, by what all that have met last count."""
        return self._log.whole_by(self._log.folded)[0]

    def word_of(self, rank: int, own: Callable[[], str], otherwise: str) -> str:
        """Return what ``rank`` tells those that have just met with it; ``otherwise``, where it is lost before it has.

        All that have met call this, once before they meet again, and get the same.

        Args:
            rank: one of them.
            own: returns what this rank tells; called where it is ``rank``.
            otherwise: the same on all.

        Raises:
            RunStopped: as :meth:`check`.
        """
        key = f"meet/{self._meetings}/word"
        [incarnation] = self._log.incarnations_of(self._log.folded, (rank,))

        def look() -> str | None:
            if self._store.check([key]):
                return self._store.get(key).decode()
            if self.is_lost(rank, incarnation):
                return self._store.compare_set(key, "", otherwise).decode()
            return None

        with self.reaching_store():
            if rank == self.rank:
                return self._store.compare_set(key, "", own()).decode()
            while (found := self.poll(look, time.monotonic() + self._look_up)) is None:
                self._declare_late(lambda late: late == rank)
        return found

    def hold(self, number: int) -> None:
        """Let the first ``number`` entries of the log hold at every step; on all members, between the same two."""
        with self.reaching_store():
            self._log.fold(self._store, number)

    def position(self) -> dict[str, Any]:
        """Return where this rank is among the meetings and calls of the run, as numbers by name."""
        numbers = {"meetings": self._meetings, "folded": self._log.folded, "calls": self.calls.number}
        return numbers | {"waits": dict(self._waits)}

    def take_place(self, position: Mapping[str, Any]) -> None:
        """Come to the next meeting that the donor comes to, and answer what is called for from now on."""
        with self.reaching_store():
            self._log.fold(self._store, int(position["folded"]))
        self._meetings = int(position["meetings"])
        self._waits.update(position["waits"])
        self.calls.begin_at(int(position["calls"]))
        self._joins = False

    def tell_joined(self, donor: int) -> Change | None:
        """Append that this process is whole: it is drawn from the step on that all know; return the entry.

        Raises:
            RunStopped: as :meth:`check`; also where it was declared lost meanwhile.
        """
        # this process may have been a member before, with connections and buffers of which Python finds that nobody
        # needs them when it looks for cycles: seldom, and a process may be declared lost often
        gc.collect()
        with self.reaching_store():
            cause = f"from rank {donor}"
            entry = self._log.append(self._store, JOINED, self.rank, self.incarnation, self._clock(), cause)
        self.check()
        return entry

    def clock_to_join(self, entry: Change | None) -> int:
        """Return to what one has to set its clock whose ``entry`` says that it has joined.

        It goes with the clocks of the others then, and begins none of the steps in which it is drawn too late: the step
        at which the others are, or the one before the first in which it is drawn.

        Raises:
            RunStopped: as :meth:`check`.
        """
        clock = self._clock_of_others()
        return clock if entry is None else min(clock, self._log.step_of(entry.number) - 1)

    def _clock_of_others(self) -> int:
        """Return the step at which the others are: the first that one tells from now on, as they do once a second.

        Where all stand still, what they told last.

        Raises:
            RunStopped: as :meth:`check`.
        """
        names = [self._name(rank) for rank in self._log.whole if rank != self.rank]

        def look() -> list[int]:
            return clocks_told(self._store, names)

        with self.reaching_store():
            first = look()
            found = self.poll(lambda: now if (now := look()) != first else None, time.monotonic() + 1.5 * HEARTBEAT)
        return max(found or first, default=0)

    def tell_over(self, what: str) -> None:
        """Tell those that come from now on that training is over, and ``what`` is left of it."""
        with self.reaching_store():
            self._store.set(OVER, what)

    @override
    def _look_for_guests(self, store: Store) -> None:
        """See who asks to join; the first member that is whole takes it in, one at a time."""
        while store.check([key := f"join/{self._asked + 1}"]):
            self._asking.append(Process.of(store.get(key).decode()))
            self._asked += 1
        if not self._asking:
            return
        self._asking = [guest for guest in self._asking if self._waits_still(store, guest)]
        is_donor = self.rank == self._log.whole[0]
        self.guest = next((g for g in self._asking if g.rank not in self._log.present), None) if is_donor else None

    def _waits_still(self, store: Store, guest: Process) -> bool:
        is_new = guest.incarnation > self._log.incarnation(guest.rank)
        return is_new and self._runs(store, str(guest)) and not self._is_gone(store, str(guest))
