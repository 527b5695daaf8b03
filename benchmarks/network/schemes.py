"""The schemes that are compared, by name."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from command_line import Nobody
from lightning.pytorch.strategies import DDPStrategy

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy

TIMEOUT = timedelta(minutes=2)

GOSSIP: dict[str, dict[str, Any]] = {
    "period 1": {"period": 1},
    "period 1, bfloat16": {"period": 1, "wire_dtype": torch.bfloat16},
    "period 8": {"period": 8},
    "period 8, delay 7": {"period": 8, "delay": 7},
    "period 8, delay 7, bfloat16": {"period": 8, "delay": 7, "wire_dtype": torch.bfloat16},
    "period 32": {"period": 32},
    "period 32, delay 31": {"period": 32, "delay": 31},
}
"""Arguments of elastic gossip, ``matching``, by name."""
DOWNPOUR: dict[str, Any] = {"n_push": 8, "n_pull": 8}
SETUPS = ("none", "none again", "ddp", *GOSSIP, "downpour")
STALLING = ("none", "none again", "ddp", *(name for name in GOSSIP if "bfloat16" not in name), "downpour")
FILES = {"rates": "network.csv", "stalls": "network_stalls.csv", "straggler": "network_straggler.csv"}
"""Of results, by what was measured."""
ACCURACY_FILE = "network_accuracy.csv"
ACCURACY = 0.97
"""On MNIST's validation set."""


def make_strategy(name: str, seed: int = 0, evaluate: str = "replica", shared_memory: bool = False) -> Any:
    """Return the strategy of one of :data:`SETUPS`.

    Args:
        name: of it.
        seed: of the schedule.
        evaluate, shared_memory: of gossip; by default ranks in namespaces of one host do not use its memory.
    """
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
    if name == "downpour":
        return DownpourStrategy(**DOWNPOUR, evaluate="replica", timeout=TIMEOUT)
    arguments = {"peers": Nobody()} if name in ("none", "none again") else GOSSIP[name]
    common: dict[str, Any] = {"seed": seed, "evaluate": evaluate, "timeout": TIMEOUT, "shared_memory": shared_memory}
    return ElasticGossipStrategy(**arguments, **common)
