"""Ranks that share one device: each a node of its own to Lightning, with one device."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment

from benchmarks.shared.ranks import fork_ranks
from benchmarks.shared.trainer import make_trainer as make_quiet_trainer
from benchmarks.shared.trainer import quieten

TIMEOUT = timedelta(minutes=2)


def share_device(world_size: int, function: Callable[[], None], seconds: float) -> None:
    """Call ``function`` in forked ranks that all use the first device; raise as they do.

    The calling process must not have touched CUDA: forked ones could not either.
    """
    fork_ranks(world_size, partial(_run, function), seconds)


def _run(function: Callable[[], None]) -> None:
    os.environ |= {"GROUP_RANK": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    quieten()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    function()


def in_group(function: Callable[[], None]) -> None:
    """Call ``function`` within a default group on gloo, which Lightning's trainings then share."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        function()
    finally:
        dist.destroy_process_group()


def make_trainer(device: torch.device, strategy: Any, **kwargs: Any) -> pl.Trainer:
    """Return a quiet Trainer of one device on each of as many nodes as there are ranks."""
    return make_quiet_trainer(
        accelerator=device.type,
        devices=1,
        num_nodes=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        **kwargs,
    )


def gather(value: Any) -> list[Any]:
    """Return the value of each rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
