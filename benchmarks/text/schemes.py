"""The rows: which schemes train, how often they exchange, on how many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy

from benchmarks.shared.ddp_hooks import post_local_sgd, power_sgd
from lightning_gossip import DiLoCoStrategy, ElasticGossipStrategy, LocalSGDStrategy

TIMEOUT = timedelta(minutes=10)
OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9}
"""DiLoCo's own, of every outer step here."""
POWERSGD_START = 30
"""Updates with whole gradients before PowerSGD compresses them: those in which the learning rate warms up."""
POST_LOCAL_START = 100
"""Updates with an all-reduce before post-local SGD leaves the replicas to themselves; a multiple of each period."""
TITLES = {
    "ddp": "DDP",
    "powersgd-1": "DDP, PowerSGD rank 1",
    "powersgd-4": "DDP, PowerSGD rank 4",
    "post-local": "DDP, post-local SGD",
    "local-sgd": "LocalSGD",
    "diloco": "DiLoCo",
    "elastic": "elastic gossip",
    "elastic-outer": "elastic gossip, outer step",
}
"""The schemes; what has no period exchanges at every update."""


@dataclass(frozen=True)
class Row:
    """A training.

    Args:
        scheme: of :data:`TITLES`.
        period: updates from one round to the next; 1 where every update is one.
        ranks: replicas.
    """

    scheme: str
    period: int = 1
    ranks: int = 4

    @property
    def id(self) -> str:
        """Such as ``ddp``, ``diloco-25``, ``diloco-25@8``."""
        period = f"-{self.period}" if self.period > 1 else ""
        return f"{self.scheme}{period}" + (f"@{self.ranks}" if self.ranks != 4 else "")

    @property
    def title(self) -> str:
        """In words."""
        period = f", period {self.period}" if self.period > 1 else ""
        return f"{TITLES[self.scheme]}{period}" + (f", {self.ranks} ranks" if self.ranks != 4 else "")

    @property
    def outer(self) -> dict[str, Any]:
        """η and γ of the outer step; empty without one."""
        return dict(OUTER) if self.scheme in ("diloco", "elastic-outer") else {}

    def strategy(self, seed: int) -> Strategy:
        """Return what ``Trainer(strategy=…)`` takes; ``seed`` is of the schedule."""
        if self.scheme == "ddp":
            return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
        if self.scheme.startswith("powersgd"):
            return power_sgd(int(self.scheme[-1]), POWERSGD_START, TIMEOUT)
        if self.scheme == "post-local":
            # torch's averager counts from 0: the first mean is after update POST_LOCAL_START
            return post_local_sgd(self.period, POST_LOCAL_START - 1, TIMEOUT)
        common: dict[str, Any] = {"period": self.period, "evaluate": "replica", "timeout": TIMEOUT}
        if self.scheme == "local-sgd":
            return LocalSGDStrategy(**common)
        if self.scheme == "diloco":
            return DiLoCoStrategy(**common, **self.outer)
        return ElasticGossipStrategy(**common, **self.outer, alpha=0.5, peers="matching", seed=seed)


_RARE = ("diloco", "elastic-outer", "local-sgd", "elastic", "post-local")
ROWS = {
    row.id: row
    for row in (
        Row("ddp"),
        *(Row(scheme, 25) for scheme in _RARE),
        Row("diloco", 25, 8),
        Row("elastic-outer", 25, 8),
        Row("elastic", 25, 8),
        *(Row(scheme, 100) for scheme in _RARE),
        Row("powersgd-1"),
        Row("powersgd-4"),
        # asynchronous gossip, without and with an outer step, goes here
    )
}
"""By id, in the order in which they are trained: the most telling first."""
