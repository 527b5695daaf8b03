"""Who trains in a loop of one's own: the ranks of a process group, or members of a run, which may die and come back.

Members go by the protocol of :mod:`~lightning_gossip.control.members`. What a plain loop adds to it:

==================================  ===================================================================================
a process comes to its seat         what it does
==================================  ===================================================================================
as its first, in time               meets those that have come by then; all take the first one's parameters
for one that was lost               asks; loads the donor's module and clock, and hands what ``state`` returned there to
                                    the loop; its first step tells that it is whole, and takes the others' clock
when training is over               is told so, and ends with exit code 0
==================================  ===================================================================================

**Who joins comes to every meeting of its donor.** The donor takes it in where its next step begins: meetings before
that step are over for both, and the others wait at the next one until the joiner has come, so that none of them is past
that one's step. The first step of a joiner is the one at which the others are, or one before it: it passes none after
which they meet, and a loop that meets at certain steps, by ``Gossip.steps``, has the same meetings on all.

==================================  ===================================================================================
one is lost                         the others
==================================  ===================================================================================
in an exchange                      skip it: :mod:`~lightning_gossip.control.members` has every point of a step
at a meeting, in a collective       make a group of those that are left, and repeat what failed
as a donor                          the next one serves: the joiner gives its number up, and asks again
as a joiner                         go on; another process may come to its seat
and fewer than ``min_replicas``     end, each with the same text, which says who is missing and why
are left
but lives: it was cut off           go on; it raises ``SeatLost`` at its next step, and may come to its seat anew
==================================  ===================================================================================
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, distributed_c10d
from typing_extensions import override

from lightning_gossip.arguments import check_integer
from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import MemberControl, RunOver, Survival, check_lost_after
from lightning_gossip.control.members import Change
from lightning_gossip.control.run import Control
from lightning_gossip.control.together import together
from lightning_gossip.exchange.models import over
from lightning_gossip.transport.group import OwnGroup
from lightning_gossip.transport.handover import Donor, check_travels, state_of

T = TypeVar("T")

_made = itertools.count()
"""Runs of this process on stores of process groups, the same number on all ranks: each has keys of its own there."""


@dataclass(frozen=True)
class Seat:
    """Where this process is in a run.

    Attributes:
        connect: makes connections to the run's store, under a prefix of the run.
        rank: of this process.
        world_size: number of ranks.
    """

    connect: Callable[[], Store]
    rank: int
    world_size: int

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup | None,
        store: Store | None,
        rank: int | None,
        world_size: int | None,
        survives: bool,
    ) -> Seat:
        """Return that in a process group, None for the default one, or on a store that holds no other run.

        Raises:
            RuntimeError: if there is neither.
            ValueError: for an argument that is not allowed.
        """
        if store is not None:
            if group is not None:
                raise ValueError("give `store` or `process_group`, not both: ranks are those of one of them")
            if not survives:
                raise ValueError("`store` needs `min_replicas`; without it give that store to `init_process_group`")
            size = check_integer("world_size", world_size, low=1, why="with `store`")
            own = check_integer("rank", rank, low=0, high=size - 1, why="with `store`")
            return cls(_connections(store, "lightning_gossip/plain"), own, size)
        if rank is not None or world_size is not None:
            raise ValueError(f"`rank` and `world_size` go with `store`, got {rank!r} and {world_size!r} without one")
        if not dist.is_initialized():
            raise RuntimeError("there is no process group: call `torch.distributed.init_process_group` first")
        own, size = dist.get_rank(group), dist.get_world_size(group)
        if own < 0:
            raise ValueError("`process_group` must be one that this rank is a member of")
        store = distributed_c10d._get_process_group_store(group or distributed_c10d._get_default_group())
        return cls(_connections(store, f"lightning_gossip/plain/{next(_made)}"), own, size)


def _connections(store: Store, prefix: str) -> Callable[[], Store]:
    return lambda: PrefixStore(prefix, store.clone())


def survival_of(min_replicas: int | None, lost_after: timedelta) -> Survival | None:
    """Return how a run goes on without ranks that it loses; None where it does not.

    Raises:
        ValueError: for an argument that is not allowed.
    """
    check_lost_after(lost_after)
    return None if min_replicas is None else Survival(check_integer("min_replicas", min_replicas, low=1), lost_after)


class GroupRun:
    """The ranks of a process group, as one of them sees them: the first that is lost ends the run.

    Args:
        seat: of this process.
        group: its process group; None for the default one.
        timeout: how long a rank waits for one that gives no sign of life.
        clock: returns the step at which this rank is.
    """

    def __init__(
        self, seat: Seat, group: dist.ProcessGroup | None, timeout: timedelta, clock: Callable[[], int]
    ) -> None:
        self.members = tuple(range(seat.world_size))
        """The ranks that met last."""
        self.control = Control(seat.connect, seat.rank, seat.world_size, timeout, clock=clock)
        self._over = group

    @property
    def incarnation(self) -> int:
        """Of this process."""
        return 0

    @property
    def members_at(self) -> Callable[[int], tuple[int, ...]] | None:
        """Returns among whom the round of a step is drawn; None for all, always."""
        return None

    def come(self) -> dict[str, Any] | None:
        """Come to the run, before anything else; return a donor's state where this process joins others."""
        return None

    def meet(self, reason: str) -> Meeting:
        """Wait for all others; see :meth:`Control.meet`."""
        return self.control.meet(reason)

    def together(self, meet: Callable[[], Meeting], attempt: Callable[[], T]) -> T:
        """Call ``meet``, and return what ``attempt`` does, a collective; both again where one is lost in it."""
        meet()
        with over(self._over):
            return attempt()

    def between_steps(self, align: Callable[[int], None], state: Callable[[], dict[str, Any]]) -> None:
        """Do what comes before each step.

        Args:
            align: sets this rank's clock forward.
            state: returns what one that joins takes over from this rank.
        """

    def tell(self, error: BaseException) -> None:
        """Tell the others what ends this rank."""
        self.control.stop("error", _words(error), lost=getattr(error, "partner", -1))

    def tell_over(self) -> None:
        """Tell those that come from now on that training is over."""

    def close(self) -> None:
        """Leave the run."""
        self.control.close()


class MembersRun(GroupRun):
    """Members of a run, as one of them sees them: it goes on without those it loses, and takes in who comes for them.

    Args:
        seat: of this process.
        survival: how the run goes on.
        timeout: how long those of the beginning wait for each other, and any wait in a collective.
        clock: returns the step at which this rank is.

    Raises:
        ValueError: for more ``min_replicas`` than there are ranks.
    """

    control: MemberControl

    def __init__(self, seat: Seat, survival: Survival, timeout: timedelta, clock: Callable[[], int]) -> None:
        check_integer("min_replicas", survival.min_replicas, low=1, high=seat.world_size, why="the number of ranks")
        self.members = tuple(range(seat.world_size))
        self._seat, self._survival, self._timeout, self._clock = seat, survival, timeout, clock
        self._store = seat.connect()
        self._group = OwnGroup(seat.rank)
        self._comes_from = -1  # its donor, from its coming to a seat that was lost to its first step
        self._has_begun = False
        self._take_seat()

    def _take_seat(self) -> None:
        """Be the next process of this rank: one of those of the beginning, or one that joins them.

        Raises:
            SeatTaken: if another process is there.
            SystemExit: if training is over.
        """
        seat = self._seat
        try:
            incarnation = claim_seat(self._store, seat.rank, seat.world_size, self._survival)
        except RunOver as ended:
            raise self._too_late(ended) from None
        self.control = MemberControl(
            seat.connect,
            seat.rank,
            seat.world_size,
            self._timeout,
            self._survival,
            incarnation,
            on_loss=self._wake,
            clock=self._clock,
        )
        self._donor = Donor(self.control, self._store)

    def _too_late(self, ended: RunOver) -> SystemExit:
        print(f"rank {self._seat.rank}: {ended}", file=sys.stderr)
        return SystemExit(0)

    def _wake(self, change: Change) -> None:
        if change.ends:
            self._group.wake(change.seat)

    @property
    @override
    def incarnation(self) -> int:
        return self.control.incarnation

    @property
    @override
    def members_at(self) -> Callable[[int], tuple[int, ...]]:
        return self.control.members_at

    @override
    def come(self) -> dict[str, Any] | None:
        """Meet those of the beginning, or return what a donor gives.

        Raises:
            RunStopped: if too few are there.
            SystemExit: if training is over.
        """
        if self.incarnation == 0:
            self.members = self.control.begin(self._timeout.total_seconds()).members
            return None
        while (given := self._ask()) is None:
            self.control.leave("its donor was lost, or what it sent was torn: it asks again")
            self.control.close()
            self._take_seat()
        self.members = tuple(given.pop("members"))
        self.control.take_place(given.pop("position"))
        return given

    def _ask(self) -> dict[str, Any] | None:
        """Return a donor's state; None where it was lost, or what came was not whole."""
        try:
            self.control.ask()
            donor = self.control.await_donor()
            self._comes_from = donor.rank
            return state_of(donor, self.control, self._store)
        except RunOver as ended:
            raise self._too_late(ended) from None

    @override
    def meet(self, reason: str) -> Meeting:
        meeting = super().meet(reason)
        self.members = meeting.members
        return meeting

    @override
    def together(self, meet: Callable[[], Meeting], attempt: Callable[[], T]) -> T:
        def once(meeting: Meeting) -> T:
            with self._group.collective():
                has_lost = partial(self.control.has_lost, meeting)
                self._group.follow(meeting, self._store, has_lost, self._timeout)
                with over(self._group.group):
                    return attempt()

        return together(self.control, meet, once)

    @override
    def between_steps(self, align: Callable[[int], None], state: Callable[[], dict[str, Any]]) -> None:
        """Become whole before the first step of one that joins; take in the one that asks, before any other.

        Raises:
            ValueError: before the first step, if what ``state`` returns does not travel.
        """
        if not self._has_begun:
            self._has_begun = True
            check_travels("state", state()["state"])
        if self._comes_from >= 0:
            clock = self.control.clock_to_join(self.control.tell_joined(self._comes_from))
            self._comes_from = -1
            align(clock - 1)  # the others may be through with step `clock`, and about to meet after it
        elif self.control.guest is not None and (entry := self.control.take_in()) is not None:
            place = {"position": self.control.position(), "members": list(self.members)}
            self._donor.serve((entry.seat, entry.incarnation), self._clock(), state() | place)

    @override
    def tell(self, error: BaseException) -> None:
        """Leave, and let the others go on; Ctrl-C ends the run."""
        if isinstance(error, KeyboardInterrupt):
            self.control.stop("SIGINT", "it received SIGINT")
        else:
            self.control.leave(_words(error))

    @override
    def tell_over(self) -> None:
        self.control.tell_over(f"it ended at step {self._clock():,}")

    @override
    def close(self) -> None:
        self._donor.close()
        self._group.destroy()
        super().close()


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
