"""The Lightning glue of schemes in which partners exchange snapshots and mix."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import DistNetworkError, DistStoreError, Store
from typing_extensions import override

from lightning_gossip.arguments import check_choice, check_integer
from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.models import has_told_trained, tell_trained
from lightning_gossip.rules.mixing import MixingRule
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Chooser, Peers, Schedule
from lightning_gossip.strategies.clocked import ClockedStrategy, Parameters
from lightning_gossip.transport.interface import PartnerLost, Transport
from lightning_gossip.transport.link import LayoutMismatch
from lightning_gossip.transport.link_transport import LinkTransport
from lightning_gossip.transport.nccl import NcclTransport


class PairwiseStrategy(ClockedStrategy[Exchange]):
    """Replicas exchange snapshots by a schedule and mix by a rule.

    Args:
        rule: what choices mean and how much of a difference is taken over.
        probability, period, peers, seed: see :class:`~lightning_gossip.rules.schedule.Schedule`.
        delay: steps from posting an exchange to applying it, from 0 to ``period - 1``.
        shared_memory: whether ranks on one host read each other's snapshots where they were written.
        outer: the step that a rank makes with a round's drift before it exchanges; None without.
        launch: see :class:`~lightning_gossip.strategies.clocked.ClockedStrategy`.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(
        self,
        *,
        rule: MixingRule,
        probability: float,
        period: int,
        peers: str | Peers | Chooser,
        delay: int,
        seed: int,
        timeout: timedelta,
        shared_memory: bool,
        outer: OuterStep | None = None,
        **launch: Any,
    ) -> None:
        self.schedule = Schedule(peers, probability, period, seed)
        self.delay = check_integer("delay", delay, low=0, high=period - 1, why="at most period - 1")
        self.shared_memory = check_choice("shared_memory", shared_memory, (True, False))
        self.rule = rule
        self.outer = outer
        self._peers_argument = peers
        self._store: Store | None = None  # of the run, in a `fit`
        super().__init__(timeout=timeout, **launch)

    @property
    @override
    def hyperparameters(self) -> dict[str, Any]:
        peers = self._peers_argument
        return {
            "probability": self.schedule.probability,
            "period": self.schedule.period,
            "peers": peers if isinstance(peers, str) else repr(peers),
            "delay": self.delay,
            "shared_memory": self.shared_memory,
            "seed": self.schedule.seed,
            **super().hyperparameters,
        }

    @property
    @override
    def round_every(self) -> int:
        return self.schedule.period

    @override
    def make_exchange(self, parameters: Parameters, control: Control, store: Store) -> Exchange:
        self._store = store
        members = control.members_at if isinstance(control, MemberControl) else None
        exchange = Exchange(
            self.global_rank,
            self.world_size,
            self.schedule,
            self.rule,
            self._make_transport(control, store),
            parameters,
            delay=self.delay,
            wire_dtype=self.wire_dtype,
            outer=self.outer,
            members=members,
            nonfinite=self.nonfinite,
        )
        exchange.on_heal = self.begin_optimizers_anew
        return exchange

    def _make_transport(self, control: Control, store: Store) -> Transport:
        if self.process_group_backend == "nccl" and self.world_size > 1:
            group: Any = dist.new_group(backend="nccl")
            return NcclTransport(group, self.root_device)
        return LinkTransport(
            self.make_links(control, store), control, self.shared_memory, pin_memory=self.root_device.type != "cpu"
        )

    @override
    def begin_step(self) -> None:
        try:
            self._running.begin()
        except PartnerLost as error:
            self._explain(error)
            raise

    @override
    def end_step(self) -> None:
        try:
            self._running.end()
        except PartnerLost as error:
            self._explain(error)
            raise

    def _explain(self, lost: PartnerLost) -> None:
        """Raise which parameters they are where partners find that they train others."""
        differs = isinstance(lost.__cause__, LayoutMismatch)
        if (store := self._store) is not None and (differs or _is_asked(store, lost, self.step)):
            raise RuntimeError(tell_trained(store, self.control, self._module, lost.partner, self.step)) from lost

    @override
    def end_training(self) -> None:
        self._store = None
        super().end_training()


def _is_asked(store: Store, lost: PartnerLost, step: int) -> bool:
    """Whether a partner that closed its link found that the two train other parameters."""
    try:
        return has_told_trained(store, lost.partner, step)
    except (DistNetworkError, DistStoreError):
        return False  # the store is gone, and with it whoever held it: that is the cause
