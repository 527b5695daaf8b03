"""Runs that go on without the ranks that they lose, under Lightning (design §10; the protocol is in ``control``)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
from typing_extensions import override

from lightning_gossip.arguments import check_choice, check_integer, check_timeout
from lightning_gossip.control import store as run_store
from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import LOST_AFTER, MemberControl, RunOver, Survival
from lightning_gossip.control.members import Change
from lightning_gossip.control.run import HEARTBEAT
from lightning_gossip.control.stop import SeatLost
from lightning_gossip.control.together import together
from lightning_gossip.exchange.stats import NONFINITE, NonFinite
from lightning_gossip.strategies import lightning_members
from lightning_gossip.strategies.joining import Beginning, Donor, Joiner
from lightning_gossip.strategies.launchers import ReplicaSubprocessLauncher
from lightning_gossip.strategies.lightning_names import MisconfigurationException, pl
from lightning_gossip.strategies.meeting import START_TIMEOUT, TIMEOUT, MeetingStrategy
from lightning_gossip.transport.group import DefaultGroup

__all__ = ["LOST_AFTER", "NonFinite", "SurvivingStrategy"]

T = TypeVar("T")

log = logging.getLogger(__name__)

_groups: list[DefaultGroup] = []
"""The default group of this process, once a run with members has made it; at most one."""


class SurvivingStrategy(MeetingStrategy):
    """Ranks that meet, of which the run may lose some: with ``min_replicas`` those that are left go on.

    Args:
        min_replicas: the run begins with so many ranks at least, once the time to start is over, and goes on as long as
            so many are left; None ends it with the first that is lost.
        restarts: how often the launchers of this package start each lost rank's process again, which then joins.
        lost_after: a rank that gives no sign of life for so long is lost, where there is ``min_replicas``.
        nonfinite: what becomes of a replica with NaN or infinite parameters: ``"heal"`` lets it take a partner's,
            ``"error"`` ends its rank; None is ``"heal"`` with ``min_replicas``, and else ``"error"``.
        launch: as for Lightning's ``DDPStrategy``.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(
        self,
        *,
        min_replicas: int | None,
        restarts: int,
        lost_after: timedelta,
        nonfinite: NonFinite | None,
        process_group_backend: str | None,
        **launch: Any,
    ) -> None:
        self.min_replicas = None if min_replicas is None else check_integer("min_replicas", min_replicas, low=1)
        self.restarts = check_integer("restarts", restarts, low=0)
        if restarts and min_replicas is None:
            raise ValueError(
                f"`restarts` must be 0 without `min_replicas`, got {restarts}: without it the first loss ends the run"
            )
        self.lost_after = check_timeout("lost_after", lost_after)
        if (seconds := lost_after.total_seconds()) <= 2 * HEARTBEAT:
            raise ValueError(f"`lost_after` must be more than {2 * HEARTBEAT:g} s, two heartbeats, got {seconds:g} s")
        check_choice("nonfinite", nonfinite, (None, *NONFINITE))
        self.nonfinite: NonFinite = nonfinite or ("error" if min_replicas is None else "heal")
        if min_replicas is not None and process_group_backend == "nccl":
            raise ValueError(_NO_NCCL)
        self._ends_run = False  # whether what ends this rank ends the others too
        self._members: tuple[int, ...] = ()  # those that have met last; none before any have
        self._incarnations: tuple[int, ...] = ()  # theirs
        self._dealt: tuple[int, ...] = ()  # among whom the present epoch's data is
        self._joiner: Joiner | None = None  # from its coming to a seat that was lost to its first step
        self._donor: Donor | None = None
        self._beginning = Beginning()  # what was agreed on, up to the first step
        self._has_begun = False  # whether this rank has begun its first step
        self._comes_again = False  # whether this process was in this call of the Trainer before, and was lost
        super().__init__(process_group_backend=process_group_backend, **launch)

    # -- who is there ---------------------------------------------------------------------------------------------

    @property
    @override
    def survives(self) -> bool:
        return self.min_replicas is not None

    @property
    def _member_control(self) -> MemberControl | None:
        """The control of a run that goes on without those that it loses; None outside of one."""
        return self._control if isinstance(self._control, MemberControl) else None

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part, as of the last meeting: all, where none is lost; who joined later comes last."""
        return self._members or tuple(range(self.world_size))

    @property
    def lost(self) -> int:
        """How many ranks the run has lost, as far as this rank knows."""
        control = self._member_control
        return self.world_size - len(self.members) if control is None else control.lost

    @property
    def joined(self) -> int:
        """How many processes have joined the run, as far as this rank knows."""
        return 0 if (control := self._member_control) is None else control.joined

    @property
    def changes(self) -> tuple[Change, ...]:
        """Which ranks were lost or joined, when and how, as far as this rank knows; none outside a Trainer's call."""
        return () if (control := self._member_control) is None else control.changes

    @property
    @override
    def is_global_zero(self) -> bool:
        """Whether this rank has rank 0's duties: the first of the members."""
        return bool(self.global_rank == self.members[0])

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        members = self.members if self._joiner is None else self._joiner.dealt
        index = members.index(self.global_rank) if self.global_rank in members else self.global_rank % len(members)
        return {"num_replicas": len(members), "rank": index}

    def dealt_among(self) -> object:
        """Return what tells among whom data is dealt that is loaded now: equal on all where it is the same."""
        return "another's" if self._joiner is not None else (self.members, self._incarnations)

    # -- start ----------------------------------------------------------------------------------------------------

    @override
    def setup_distributed(self) -> None:
        self._members = ()
        if self.min_replicas is None:
            super().setup_distributed()
            return
        lightning_members.begin_ranks(self)
        check_integer("min_replicas", self.min_replicas, low=1, high=self.world_size, why="the number of ranks")
        if self._get_process_group_backend() != "gloo":
            raise MisconfigurationException(_NO_NCCL)
        self._process_group_backend = "gloo"
        environment = self.cluster_environment
        if environment is None:
            raise MisconfigurationException(f"{type(self).__name__} has no cluster environment to find the others in")
        if not self._comes_again:
            self._reach_store(run_store.reach(environment.main_address, environment.main_port))
        self._comes_again = False
        self._has_begun, self._beginning = False, Beginning()
        self._group_store = self._connect()
        control = self._take_seat()
        if self._joiner is not None:
            return
        for rank in set(range(self.world_size)).difference(self._group.members or range(self.world_size)):
            control.declare_lost(rank, "it was lost before")
        seconds = max(self._timeout or TIMEOUT, START_TIMEOUT).total_seconds()
        self._have_met(control.begin(seconds))
        self._together("the default group", _nothing)

    def _take_seat(self) -> MemberControl:
        """Take part as the next process of this rank: as one of those of the beginning, or to join them."""
        survival = Survival(self.min_replicas or 1, self.lost_after)
        try:
            incarnation = claim_seat(self._group_store, self.global_rank, self.world_size, survival)
        except RunOver as over:
            raise self._too_late(over) from None
        control = self._take_control(MemberControl, survival, incarnation, on_loss=self._on_loss)
        self._donor = Donor(control, self._group_store)
        self._joiner = None
        if incarnation > 0:
            self._joiner = Joiner(control, self._group_store)
            self._joiner.dealt = self._members = (*control.members, self.global_rank)
            lightning_members.be_no_rank_zero(self.global_rank)
            os.environ.update(self._joiner.beginning.environment)
            self._group.be_alone(f"of {self.global_rank}.{incarnation}", self._group_store, self._timeout or TIMEOUT)
            if (trainer := self._trainer) is not None:
                lightning_members.resume_from(trainer, self._state_of_donor)
        return control

    def _too_late(self, over: RunOver) -> SystemExit:
        print(f"rank {self.global_rank}: the training is over; {over.left}", file=sys.stderr)
        return SystemExit(0)

    @property
    def _group(self) -> DefaultGroup:
        if not _groups:
            _groups.append(DefaultGroup(self.global_rank))
        return _groups[0]

    def _on_loss(self, change: Change) -> None:
        if _groups and change.ends:
            _groups[0].wake(change.seat)

    # -- joining, and taking in -----------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return by name what a process has to have in common with those that it joins."""
        return {}

    def state_to_join(self) -> dict[str, Any]:
        """Return what one that joins takes from this rank, between two steps: its whole checkpoint."""
        raise MisconfigurationException(f"{type(self).__name__} takes nobody in")

    def take_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Take over what :meth:`state_to_join` returned on the donor; return the checkpoint that Lightning loads."""
        raise MisconfigurationException(f"{type(self).__name__} does not join")

    def align(self, clock: int) -> None:
        """Set the exchange clock to that of the others, before the first step."""

    def become_whole(self, control: MemberControl, donor: int) -> None:
        """Tell that this rank has joined, and let its clock go with the others', before the first step."""
        self.align(control.clock_to_join(control.tell_joined(donor)))

    def _state_of_donor(self) -> dict[str, Any]:
        while (joiner := self._joiner) is not None:
            try:
                joiner.check_identity(self.identity())
                if (state := joiner.state()) is not None:
                    break
            except RunOver as over:
                raise self._too_late(over) from None
            joiner.control.leave("its donor was lost, or what it sent was torn: it asks again")
            joiner.control.close()
            self._take_seat()
        else:
            raise RuntimeError("the seat was lost before it was joined")
        joiner.control.take_place(state["position"])
        joiner.dealt = tuple(state["dealt"])
        joiner.beginning.gathered.update(state["gathered"])
        return self.take_state(state)

    def leave_to_come_again(self, lost: SeatLost, trainer: pl.Trainer) -> None:
        """Give up all that this process has in a ``fit``, in which the others have declared it lost."""
        log.warning("%s; it joins them anew", lost)
        self.on_exception(lost)
        lightning_members.tear_down(trainer)
        self._comes_again = True

    def _begin_first_step(self) -> None:
        """Do once what comes before the first step: become whole, or tell those that come later how all began."""
        self._has_begun = True
        control = self._member_control
        if control is None:
            return
        if (joiner := self._joiner) is not None:
            self.become_whole(control, joiner.donor)
            self._beginning = joiner.beginning
            self._joiner = None
        elif self.is_global_zero:
            self._beginning.identity = self.identity()
            self._beginning.publish(self._group_store)

    def _take_in_guest(self) -> None:
        """Take in the one that asks, at the end of a step, and serve it beside training."""
        if (control := self._member_control) is not None and self.can_serve:
            self._serve(control, control.take_in())

    @property
    def can_serve(self) -> bool:
        """Whether one could go on from this rank's present state."""
        trainer = self._trainer
        return trainer is not None and self._donor is not None and lightning_members.is_between_steps(trainer)

    def _serve(self, control: MemberControl, entry: Change | None) -> None:
        """Serve the one taken in by ``entry`` this rank's state, as it is now."""
        if entry is None or self._donor is None:
            return
        self._serving = True
        try:
            state = self.state_to_join()
        finally:
            self._serving = False
        state |= {"position": control.position(), "dealt": list(self._dealt), "gathered": self._beginning.gathered}
        self._donor.serve((entry.seat, entry.incarnation), self.step, state)

    def _tell_over(self) -> None:
        """Tell those that come from now on that training is over."""
        if (control := self._member_control) is not None and self.is_global_zero:
            control.tell_over(self._what_is_left())

    def _what_is_left(self) -> str:
        """Return in words what a training has left, for those that come when it is over."""
        return "no checkpoint was saved"

    # -- meetings -------------------------------------------------------------------------------------------------

    @override
    def _meet(self, reason: str) -> None:
        if self._member_control is None:
            super()._meet(reason)
        elif self._joiner is not None:
            self._joiner.control.check()
        elif not self._group.fits(self._met(reason)):
            self._together("those that are left", _nothing)

    @override
    def _together(self, reason: str, attempt: Callable[[], T]) -> T:
        control = self._member_control
        if control is None:
            return super()._together(reason, attempt)
        if self._joiner is not None:
            control.check()
            return attempt()

        def once(meeting: Meeting) -> T:
            with self._group.collective():
                has_lost = partial(control.has_lost, meeting)
                self._group.follow(meeting, self._group_store, has_lost, self._timeout or TIMEOUT)
                return attempt()

        return together(control, lambda: self._met(reason), once)

    @override
    def broadcast(self, obj: T, src: int = 0) -> T:
        if self._joiner is not None:
            given: T = self._joiner.broadcast(obj)
            return given
        given = super().broadcast(obj, src)
        if self.survives and not self._has_begun:
            self._beginning.broadcasts.append(given)
        return given

    @override
    def gather(self, value: Any, reason: str = "gather") -> list[Any]:
        if self._joiner is not None:
            return self._joiner.gather(value, reason)
        values = super().gather(value, reason)
        if self.survives and reason != "gather" and (not self._has_begun or reason in self._beginning.gathered):
            self._beginning.gathered[reason] = values
        return values

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all ranks, or any, say so; Lightning's own counts those that began."""
        decisions = self.gather(bool(decision), "a decision")
        return bool(np.all(decisions) if all else np.any(decisions))

    @override
    def _have_met(self, meeting: Meeting) -> None:
        before = self.members
        if self._member_control is not None:
            self._members, self._incarnations = meeting.members, meeting.incarnations
        if self._members and self.members[0] != before[0] and self.is_global_zero:
            log.warning("rank %d takes over the duties of rank %d", self.global_rank, before[0])
            lightning_members.take_over_from_rank_zero(self._trainer)
        super()._have_met(meeting)

    # -- endings --------------------------------------------------------------------------------------------------

    @property
    def _launches(self) -> bool:
        """Whether this process has started the others of its host."""
        return isinstance(self._launcher, ReplicaSubprocessLauncher) and bool(self._launcher.procs)

    @property
    def has_left(self) -> bool:
        """Whether this rank takes part no more, and the others go on."""
        return (control := self._member_control) is not None and control.declared is not None

    @override
    def _report_child(self, rank: int, how: str) -> bool:
        if (control := self._member_control) is not None:
            control.declare_lost(rank, how)
            return True
        return super()._report_child(rank, how)

    @override
    def teardown(self) -> None:
        if self._donor is not None:
            self._donor.close()
        self._donor = self._joiner = None
        super().teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._ends_run = getattr(exception, "ends_run", False)
        super().on_exception(exception)

    @override
    def _tell_ending(self, kind: str, cause: str, lost: int) -> None:
        """Leave, and let the others go on; Ctrl-C, and SIGTERM on the launching process, end the run."""
        control = self._member_control
        ends_alone = kind == "error" or (kind == "SIGTERM" and not self._launches)
        if control is not None and ends_alone and not self._ends_run:
            control.leave(cause)
            if self._launches and isinstance(self._launcher, ReplicaSubprocessLauncher):
                self._launcher.left = True
        else:
            super()._tell_ending(kind, cause, lost)

    @override
    def __getstate__(self) -> dict:
        kept = super().__getstate__()
        return kept | {"_members": (), "_group_store": None, "_joiner": None, "_donor": None}


_NO_NCCL = (
    "`min_replicas` needs gloo: NCCL's waits do not end where a rank is lost. Set `process_group_backend='gloo'`, which"
    " works on CUDA too"
)


def _nothing() -> None:
    pass
