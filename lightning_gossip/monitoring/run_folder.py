"""Where a run's logs lie, agreed by all its ranks, and the ``metadata.json`` that says what the run was.

Version numbers come from listing a folder, so ranks that each list it would race. Rank 0 chooses, and the
others hear of it twice: from an environment variable, which reaches the processes that the launching one
starts before any of them can talk to another, and from the key-value store of the process group, which holds
wherever they differ. Nothing here is a collective.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.distributed_c10d import _get_default_store

from lightning_gossip.control.store import is_held

METADATA_FILE = "metadata.json"
_ENVIRONMENT_KEY = "LIGHTNING_GOSSIP_RUN_FOLDERS"
_STORE_PREFIX = "lightning_gossip/run_folder"
_TIMEOUT = timedelta(minutes=5)
_POLL_SECONDS = 0.02
_handed_on: dict[str, Any] = {}


@dataclass(frozen=True)
class RunFolder:
    """Where one logger of rank 0 writes.

    Args:
        save_dir: the folder of all experiments, as the user gave it: each machine expands its own
            ``$VARIABLES``.
        name: the experiment; empty for none.
        version: the run: an int ``n`` for the folder ``version_<n>``, a string for the folder of that name.
        start_time: when rank 0 constructed the logger, ISO-8601, UTC.
    """

    save_dir: str
    name: str
    version: int | str
    start_time: str


class GroupStore(NamedTuple):
    """The key-value store that the ranks of a run share, and this process' rank in it."""

    store: dist.Store
    rank: int
    world_size: int


def utc_now() -> str:
    """Return the present time as ISO-8601 in UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def next_version(root: str) -> int:
    """Return one more than the largest ``n`` of the folders ``root/version_<n>``, or 0 where there is
    none."""
    fs, path = url_to_fs(root)
    try:
        listing = fs.ls(path, detail=True)
    except FileNotFoundError:
        return 0
    names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in listing if entry["type"] == "directory"]
    taken = [int(match[1]) for match in map(re.compile(r"version_(\d+)").fullmatch, names) if match]
    return max(taken, default=-1) + 1


def reserve_version(root: str) -> int:
    """Make the next free ``root/version_<n>`` and return ``n``.

    Making the folder settles the race with other runs that start at the same moment, wherever the file system
    refuses to make a folder twice (object stores do not).
    """
    fs, path = url_to_fs(root)
    version = next_version(root)
    while True:
        try:
            fs.makedirs(os.path.join(path, f"version_{version}"), exist_ok=False)
        except FileExistsError:
            version += 1
        else:
            return version


def remove_if_empty(folder: str) -> None:
    """Remove a reserved folder that nobody wrote to; does nothing to any other, or on a remote file
    system."""
    fs, path = url_to_fs(folder)
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def hand_on(ordinal: int, folder: RunFolder) -> None:
    """Let processes started from this one know the folder of this process' logger number ``ordinal``."""
    # what an outer process handed on to this one is overwritten, not extended: it belongs to another run
    _handed_on[str(ordinal)] = asdict(folder)
    os.environ[_ENVIRONMENT_KEY] = json.dumps(_handed_on)


def handed_on(ordinal: int) -> RunFolder | None:
    """Return what the launching process handed on for logger number ``ordinal``, None where it did not."""
    folder = json.loads(os.environ.get(_ENVIRONMENT_KEY, "{}")).get(str(ordinal))
    return None if folder is None else RunFolder(**folder)


def group_store() -> GroupStore | None:
    """Return the store of the process group, or torchrun's own before there is a group; None for a rank
    alone."""
    if dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size()
        return GroupStore(_get_default_store(), dist.get_rank(), world_size) if world_size > 1 else None
    by_torchrun = is_held() and "RANK" in os.environ
    if not by_torchrun or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    store = _agent_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.getpid())
    return GroupStore(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@lru_cache(maxsize=1)
def _agent_store(host: str, port: int, pid: int) -> dist.Store:
    return dist.TCPStore(host, port, is_master=False, timeout=_TIMEOUT)


def publish(group: GroupStore, ordinal: int, folder: RunFolder) -> None:
    """Tell the other ranks the folder of logger number ``ordinal``; for rank 0."""
    group.store.set(f"{_STORE_PREFIX}/{ordinal}", json.dumps(asdict(folder)))


def fetch(group: GroupStore, ordinal: int, timeout: timedelta = _TIMEOUT) -> RunFolder:
    """Wait for rank 0's folder of logger number ``ordinal``.

    Raises:
        RuntimeError: if rank 0 did not tell within ``timeout``.
    """
    key = f"{_STORE_PREFIX}/{ordinal}"
    deadline = time.monotonic() + timeout.total_seconds()
    # short looks instead of `store.wait`, during which Ctrl-C and SIGTERM would go unheard
    while not group.store.check([key]):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"Rank {group.rank} waited {timeout.total_seconds():g} s for rank 0 to say where the logs of "
                f"RankTensorBoardLogger number {ordinal} (counted from 0) go. Construct the loggers on every rank, "
                "in the same order, and give them to the same Trainer."
            )
        time.sleep(_POLL_SECONDS)
    return RunFolder(**json.loads(group.store.get(key)))


def publish_host(group: GroupStore) -> None:
    """Tell the other ranks on which machine this one runs."""
    group.store.set(f"{_STORE_PREFIX}/host/{group.rank}", socket.gethostname())


def host_names() -> list[str]:
    """Return the machines of the run, each once, in the order of their ranks: those that are known by now."""
    group = group_store()
    names = [socket.gethostname()]
    if group is not None:
        keys = [f"{_STORE_PREFIX}/host/{rank}" for rank in range(group.world_size)]
        names = [group.store.get(key).decode() for key in keys if group.store.check([key])] or names
    return list(dict.fromkeys(names))


def environment_facts() -> dict[str, Any]:
    """Return what the interpreter knows of a run: versions, seed (null where none was set), host names."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": _distribution_version("lightning"),
            "lightning_gossip": _distribution_version("lightning-gossip"),
        },
        "seed": int(seed) if seed else None,
        "hosts": host_names(),
    }


def _distribution_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # used from a source tree
        return None


def read_metadata(folder: str) -> dict[str, Any]:
    """Return the record in ``folder/metadata.json``; empty where there is none that can be read."""
    fs, path = url_to_fs(os.path.join(folder, METADATA_FILE))
    try:
        record = json.loads(fs.cat_file(path))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_metadata(folder: str, record: Mapping[str, Any]) -> None:
    """Write ``record`` to ``folder/metadata.json``; a reader sees the old file or the new one, never a
    part."""
    fs, path = url_to_fs(os.path.join(folder, METADATA_FILE))
    data = json.dumps(record, indent=2, default=str).encode() + b"\n"
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)  # object stores show an object only once it is whole
        return
    # in the same folder: os.replace is atomic within one file system only
    temporary = f"{path}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
