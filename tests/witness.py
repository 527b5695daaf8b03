"""What a run logged beside what its ranks saw: a model, a logger and a callback for tests of monitoring."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from forked import Linear, Recorder
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_gossip.transport.link import Link


class Model(Linear):
    """Logs its loss on every step, and keeps what it logged."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", super().training_step(batch, batch_idx), sync_dist=True)


class Memory(Logger):
    """Keeps what is logged on this rank."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged.append((step or 0, dict(metrics)))


class Witness(Recorder):
    """Sees what the monitor should have seen: replicas, the exchange's counts, messages and collectives."""

    COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.calls: Counter[str] = Counter()
        for module in (dist, dist.distributed_c10d):
            for name in self.COLLECTIVES:
                setattr(module, name, self._counting(name, getattr(module, name)))
        Link.send = self._counting("send", Link.send)  # type: ignore[method-assign]
        Link.swap = self._counting("swap", Link.swap)  # type: ignore[method-assign]
        self.seen |= {"snapshots": [], "stats": [], "loss": [], "at_consensus": [], "calls_in_steps": Counter()}

    def _counting(self, name: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counting

    def _replica(self, module: pl.LightningModule) -> np.ndarray:
        return torch.cat([p.detach().flatten() for p in module.parameters()]).numpy().copy()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.before = self.calls.copy()
        self.seen["snapshots"].append(self._replica(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.seen["stats"].append(asdict(trainer.strategy.exchange.stats))
        self.seen["loss"].append(float(outputs["loss"]))
        self.seen["calls_in_steps"] += self.calls - self.before

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen["at_consensus"].append(self._replica(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["at_consensus"].append(self._replica(pl_module))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["shown"] = dict(trainer.progress_bar_metrics)
        self.seen["logged"] = next((x.logged for x in trainer.loggers if isinstance(x, Memory)), None)
        super().on_fit_end(trainer, pl_module)


def logged(rank: dict[str, Any], tag: str) -> list[tuple[int, float]]:
    return [(step, metrics[tag]) for step, metrics in rank["logged"] if tag in metrics]
