"""The schemes that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from command_line import Nobody
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.shared.ddp_hooks import HookedDDP, bfloat16, post_local_sgd, power_sgd
from lightning_gossip import DiLoCoStrategy, DownpourStrategy, ElasticGossipStrategy

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
ASYNCHRONOUS: dict[str, dict[str, Any]] = {
    "asynchronous, period 1": {"period": 1, "asynchronous": True, "dealt": False},
    "asynchronous, period 8": {"period": 8, "asynchronous": True, "dealt": False},
}
"""Arguments of elastic gossip that waits for nobody, by name; every rank makes as many steps, whatever they take."""
DOWNPOUR: dict[str, Any] = {"n_push": 8, "n_pull": 8, "dealt": False}
OUTER: dict[str, dict[str, Any]] = {
    "LocalSGD, period 32": {"period": 32, "outer_lr": 1.0, "outer_momentum": 0.0},
    "DiLoCo, period 32": {"period": 32},
    "DiLoCo, period 32, delay 31": {"period": 32, "delay": 31},
    "DiLoCo, period 32, fragments 4": {"period": 32, "fragments": 4},
    "DiLoCo, period 32, fragments 4, delay 15": {"period": 32, "fragments": 4, "delay": 15},
    "elastic, outer step, period 32": {"period": 32, "outer_lr": 0.7, "outer_momentum": 0.9},
    "elastic, outer step, period 32, delay 31": {"period": 32, "delay": 31, "outer_lr": 0.7, "outer_momentum": 0.9},
}
"""Arguments of DiLoCo, of which LocalSGD is a case, and of elastic gossip, by name."""
HOOKED: dict[str, Callable[[], HookedDDP]] = {
    "ddp, PowerSGD rank 1": lambda: power_sgd(1, 2, TIMEOUT),
    "ddp, PowerSGD rank 4": lambda: power_sgd(4, 2, TIMEOUT),
    "ddp, bfloat16": lambda: bfloat16(TIMEOUT),
    "post-local SGD, period 32": lambda: post_local_sgd(32, 0, TIMEOUT),
}
"""Lightning's DDP with a hook of torch's, by name."""
TORCHFT: dict[str, dict[str, int]] = {
    "torchft LocalSGD, period 32": {"period": 32},
    "torchft DiLoCo, period 32": {"period": 32, "fragments": 1},
    "torchft DiLoCo, period 32, delay 31": {"period": 32, "fragments": 1, "delay": 31},
    "torchft DiLoCo, period 32, fragments 4, delay 7": {"period": 32, "fragments": 4, "delay": 7},
}
"""Arguments of :class:`~benchmarks.network.torchft_loop.TorchftSetup`, by name."""
OUTER_SETUPS = ("none", "none again", "ddp", *HOOKED, *OUTER, "plain none", *TORCHFT)
SETUPS = ("none", "none again", "ddp", *GOSSIP, "downpour")
STALLING = (
    *("none", "none again", "ddp"),
    *(name for name in GOSSIP if "bfloat16" not in name),
    *ASYNCHRONOUS,
    "downpour",
)
FILES = {
    "rates": "network.csv",
    "outer": "network_outer.csv",
    "stalls": "network_stalls.csv",
    "straggler": "network_straggler.csv",
}
"""Of results, by what was measured."""
ACCURACY_FILE = "network_accuracy.csv"
ACCURACY = 0.97
"""On MNIST's validation set."""


def make_strategy(name: str, seed: int = 0, evaluate: str = "replica", shared_memory: bool = False) -> Any:
    """Return the strategy of one of :data:`SETUPS`, or of those of :data:`OUTER_SETUPS` that run under Lightning.

    Args:
        name: of it.
        seed: of the schedule.
        evaluate, shared_memory: of gossip; by default ranks in namespaces of one host do not use its memory.
    """
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
    if name == "downpour":
        return DownpourStrategy(**DOWNPOUR, evaluate="replica", timeout=TIMEOUT)
    if name in HOOKED:
        return HOOKED[name]()
    if name in OUTER and not name.startswith("elastic"):
        return DiLoCoStrategy(**OUTER[name], evaluate="replica", timeout=TIMEOUT)
    arguments = {"peers": Nobody()} if name in ("none", "none again") else (GOSSIP | ASYNCHRONOUS | OUTER)[name]
    common: dict[str, Any] = {"seed": seed, "evaluate": evaluate, "timeout": TIMEOUT, "shared_memory": shared_memory}
    return ElasticGossipStrategy(**arguments, **common)
