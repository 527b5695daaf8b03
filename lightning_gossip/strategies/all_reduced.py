"""The Lightning glue of schemes in which all replicas meet in one start once a round, by an all-reduce."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import Store
from typing_extensions import override

from lightning_gossip.arguments import check_integer, check_wire_dtype
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.strategies.clocked import ClockedStrategy
from lightning_gossip.transport.all_reduce import LinkAllReduce
from lightning_gossip.transport.link import Links
from lightning_gossip.transport.link_transport import end_of_rank


class AllReducedStrategy(ClockedStrategy[Rounds]):
    """Replicas train for a round on their own, then all begin the next from one start.

    Args:
        outer: the step made with the mean of what they drifted.
        period: steps from one round to the next, at least 1.
        delay: steps from posting a round to applying it, from 0 to ``period - 1``.
        fragments: parts of the model with rounds of their own, from 1 to ``period``.
        wire_dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float32`` or its name: what drifted is rounded to it
            where it is narrower than the parameter; None sends it as it is.
        launch: see :class:`~lightning_gossip.strategies.base.ReplicaStrategy`.

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
        wire_dtype: torch.dtype | str | None,
        timeout: timedelta,
        **launch: Any,
    ) -> None:
        self.outer = outer
        self.period = check_integer("period", period, low=1)
        self.delay = check_integer("delay", delay, low=0, high=period - 1, why="at most period - 1")
        self.fragments = check_integer("fragments", fragments, low=1, high=period, why="at most period")
        self.wire_dtype = check_wire_dtype("wire_dtype", wire_dtype)
        super().__init__(timeout=timeout, **launch)

    @property
    @override
    def hyperparameters(self) -> dict[str, Any]:
        return {
            "period": self.period,
            "delay": self.delay,
            "fragments": self.fragments,
            "wire_dtype": None if self.wire_dtype is None else str(self.wire_dtype).removeprefix("torch."),
            **super().hyperparameters,
        }

    @override
    def make_exchange(self, module: pl.LightningModule, control: Control, store: Store) -> Rounds:
        if self.process_group_backend == "nccl" and self.world_size > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} does not use NCCL yet; set `process_group_backend='gloo'`, which goes through"
                " pinned host memory."
            )
        links = Links(store, end_of_rank(self.global_rank), control.timeout)
        return Rounds(
            self.global_rank,
            self.world_size,
            self.period,
            self.outer,
            LinkAllReduce(links, control),
            parameters=lambda: dict(module.named_parameters()),
            delay=self.delay,
            fragments=self.fragments,
            wire_dtype=self.wire_dtype,
        )
