"""What starts processes is marked, and tried again; fixtures that make one process look like the ranks of a run."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, groupby
from types import SimpleNamespace
from typing import Any

import pytest
from curves import AsProcess, Connect
from forked_shards import ForkedShard
from lightning.fabric.plugins.environments import lightning as lightning_environment
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from ports import free_port

from lightning_gossip.monitoring import loggers, run_folder
from lightning_gossip.monitoring.run_folder import GroupStore
from lightning_gossip.parameter_server import process
from lightning_gossip.strategies import launchers

# torch looks up the name of every address to which it connects, some ten times a rank; a name server that loses one
# answer in fifty then costs five seconds each time. With this, for all processes that tests start too, none is asked.
os.environ.setdefault("RES_OPTIONS", "attempts:0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run what is marked `long`, too: trainings of minutes")


def pytest_configure() -> None:
    sys.addaudithook(see_process_starts)
    # a process started by `forkserver` then takes a moment
    multiprocessing.set_forkserver_preload(["lightning.pytorch", "lightning_gossip.parameter_server"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests of real processes; run programs, then what forks, then what starts threads in this process.

    A fork copies locks, not their holders; programs take longest, and last they would leave other workers idle. Tests
    of real processes are tried once more, but for those about faults: on a crowded machine one in some hundred is late.
    One that fails twice fails; pytest's summary names others as rerun.
    """
    mark_processes(items)
    for item in items:
        if (one_in := item.get_closest_marker("one_in")) and sum(places(item)) % one_in.args[0]:
            item.add_marker(pytest.mark.long)
        if item.get_closest_marker("processes") and not item.get_closest_marker("faults"):
            item.add_marker(pytest.mark.flaky(reruns=1))
    if not config.getoption("--long") and (long := [item for item in items if item.get_closest_marker("long")]):
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: 2 - 2 * launches(item.module) - forks(item.module))  # type: ignore[attr-defined]


def pytest_collection_finish() -> None:
    """Spare the collector what was imported: in a forked rank, looking at it copies it."""
    gc.collect()
    gc.freeze()


def mark_processes(items: list[pytest.Item]) -> None:
    """Mark all tests of a module that starts processes as `processes`, but where it marks those that do itself."""
    by_module = groupby(items, key=lambda item: item.module)  # type: ignore[attr-defined]
    for module, tests in ((module, list(tests)) for module, tests in by_module):
        starts = forks(module) or {"launched", "subprocess", "multiprocessing", "Program"} & set(vars(module))
        if starts and not any(test.get_closest_marker("processes") for test in tests):
            for test in tests:
                test.add_marker(pytest.mark.processes)


def places(item: pytest.Item) -> Iterator[int]:
    """Give, for each of the item's parametrizations, at which place of its values the item's is."""
    given = item.callspec.params  # type: ignore[attr-defined]
    for names, values in (mark.args for mark in item.iter_markers("parametrize")):
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        own = tuple(given[name] for name in names)
        each = (value.values if hasattr(value, "marks") else value if len(names) > 1 else (value,) for value in values)
        yield next(place for place, value in enumerate(each) if tuple(value) == own)


def forks(module: Any) -> bool:
    """Whether the tests of ``module`` fork ranks (forked.py, dealt.py)."""
    return bool({"fit", "Linear", "Walk", "run_program"} & set(vars(module)))


def launches(module: Any) -> bool:
    """Whether the tests of ``module`` launch programs (launched.py)."""
    return bool({"Program", "Forked"} & set(vars(module)))


running: list[pytest.Item] = []
"""The test that runs, if any."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    running.append(item)
    try:
        return (yield)
    finally:
        running.clear()


def see_process_starts(event: str, arguments: tuple[Any, ...]) -> None:
    """Let no test fork, or start Python, that is not marked: `make test-quick` would run it."""
    starts = event == "os.fork" or (event == "subprocess.Popen" and sys.executable in (arguments[0], *arguments[1]))
    if starts and running and not running[0].get_closest_marker("processes"):
        raise RuntimeError(f"{running[0].nodeid} starts a process, and is not marked `pytest.mark.processes`")


@pytest.fixture(scope="module", autouse=True)
def _processes_to_fork_from_end() -> Iterator[None]:
    yield
    if (launched := sys.modules.get("launched")) is not None:
        launched.Forked.end_all()


@pytest.fixture(autouse=True)
def _shards_are_forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks are; shards that start as a user's do are in test_shard_endings.py and test_launch.py."""
    if forks(request.module):
        monkeypatch.setattr(process, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": ForkedShard}))


@pytest.fixture(autouse=True)
def _stores_get_ports_that_stay_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's choice may be another test's by the time at which rank 0 listens there."""
    for module in (lightning_environment, launchers):
        monkeypatch.setattr(module, "find_free_network_port", free_port)


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
