"""Checkpoints of replicas: an ordinary ``.ckpt`` with the consensus model, and each rank's file beside it (design §4).

::

    last.ckpt                              what Lightning reads; names a save id
    last.ckpt.replicas/<save id>/rank_0.pt each rank's whole checkpoint
                                 rank_1.pt

The replica files of a save are complete before its ``.ckpt`` appears under its name, and those of the save before are
removed only after that: whenever a process is killed, the ``.ckpt`` names a set of files that is whole. A folder lives
as long as its ``.ckpt``: where somebody else removed that, the next save into the same folder removes what is left.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import re
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from typing_extensions import override

from lightning_gossip.strategies.lightning_names import (
    _PATH,
    AsyncCheckpointIO,
    CheckpointIO,
    TorchCheckpointIO,
    _WrappingCheckpointIO,
    get_filesystem,
)

KEY = "lightning_gossip"
"""Of this package's entry in a checkpoint."""


_REFUSED = re.compile(r"(?:Unsupported (?:global|class|operand)[^:\n]*:|GLOBAL) ?(?:GLOBAL )?([A-Za-z_][\w.]*\.\w+)")
"""In torch's message: what ``weights_only`` does not load."""

_SAVE_ID = re.compile(r"[0-9a-f]{16}")


def new_save_id() -> str:
    """Return the id of a save: 16 hexadecimal digits."""
    return uuid.uuid4().hex[:16]


class ReplicaFileError(RuntimeError):
    """A replica file is missing, torn, or of another save; the message names it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's ``TorchCheckpointIO``, writing to a temporary file in the target folder and renaming it.

    Lightning's own moves a file from another folder, which on another file system copies it: a kill leaves half of it.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        target = _local_path(path)
        if storage_options is not None or target is None:
            super().save_checkpoint(checkpoint, path, storage_options)  # remote ones write whole objects
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")  # always the same name: the next save overwrites it
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _local_path(path: _PATH) -> Path | None:
    """Return a local ``path`` with ``~`` and ``file://`` resolved, as Lightning does; None for a remote one."""
    filesystem, name = url_to_fs(str(path))
    return Path(name) if isinstance(filesystem, LocalFileSystem) else None


def is_wrapper(checkpoint_io: CheckpointIO) -> TypeGuard[_WrappingCheckpointIO]:
    """Whether ``checkpoint_io`` adds something to another one."""
    return isinstance(checkpoint_io, _WrappingCheckpointIO)


def synchronous(checkpoint_io: CheckpointIO) -> CheckpointIO:
    """Return what writes at once: replica files have to be complete before the checkpoint that names them."""
    while isinstance(checkpoint_io, AsyncCheckpointIO) and checkpoint_io.checkpoint_io is not None:
        checkpoint_io = checkpoint_io.checkpoint_io
    return checkpoint_io


def replica_folder(path: _PATH) -> str:
    """Return the folder of all replica files of the checkpoint at ``path``."""
    return f"{path}.replicas"


def replica_path(path: _PATH, save_id: str, rank: int) -> str:
    """Return the path of a rank's file of one save."""
    return f"{replica_folder(path)}/{save_id}/rank_{rank}.pt"


def followed(path: _PATH) -> str:
    """Return ``path`` with symbolic links followed, where it is a local one: replica files lie beside the target."""
    local = _local_path(path)
    return str(path) if local is None else os.path.realpath(local)


def load_replica(
    checkpoint_io: CheckpointIO, path: _PATH, save_id: str, rank: int, weights_only: bool | None
) -> dict[str, Any]:
    """Return a rank's own checkpoint of the save that the ``.ckpt`` at ``path`` names.

    Args:
        checkpoint_io: that wrote it.
        path: of the ``.ckpt``.
        save_id: that stands in it.
        rank: of this process.
        weights_only: whatever the ``.ckpt`` was trusted with; None: what torch does by default, which lets nothing that
            is loaded run code, unless the user has set ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD``.

    Raises:
        ReplicaFileError: if the file is missing, torn, refused, or of another save or rank.
    """
    file = replica_path(path, save_id, rank)
    try:
        loaded = checkpoint_io.load_checkpoint(file, weights_only=weights_only)
    except FileNotFoundError as error:
        raise ReplicaFileError(f"replica file {file} is missing") from error
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise ReplicaFileError(f"replica file {file} is torn or unreadable ({error})") from error
        name = refused[1]
        raise ReplicaFileError(
            f"replica file {file} is whole, but it holds {name}, which is not loaded unless you trust it: call"
            f" `torch.serialization.add_safe_globals([{name.rpartition('.')[2]}])`, or, if all of the file is to be"
            " trusted, `fit(…, weights_only=False)`"
        ) from error
    except Exception as error:
        raise ReplicaFileError(
            f"replica file {file} is torn or unreadable ({type(error).__name__}: {error})"
        ) from error
    entry = loaded.get(KEY, {}) if isinstance(loaded, Mapping) else {}
    if (entry.get("save_id"), entry.get("rank")) != (save_id, rank):
        raise ReplicaFileError(
            f"replica file {file} is of save {entry.get('save_id')!r} and rank {entry.get('rank')!r},"
            f" not of save {save_id!r} and rank {rank}"
        )
    return dict(loaded)


def exists(path: _PATH) -> bool:
    """Whether there is a file or folder of that name."""
    return bool(get_filesystem(path).exists(str(path)))


def other_saves(path: _PATH, save_id: str) -> list[str]:
    """Return the ids of all other saves to ``path`` whose replica files are there, interrupted ones among them."""
    folder = replica_folder(path)
    if not exists(folder):
        return []
    names = (os.path.basename(str(entry).rstrip("/")) for entry in get_filesystem(folder).ls(folder, detail=False))
    return [name for name in names if name != save_id]


def orphans(path: _PATH, saved: Collection[str], since: float) -> list[str]:
    """Return the folders of replica files beside those of ``path`` whose ``.ckpt`` is gone.

    Only on local file systems, and none that another run may be about to write the ``.ckpt`` for.

    Args:
        path: of a ``.ckpt``.
        saved: paths of all that this run has written.
        since: when this run began, in seconds since the epoch; folders that are older count too.
    """
    local = _local_path(path)
    if local is None:
        return []
    own = {_local_path(other) for other in saved}
    found = []
    for folder in local.parent.glob("*.replicas"):
        target = folder.with_name(folder.name.removesuffix(".replicas"))
        temporary = target.with_name(f".{target.name}.tmp")
        saves = list(folder.iterdir()) if folder.is_dir() else []
        ours = bool(saves) and all(_SAVE_ID.fullmatch(save.name) for save in saves)
        if ours and not os.path.lexists(target) and not temporary.exists():
            newest = max((file.stat().st_mtime for save in saves for file in (save, *save.glob("*"))), default=since)
            if target in own or newest < since:
                found.append(str(folder))
    return found


def remove_saves(checkpoint_io: CheckpointIO, path: _PATH, save_ids: Iterable[str]) -> None:
    """Remove the replica files of these saves to ``path``, as far as they are still there."""
    for save_id in save_ids:
        remove(checkpoint_io, f"{replica_folder(path)}/{save_id}")


def remove(checkpoint_io: CheckpointIO, path: _PATH) -> None:
    """Remove a file or folder that another process may be removing too."""
    with contextlib.suppress(FileNotFoundError):
        checkpoint_io.remove_checkpoint(path)


def remove_save(checkpoint_io: CheckpointIO, path: _PATH, save_id: str) -> None:
    """Remove the replica files of a save that did not come to its end, unless the ``.ckpt`` names them already."""
    folder = replica_folder(path)
    with contextlib.suppress(Exception):  # there is no readable checkpoint, so it names nothing
        if checkpoint_io.load_checkpoint(path, weights_only=True)[KEY]["save_id"] == save_id:
            return
    remove(checkpoint_io, f"{folder}/{save_id}")
    if (local := _local_path(folder)) is not None:
        with contextlib.suppress(OSError):  # there, and empty
            local.rmdir()


def rng_state() -> dict[str, Any]:
    """Return the states of all random number generators of this process, as tensors and numbers."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    # numpy's global generator, which data sets and transforms still use
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    state["numpy"] = {
        "name": name,
        "keys": torch.tensor(keys.astype(np.int64)),
        "position": position,
        "has_gauss": has_gauss,
        "cached": cached,
    }
    return state


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Continue all generators from what :func:`rng_state` returned."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
