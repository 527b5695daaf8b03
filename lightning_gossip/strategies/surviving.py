"""Runs that go on without the ranks that they lose, under Lightning (design §10; the protocol is in ``control``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
from typing_extensions import override

from lightning_gossip.arguments import check_choice, check_integer
from lightning_gossip.control import store as run_store
from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import LOST_AFTER, MemberControl, Survival, check_lost_after
from lightning_gossip.control.members import Change
from lightning_gossip.control.together import together
from lightning_gossip.exchange.stats import NONFINITE, NonFinite
from lightning_gossip.strategies import lightning_members
from lightning_gossip.strategies.launchers import ReplicaSubprocessLauncher
from lightning_gossip.strategies.lightning_names import MisconfigurationException
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
        self.lost_after = check_lost_after(lost_after)
        check_choice("nonfinite", nonfinite, (None, *NONFINITE))
        self.nonfinite: NonFinite = nonfinite or ("error" if min_replicas is None else "heal")
        if min_replicas is not None and process_group_backend == "nccl":
            raise ValueError(_NO_NCCL)
        self._ends_run = False  # whether what ends this rank ends the others too
        self._members: tuple[int, ...] = ()  # those that have met last; none before any have
        self._incarnations: tuple[int, ...] = ()  # theirs
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
        return {"num_replicas": len(self.members), "rank": self.members.index(self.global_rank)}

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
        self._group_store = self._connect()
        control, incarnation = self._take_seat(Survival(self.min_replicas, self.lost_after))
        if incarnation > 0:
            return
        for rank in set(range(self.world_size)).difference(self._group.members or range(self.world_size)):
            control.declare_lost(rank, "it was lost before")
        seconds = max(self._timeout or TIMEOUT, START_TIMEOUT).total_seconds()
        self._have_met(control.begin(seconds))
        self._together("the default group", _nothing)

    def _take_seat(self, survival: Survival) -> tuple[MemberControl, int]:
        """Take part as one of those of the beginning; return control, and which process of its rank this is."""
        return self._take_control(MemberControl, survival, on_loss=self._on_loss), 0

    @property
    def _group(self) -> DefaultGroup:
        if not _groups:
            _groups.append(DefaultGroup(self.global_rank))
        return _groups[0]

    def _on_loss(self, change: Change) -> None:
        if _groups and change.ends:
            _groups[0].wake(change.seat)

    # -- meetings -------------------------------------------------------------------------------------------------

    @override
    def _meet(self, reason: str) -> None:
        if self._member_control is None:
            super()._meet(reason)
        elif not self._group.fits(self._met(reason)):
            self._together("those that are left", _nothing)

    @override
    def _together(self, reason: str, attempt: Callable[[], T]) -> T:
        control = self._member_control
        if control is None:
            return super()._together(reason, attempt)

        def once(meeting: Meeting) -> T:
            with self._group.collective():
                has_lost = partial(control.has_lost, meeting)
                self._group.follow(meeting, self._group_store, has_lost, self._timeout or TIMEOUT)
                return attempt()

        return together(control, lambda: self._met(reason), once)

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
        return super().__getstate__() | {"_members": (), "_group_store": None}


_NO_NCCL = (
    "`min_replicas` needs gloo: NCCL's waits do not end where a rank is lost. Set `process_group_backend='gloo'`, which"
    " works on CUDA too"
)


def _nothing() -> None:
    pass
