"""What the programs beside this file share: a strategy as a user gives it, and what each rank leaves for the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_gossip import DiLoCoStrategy, DownpourStrategy, ElasticGossipStrategy

OUT = Path(sys.argv[1])
NAME = sys.argv[2]
PERIOD = 4
"""Of DiLoCo's rounds; by its name they are 100 steps apart, more than are made here."""


def by_name(prefix: str = "") -> Any:
    """The strategy, by its name where its defaults suit a training of seconds; ``prefix`` makes it another of those."""
    return as_object() if NAME == "diloco" else prefix + NAME


def as_object() -> Any:
    """The strategy, for libraries that look at its class."""
    if NAME == "diloco":
        return DiLoCoStrategy(period=PERIOD)
    return DownpourStrategy() if NAME == "downpour" else ElasticGossipStrategy()


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same, to the last bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Recorded:
    """A rank's losses, and how often it exchanged; to be mixed with the ``Callback`` of the library's Lightning."""

    def __init__(self) -> None:
        self.rank = 0
        self.strategy = ""
        self.losses: list[float] = []
        self.exchanges = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        self.rank, self.strategy = trainer.global_rank, type(strategy).__name__
        self.losses.append(float(outputs["loss"]))
        self.exchanges = strategy.downpour_stats.pushes if NAME == "downpour" else strategy.exchange.stats.exchanges

    def leave(self, module: nn.Module, loaded: nn.Module | None = None, predicted: Any = None) -> None:
        """Write down what this rank did, and holds after ``fit``.

        Args:
            module: that was trained.
            loaded: the same, as the library loads what was saved.
            predicted: by the loaded one.
        """
        record = {
            "strategy": self.strategy,
            "losses": self.losses,
            "exchanges": self.exchanges,
            "parameters": sum(float(parameter.double().norm()) for parameter in module.parameters()),
            "loaded_equal": None if loaded is None else equal(module, loaded),
            "predicted_finite": None if predicted is None else bool(torch.as_tensor(predicted).isfinite().all()),
        }
        (OUT / f"rank_{self.rank}.json").write_text(json.dumps(record))
