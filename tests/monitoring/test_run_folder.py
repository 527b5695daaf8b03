"""Choosing a version folder, hearing of it, and writing its metadata."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from lightning_gossip.monitoring import run_folder
from lightning_gossip.monitoring.run_folder import GroupStore


def test_waiting_for_rank_zero_ends_with_an_explanation() -> None:
    with pytest.raises(RuntimeError, match=r"Rank 2 waited 0\.1 s for rank 0 .* number 5 .* on every rank"):
        run_folder.fetch(GroupStore(HashStore(), 2, 4), 5, timeout=timedelta(seconds=0.1))


def test_a_folder_made_by_another_run_at_the_same_moment_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "next_version", lambda root: 0)  # both listed before either made its folder
    assert [run_folder.reserve_version(str(tmp_path)) for _ in range(3)] == [0, 1, 2]


def test_a_failed_write_leaves_the_old_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.write_metadata(str(tmp_path), {"alpha": 0.1})

    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run_folder.write_metadata(str(tmp_path), {"alpha": 0.2})
    assert run_folder.read_metadata(str(tmp_path)) == {"alpha": 0.1}
    assert [file.name for file in tmp_path.iterdir()] == ["metadata.json"]
