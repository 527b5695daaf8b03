"""Ranks as forks of the test's process, with torch's default group between them: for what needs that and no Trainer."""

from __future__ import annotations

import gc
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ports import free_port


def run_processes(
    folder: Path, world_size: int, body: Callable[[int], Any], expect_errors: bool = False, timeout: float = 60
) -> list[Any]:
    """Call ``body`` with each rank, in a process of its own; return what they return, or raise.

    Where errors are expected, those are returned as text.
    """
    port = free_port()

    def become(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
            result = ("returned", body(rank))
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:  # noqa: BLE001 - given to the caller
            result = ("raised", traceback.format_exc())
        torch.save(result, folder / f"process_{rank}.pt")

    gc.collect()  # or the ranks would destroy what earlier tests left, with threads that they do not have
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=become, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} hang"
    results = [torch.load(folder / f"process_{rank}.pt", weights_only=False) for rank in range(world_size)]
    for kind, value in results:
        assert expect_errors or kind == "returned", value
    return [value for _, value in results]
