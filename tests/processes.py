"""Ranks as forks of the test's process: with torch's default group between them, or at a program of ours."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
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

    assert None not in (codes := fork(become, world_size, timeout)), f"ranks hang: {codes}"
    results = [torch.load(folder / f"process_{rank}.pt", weights_only=False) for rank in range(world_size)]
    for kind, value in results:
        assert expect_errors or kind == "returned", value
    return [value for _, value in results]


def run_program(folder: Path, program: Path, arguments: list[Any], world_size: int, **environment: str) -> list[str]:
    """Run a program as ranks that somebody has started, with torch's variables; return the lines that rank 0 prints.

    Everything is imported already: what starts a program as a user does takes ten times as long.
    """
    port = free_port()

    def become(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world_size))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
        vars(sys)["argv"] = [str(program), *map(str, arguments)]
        sys.path.insert(0, str(program.parent))
        os.chdir(folder)
        with open(folder / f"printed_{rank}.txt", "w", buffering=1) as file, redirect_stdout(file):
            runpy.run_path(str(program), run_name="__main__")

    assert fork(become, world_size, 120) == [0] * world_size
    return (folder / "printed_0.txt").read_text().splitlines()


def fork(become: Callable[[int], None], world_size: int, timeout: float) -> list[int | None]:
    """Call ``become`` with each rank in a fork; return their exit codes, None for one that hangs: it is killed."""
    gc.collect()  # or the ranks would destroy what earlier tests left, with threads that they do not have
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=become, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes
