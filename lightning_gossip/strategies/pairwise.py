"""The Lightning glue of schemes in which partners exchange snapshots and mix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.distributed import DistNetworkError, DistStoreError, Store
from typing_extensions import override

from lightning_gossip.arguments import check_choice, check_integer, check_wire_dtype
from lightning_gossip.control.run import Control, Meeting
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.models import has_told_trained, shared_parameters, tell_trained
from lightning_gossip.rules.mixing import MixingRule
from lightning_gossip.rules.schedule import Chooser, Peers, Schedule
from lightning_gossip.strategies import lightning_compat
from lightning_gossip.strategies.base import ReplicaStrategy
from lightning_gossip.transport.interface import PartnerLost, Transport
from lightning_gossip.transport.link import LayoutMismatch, Links
from lightning_gossip.transport.link_transport import LinkTransport, end_of_rank
from lightning_gossip.transport.nccl import NcclTransport


class PairwiseStrategy(ReplicaStrategy):
    """Replicas exchange snapshots by a schedule and mix by a rule.

    Args:
        rule: what choices mean and how much of a difference is taken over.
        probability, period, peers, seed: see :class:`~lightning_gossip.rules.schedule.Schedule`.
        delay: steps from posting an exchange to applying it, from 0 to ``period - 1``.
        wire_dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float32`` or its name: snapshots are rounded to it
            where it is narrower than the parameter; None sends them as they are.
        shared_memory: whether ranks on one host read each other's snapshots where they were written.
        launch: see :class:`~lightning_gossip.strategies.base.ReplicaStrategy`.

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
        wire_dtype: torch.dtype | str | None,
        seed: int,
        timeout: timedelta,
        shared_memory: bool,
        **launch: Any,
    ) -> None:
        self.schedule = Schedule(peers, probability, period, seed)
        self.delay = check_integer("delay", delay, low=0, high=period - 1, why="at most period - 1")
        self.wire_dtype = check_wire_dtype("wire_dtype", wire_dtype)
        self.shared_memory = check_choice("shared_memory", shared_memory, (True, False))
        self.rule = rule
        self._peers_argument = peers
        self._exchange: Exchange | None = None
        self._store: Store | None = None  # of the run, in a `fit`
        self._last_step = 0
        super().__init__(timeout=timeout, **launch)

    @property
    @override
    def step(self) -> int:
        return self._exchange.step if self._exchange is not None else self._last_step

    @property
    def exchange(self) -> Exchange | None:
        """This rank's exchanges, with their counts and times in ``exchange.stats``; None outside ``fit``."""
        return self._exchange

    @property
    @override
    def hyperparameters(self) -> dict[str, Any]:
        peers = self._peers_argument
        return {
            "probability": self.schedule.probability,
            "period": self.schedule.period,
            "peers": peers if isinstance(peers, str) else repr(peers),
            "delay": self.delay,
            "wire_dtype": None if self.wire_dtype is None else str(self.wire_dtype).removeprefix("torch."),
            "shared_memory": self.shared_memory,
            "seed": self.schedule.seed,
            **super().hyperparameters,
        }

    @override
    def start_training(self, trainer: pl.Trainer, control: Control, store: Store) -> None:
        module = self._module
        self._store = store
        self._exchange = Exchange(
            self.global_rank,
            self.world_size,
            self.schedule,
            self.rule,
            self._make_transport(control, store),
            parameters=lambda: shared_parameters(module),
            delay=self.delay,
            wire_dtype=self.wire_dtype,
        )
        if trainer.global_step > 0:  # a further `fit` of one training
            self.continue_from(self._last_step)
        # before callbacks put averages of their own in place of the replicas
        lightning_compat.before_training_ends(trainer, self.settle)

    @override
    def continue_from(self, step: int) -> None:
        self._running.align(step)

    def _make_transport(self, control: Control, store: Store) -> Transport:
        if self.process_group_backend == "nccl" and self.world_size > 1:
            group: Any = dist.new_group(backend="nccl")
            return NcclTransport(group, self.root_device)
        links = Links(store, end_of_rank(self.global_rank), control.timeout)
        return LinkTransport(links, control, self.shared_memory, pin_memory=self.root_device.type != "cpu")

    @override
    def before_meeting(self) -> None:
        if self._exchange is not None:
            self._exchange.arrive()

    @override
    def on_meeting(self, meeting: Meeting) -> None:
        if self._exchange is not None:
            self._exchange.align(meeting.clock)
            if meeting.skipped:
                self._exchange.reset_links(meeting.number)

    @override
    def training_state(self) -> dict[str, Any]:
        return self._running.state_dict()

    @override
    def load_training_state(self, state: dict[str, Any]) -> None:
        self._running.load_state_dict(state)

    @override
    def begin_step(self) -> None:
        with self._explaining():
            self._running.begin()

    @override
    def end_step(self) -> None:
        with self._explaining():
            self._running.end()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say which parameters they are where partners find that they train others."""
        try:
            yield
        except PartnerLost as error:
            store = self._store
            if store is not None and (
                isinstance(error.__cause__, LayoutMismatch) or _is_asked(store, error, self.step)
            ):
                told = tell_trained(store, self.control, self._module, error.partner, self.step)
                raise RuntimeError(told) from error
            raise

    @override
    def settle(self) -> None:
        self._running.settle()

    @override
    def end_training(self) -> None:
        if self._exchange is not None:
            self._last_step = self._exchange.step
            self._exchange.close()
            self._exchange = self._store = None

    @property
    def _running(self) -> Exchange:
        if self._exchange is None:
            raise RuntimeError(f"{type(self).__name__} is not in `fit`")
        return self._exchange


def _is_asked(store: Store, lost: PartnerLost, step: int) -> bool:
    """Whether a partner that closed its link found that the two train other parameters."""
    try:
        return has_told_trained(store, lost.partner, step)
    except (DistNetworkError, DistStoreError):
        return False  # the store is gone, and with it whoever held it: that is the cause
