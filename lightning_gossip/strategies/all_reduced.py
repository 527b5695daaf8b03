"""The Lightning glue of schemes in which all replicas meet in one start once a round, by an all-reduce."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import Store
from typing_extensions import override

from lightning_gossip.arguments import check_integer
from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.run import Control
from lightning_gossip.control.taking_in import TAKING_IN, take_in_together
from lightning_gossip.control.votes import Votes
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.strategies.clocked import ClockedStrategy, Parameters
from lightning_gossip.strategies.lightning_names import MisconfigurationException
from lightning_gossip.transport.all_reduce import AllReduce, LinkAllReduce
from lightning_gossip.transport.voted_all_reduce import VotedAllReduce


class AllReducedStrategy(ClockedStrategy[Rounds]):
    """Replicas train for a round on their own, then all begin the next from one start.

    Args:
        outer: the step made with the mean of what they drifted.
        period: steps from one round to the next, at least 1.
        delay: steps from posting a round to applying it, from 0 to ``period - 1``.
        fragments: parts of the model with rounds of their own, from 1 to ``period``.
        launch: see :class:`~lightning_gossip.strategies.clocked.ClockedStrategy`.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(
        self,
        *,
        outer: OuterStep,
        period: int,
        delay: int,
        fragments: int,
        timeout: timedelta,
        **launch: Any,
    ) -> None:
        self.outer = outer
        self.period = check_integer("period", period, low=1)
        self.delay = check_integer("delay", delay, low=0, high=period - 1, why="at most period - 1")
        self.fragments = check_integer("fragments", fragments, low=1, high=period, why="at most period")
        super().__init__(timeout=timeout, **launch)

    @property
    @override
    def hyperparameters(self) -> dict[str, Any]:
        return {
            "period": self.period,
            "delay": self.delay,
            "fragments": self.fragments,
            **super().hyperparameters,
        }

    @property
    @override
    def round_every(self) -> int:
        return max(1, self.period // self.fragments)

    @override
    def make_exchange(self, parameters: Parameters, control: Control, store: Store) -> Rounds:
        if self.process_group_backend == "nccl" and self.world_size > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} does not use NCCL yet; set `process_group_backend='gloo'`, which goes through"
                " pinned host memory."
            )
        links = self.make_links(control, store)
        reducer: AllReduce
        if isinstance(control, MemberControl):
            reducer, members = VotedAllReduce(links, control, Votes(store, control)), control.all_at
        else:
            reducer, members = LinkAllReduce(links, control), None
        rounds = Rounds(
            self.global_rank,
            self.world_size,
            self.period,
            self.outer,
            reducer,
            parameters,
            delay=self.delay,
            fragments=self.fragments,
            wire_dtype=self.wire_dtype,
            members=members,
            nonfinite=self.nonfinite,
        )
        rounds.on_heal = self.begin_optimizers_anew
        return rounds

    # -- joining, and taking in: all together (see ``control.taking_in``) -----------------------------------------

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._acts = {**self._acts, TAKING_IN: self._take_in_together}

    @override
    def become_whole(self, control: MemberControl, donor: int) -> None:
        """Tell that this rank has joined; its clock is its donor's: no round may be left out."""
        control.tell_joined(donor)

    @override
    def _take_in_guest(self) -> None:
        if self.can_serve:
            self.control.calls.wish(TAKING_IN)

    def _take_in_together(self) -> None:
        self._meet(TAKING_IN)
        self.control.calls.finish(TAKING_IN)
        if (control := self._member_control) is not None:
            self._serve(control, take_in_together(control, self.can_serve))
