"""The Lightning glue of schemes in which partners exchange snapshots and mix."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import DistNetworkError, DistStoreError, Store
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gossip.arguments import check_choice, check_integer
from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.asynchronous import AsynchronousExchange
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.models import has_told_trained, tell_trained
from lightning_gossip.rules.mixing import MixingRule
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Chooser, Peers, Schedule
from lightning_gossip.strategies import lightning_compat
from lightning_gossip.strategies.clocked import ClockedStrategy, Parameters
from lightning_gossip.strategies.lightning_names import MisconfigurationException, pl
from lightning_gossip.strategies.update_hooks import BeforeUpdates
from lightning_gossip.transport.header import LayoutMismatch
from lightning_gossip.transport.interface import PartnerLost, Transport
from lightning_gossip.transport.link_transport import LinkTransport
from lightning_gossip.transport.nccl import NcclTransport


class PairwiseStrategy(ClockedStrategy[Exchange | AsynchronousExchange]):
    """Replicas exchange snapshots by a schedule and mix by a rule.

    Args:
        rule: what choices mean and how much of a difference is taken over.
        probability, period, peers, seed: see :class:`~lightning_gossip.rules.schedule.Schedule`.
        delay: steps from posting an exchange to applying it, from 0 to ``period - 1``.
        shared_memory: whether ranks on one host read each other's snapshots where they were written.
        outer: the step that a rank makes with a round's drift before it exchanges; None without.
        asynchronous: whether ranks exchange at their own pace, and wait for nobody.
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
        asynchronous: bool,
        process_group_backend: str | None,
        outer: OuterStep | None = None,
        **launch: Any,
    ) -> None:
        self.schedule = Schedule(peers, probability, period, seed)
        self.delay = check_integer("delay", delay, low=0, high=period - 1, why="at most period - 1")
        self.asynchronous = check_choice("asynchronous", asynchronous, (True, False))
        if asynchronous and delay:
            raise ValueError(
                f"`delay` must be 0 with `asynchronous=True`, got {delay}: nobody waits for an exchange, and it is"
                " applied at the end of the step in which it is complete, however many steps that takes"
            )
        if asynchronous and process_group_backend == "nccl":
            raise ValueError(_NO_NCCL)
        self.steps_go_together = not asynchronous
        self._before_updates: BeforeUpdates | None = None  # in a `fit` that is asynchronous
        self.shared_memory = check_choice("shared_memory", shared_memory, (True, False))
        self.rule = rule
        self.outer = outer
        self._peers_argument = peers
        self._store: Store | None = None  # of the run, in a `fit`
        super().__init__(timeout=timeout, process_group_backend=process_group_backend, **launch)

    @property
    @override
    def hyperparameters(self) -> dict[str, Any]:
        peers = self._peers_argument
        return {
            "probability": self.schedule.probability,
            "period": self.schedule.period,
            "peers": peers if isinstance(peers, str) else repr(peers),
            "delay": self.delay,
            "asynchronous": self.asynchronous,
            "shared_memory": self.shared_memory,
            "seed": self.schedule.seed,
            **super().hyperparameters,
        }

    @property
    @override
    def round_every(self) -> int:
        return self.schedule.period

    @override
    def make_exchange(self, parameters: Parameters, control: Control, store: Store) -> Exchange | AsynchronousExchange:
        self._store = store
        if self.asynchronous:
            return self._make_asynchronous(parameters, control, store)
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

    def _make_asynchronous(self, parameters: Parameters, control: Control, store: Store) -> AsynchronousExchange:
        if self.root_device.type != "cpu":
            raise MisconfigurationException(
                f"`asynchronous=True` runs on the CPU, not on {self.root_device} yet. Leave it off, or take"
                " DownpourStrategy, which waits for nobody either"
            )
        exchange = AsynchronousExchange(
            self.global_rank,
            self.world_size,
            self.schedule,
            self.rule,
            control,
            store,
            parameters,
            wire_dtype=self.wire_dtype,
            outer=self.outer,
            nonfinite=self.nonfinite,
        )
        exchange.on_heal = self.begin_optimizers_anew
        return exchange

    @override
    def start_training(self, trainer: pl.Trainer, control: Control, store: Store) -> None:
        super().start_training(trainer, control, store)
        if isinstance(exchange := self._exchange, AsynchronousExchange):
            self._before_updates = BeforeUpdates(exchange.shut)
            lightning_compat.before_validations(trainer, exchange.leave)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        step = super().optimizer_step
        if self._before_updates is None:
            return step(optimizer, closure, model, **kwargs)
        if not self._module.automatic_optimization:
            self._running_asynchronously.shut()
            return step(optimizer, closure, model, **kwargs)
        return self._before_updates.within(lambda closing: step(optimizer, closing, model, **kwargs), closure)

    @property
    def _running_asynchronously(self) -> AsynchronousExchange:
        if not isinstance(exchange := self._running, AsynchronousExchange):
            raise RuntimeError("exchanges go by step")
        return exchange

    @override
    def on_meeting(self, meeting: Meeting) -> None:
        if not self.asynchronous:  # else each rank goes by a clock of its own
            super().on_meeting(meeting)

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
        if self._before_updates is not None:
            self._before_updates.close()
            self._before_updates = None
        super().end_training()

    @override
    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_before_updates": None}


_NO_NCCL = (
    "`asynchronous=True` needs gloo: exchanges over NCCL are posted by all ranks alike. Set"
    " `process_group_backend='gloo'`"
)


def _is_asked(store: Store, lost: PartnerLost, step: int) -> bool:
    """Whether a partner that closed its link found that the two train other parameters."""
    try:
        return has_told_trained(store, lost.partner, step)
    except (DistNetworkError, DistStoreError):
        return False  # the store is gone, and with it whoever held it: that is the cause
