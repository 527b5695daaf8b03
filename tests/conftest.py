"""Fixtures that make one process look like the ranks of a run."""

from __future__ import annotations

import gc
import os
from itertools import count
from typing import Any

import pytest
from curves import AsProcess, Connect
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_gossip.monitoring import loggers, run_folder
from lightning_gossip.monitoring.run_folder import GroupStore

# torch looks up the name of every address to which it connects, some ten times a rank; a name server that loses one
# answer in fifty then costs five seconds each time. With this, for all processes that tests start too, none is asked.
os.environ.setdefault("RES_OPTIONS", "attempts:0")


def pytest_collection_finish() -> None:
    """Spare the collector what was imported: in a forked rank, looking at it copies it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that fork before those that start threads in this process: a fork copies locks, not their holders.

    Tests of real processes, forked ones among them, are tried once more: on a crowded machine one in some hundred is
    late. One that fails twice fails; pytest's summary counts the others as rerun.
    """
    for item in items:
        if forks(item) or {"subprocess", "multiprocessing"} & set(vars(item.module)):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=lambda item: not forks(item))


def forks(item: pytest.Item) -> bool:
    """Whether the module of ``item`` forks ranks (forked.py)."""
    return bool({"fit", "Linear"} & set(vars(item.module)))  # type: ignore[attr-defined]


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> AsProcess:
    """Make this process look like one that has just started as a rank, with the environment that it inherited."""
    monkeypatch.setenv("LIGHTNING_GOSSIP_RUN_FOLDERS", "{}")
    for variable in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PL_GLOBAL_SEED", "SLURM_LOCALID"):
        monkeypatch.delenv(variable, raising=False)

    def become(rank: int) -> None:
        monkeypatch.setattr(run_folder, "_handed_on", {})
        monkeypatch.setattr(loggers, "_constructed", count())
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        monkeypatch.setattr(fabric_rank_zero_only, "rank", rank)
        monkeypatch.setattr(run_folder, "group_store", lambda: None)

    become(0)
    return become


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Make the present process a rank of a process group, as Lightning does when a training starts."""

    def join(store: Any, rank: int, world_size: int) -> None:
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        monkeypatch.setattr(fabric_rank_zero_only, "rank", rank)
        monkeypatch.setattr(run_folder, "group_store", lambda: GroupStore(store, rank, world_size))

    return join
