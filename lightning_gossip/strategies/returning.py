"""Processes that come back: a rank takes in those that join, or joins itself (design §10, under Lightning)."""

from __future__ import annotations

import logging
import os
import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from typing_extensions import override

from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.member_control import MemberControl, RunOver, Survival
from lightning_gossip.control.members import Change
from lightning_gossip.control.stop import SeatLost
from lightning_gossip.strategies import lightning_counts, lightning_dealing, lightning_members
from lightning_gossip.strategies.joined_epoch import Stand, TrainingData, place_among
from lightning_gossip.strategies.joining import Beginning, Joiner
from lightning_gossip.strategies.lightning_names import pl
from lightning_gossip.strategies.meeting import TIMEOUT
from lightning_gossip.strategies.surviving import SurvivingStrategy
from lightning_gossip.transport.handover import Donor

T = TypeVar("T")

log = logging.getLogger(__name__)


class ReturningStrategy(SurvivingStrategy):
    """Ranks that go on without those that they lose, and take in who comes for a lost one.

    Args:
        launch: see :class:`~lightning_gossip.strategies.surviving.SurvivingStrategy`.
    """

    def __init__(self, **launch: Any) -> None:
        self._dealt: tuple[int, ...] = ()  # among whom the present epoch's data is
        self._joiner: Joiner | None = None  # from its coming to a seat that was lost to its first step
        self._donor: Donor | None = None
        self._beginning = Beginning()  # what was agreed on, up to the first step
        self._data = TrainingData()
        self._has_begun = False  # whether this rank has begun its first step
        super().__init__(**launch)

    @property
    def is_joining(self) -> bool:
        """Whether this process has come to a seat that was lost, and has not begun its first step."""
        return self._joiner is not None

    @property
    @override
    def is_global_zero(self) -> bool:
        return not self.is_joining and super().is_global_zero

    def dealt_among(self) -> object:
        """Return what tells among whom data is dealt that is loaded now: equal on all where it is the same."""
        return "another's" if self.is_joining else (self.members, self._incarnations)

    # -- start ------------------------------------------------------------------------------------------------------

    @override
    def _take_seat(self, survival: Survival) -> tuple[MemberControl, int]:
        """Take part as the next process of this rank: as one of those of the beginning, or to join them."""
        self._survival, self._has_begun, self._beginning = survival, False, Beginning()
        try:
            return self._take_part(survival, claim_seat(self._group_store, self.global_rank, self.world_size, survival))
        except RunOver as over:
            raise self._too_late(over) from None

    def _take_part(self, survival: Survival, incarnation: int) -> tuple[MemberControl, int]:
        """Take part as that process of this rank; raises ``RunOver`` where training ends before it has joined."""
        control = self._take_control(MemberControl, survival, incarnation, on_loss=self._on_loss)
        self._donor = Donor(control, self._group_store)
        self._joiner = None
        if incarnation > 0:
            self._joiner = Joiner(control, self._group_store)
            self._members = (*control.members, self.global_rank)
            lightning_members.be_no_rank_zero(self.global_rank)
            os.environ.update(self._joiner.beginning.environment)
            self._group.be_alone(f"of {self.global_rank}.{incarnation}", self._group_store, self._timeout or TIMEOUT)
            if (trainer := self._trainer) is not None:
                lightning_members.resume_from(trainer, self._state_of_donor)
        return control, incarnation

    def _too_late(self, over: RunOver) -> SystemExit:
        print(f"rank {self.global_rank}: the training is over; {over.left}", file=sys.stderr)
        return SystemExit(0)

    # -- joining, and taking in -----------------------------------------------------------------------------------

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return by name what a process has to have in common with those that it joins."""

    @abstractmethod
    def state_to_join(self) -> dict[str, Any]:
        """Return what one that joins takes from this rank, between two steps: its whole checkpoint."""

    @abstractmethod
    def take_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Take over what :meth:`state_to_join` returned on the donor; return the checkpoint that Lightning loads."""

    @abstractmethod
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
            self._take_seat(self._survival)
        else:
            raise RuntimeError("the seat was lost before it was joined")
        joiner.control.take_place(state["position"])
        joiner.stand = Stand(state["taken"], tuple(state["lengths"]))
        self._dealt = self._members = place_among(self.global_rank, state["dealt"])
        joiner.beginning.gathered.update(state["gathered"])
        return self.take_state(state)

    def leave_to_come_again(self, lost: SeatLost, trainer: pl.Trainer) -> None:
        """Give up all that this process has in a ``fit``, in which the others have declared it lost."""
        log.warning("%s; it joins them anew", str(lost))  # a record that is kept must not keep what the error holds
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
        else:
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
        state |= {"taken": lightning_counts.counts_of(self._module.trainer).batches, "lengths": list(self._lengths())}
        self._donor.serve((entry.seat, entry.incarnation), self.step, state)

    def _lengths(self) -> tuple[int | None, ...]:
        """Return how many batches each loader of training has, where that is known and holds for this epoch."""
        return self._data.lengths()

    def _tell_over(self) -> None:
        """Tell those that come from now on that training is over. Each rank does, for the others may be lost."""
        if (control := self._member_control) is not None and not self.is_joining:
            control.tell_over(self._what_is_left())

    def _what_is_left(self) -> str:
        """Return in words what a training has left, for those that come when it is over."""
        return "no checkpoint was saved"

    # -- data -----------------------------------------------------------------------------------------------------

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        super().barrier(name, *args, **kwargs)
        if name == lightning_dealing.LOADING:
            self._data.begin_loading()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        loader = super().process_dataloader(dataloader)
        if self._trainer is None or not self._trainer.training:
            return loader
        return self._data.take(loader, None if self._joiner is None else self._joiner.stand)

    def _note_dealing(self) -> None:
        """Called when the training's data was dealt."""
        self._dealt = self.members

    # -- meetings, of which a joiner has none -----------------------------------------------------------------------

    @override
    def _meet(self, reason: str) -> None:
        if self._joiner is not None:
            self._joiner.control.check()
        else:
            super()._meet(reason)

    @override
    def _await_all(self, reason: str, follow: Callable[[str], None]) -> None:
        if self.is_joining:  # its donor had batches left that others have trained by now
            self._begin_first_step()
        super()._await_all(reason, follow)

    @override
    def _together(self, reason: str, attempt: Callable[[], T]) -> T:
        if self._joiner is None:
            return super()._together(reason, attempt)
        self._joiner.control.check()
        return attempt()

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
    def teardown(self) -> None:
        if self._donor is not None:
            self._donor.close()
        self._donor = self._joiner = None
        self._data.begin_loading()
        super().teardown()

    @override
    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_joiner": None, "_donor": None, "_data": TrainingData()}
