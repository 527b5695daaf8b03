"""RankTensorBoardLogger: one version folder for all ranks, whatever started them."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
from curves import AsProcess, Connect, scalars
from torch.distributed import HashStore

from lightning_gossip.monitoring.loggers import RankTensorBoardLogger


def test_children_of_the_launching_process_write_to_its_version(as_process: AsProcess, tmp_path: Path) -> None:
    (tmp_path / "run" / "version_4").mkdir(parents=True)
    launching = RankTensorBoardLogger(tmp_path, name="run")
    assert launching.log_dir == str(tmp_path / "run" / "version_5")
    for rank in (1, 2):
        as_process(rank)
        child = RankTensorBoardLogger(tmp_path, name="run")
        assert child.log_dir == launching.log_dir
        assert child.rank_dir == os.path.join(launching.log_dir, f"rank_{rank}")


def test_loggers_of_one_script_do_not_collide(as_process: AsProcess, tmp_path: Path) -> None:
    def script() -> list[str]:
        named = [RankTensorBoardLogger(tmp_path / d, name=n) for d, n in (("a", "x"), ("a", "y"), ("b", "x"))]
        again = RankTensorBoardLogger(tmp_path / "a", name="x")
        return [logger.log_dir for logger in (*named, again)]

    of_rank_zero = script()
    assert [os.path.relpath(folder, tmp_path) for folder in of_rank_zero] == [
        "a/x/version_0",
        "a/y/version_0",
        "b/x/version_0",
        "a/x/version_1",
    ]
    as_process(1)
    assert script() == of_rank_zero


def test_what_an_outer_run_handed_on_is_not_taken_over(as_process: AsProcess, tmp_path: Path) -> None:
    RankTensorBoardLogger(tmp_path / "outer")
    as_process(0)
    inner = RankTensorBoardLogger(tmp_path / "inner")
    as_process(1)
    assert RankTensorBoardLogger(tmp_path / "inner").log_dir == inner.log_dir


def test_a_rank_with_another_save_dir_follows_rank_zero_and_says_so(as_process: AsProcess, tmp_path: Path) -> None:
    first = RankTensorBoardLogger(tmp_path / "12:00:00")
    as_process(1)
    with pytest.warns(UserWarning, match=r"rank 1 was given save_dir=.*12:00:01.*follows rank 0.*12:00:00"):
        second = RankTensorBoardLogger(tmp_path / "12:00:01")
    second.log_metrics({"x": 1.0}, step=0)
    second.save()
    assert scalars(Path(first.log_dir) / "rank_1", "x") == [(0, 1.0)]
    assert not (tmp_path / "12:00:01").exists()


def test_ranks_started_from_outside_learn_the_version_from_the_store(
    as_process: AsProcess, connect: Connect, tmp_path: Path
) -> None:
    store = HashStore()
    as_process(0)
    first = RankTensorBoardLogger(tmp_path)
    second_run_of_rank_zero = RankTensorBoardLogger(tmp_path)
    as_process(3)
    handed_on = os.environ.pop("LIGHTNING_GOSSIP_RUN_FOLDERS")  # the fixture restores it
    follower = RankTensorBoardLogger(tmp_path)
    with pytest.raises(RuntimeError, match="Rank 3 does not know yet which version"):
        _ = follower.version
    connect(store, 0, 4)
    assert (first.version, second_run_of_rank_zero.version) == (0, 1)
    connect(store, 3, 4)
    assert follower.rank_dir == os.path.join(first.log_dir, "rank_3")
    # constructed while connected, as the second run of a script is
    assert RankTensorBoardLogger(tmp_path).log_dir == second_run_of_rank_zero.log_dir
    # what rank 0 would hand on to one that joins, any rank can
    assert json.loads(os.environ["LIGHTNING_GOSSIP_RUN_FOLDERS"]) == json.loads(handed_on)


@pytest.mark.parametrize("rank", [0, 2])
def test_one_that_joins_writes_where_the_run_does_whichever_rank_it_comes_for(
    as_process: AsProcess, tmp_path: Path, rank: int
) -> None:
    """It is started by a shell, and told of the run's folders once it has found the run."""
    as_process(0)
    first = RankTensorBoardLogger(tmp_path)
    told = os.environ.pop("LIGHTNING_GOSSIP_RUN_FOLDERS")
    as_process(rank)
    joiner = RankTensorBoardLogger(tmp_path)
    os.environ["LIGHTNING_GOSSIP_RUN_FOLDERS"] = told
    assert joiner.rank_dir == os.path.join(first.log_dir, f"rank_{rank}")
    assert not (tmp_path / "lightning_logs" / "version_1").exists()
    second = RankTensorBoardLogger(tmp_path)
    assert joiner.log_dir == first.log_dir, "a logger made later does not bring the old choice back"
    assert rank or second.log_dir != first.log_dir


def test_another_machines_launching_process_gives_up_its_own_choice(
    as_process: AsProcess, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk_1" / "lightning_logs" / "version_6").mkdir(parents=True)
    store = HashStore()
    monkeypatch.setenv("DISK", str(tmp_path / "disk_0"))
    first = RankTensorBoardLogger("$DISK")
    connect(store, 0, 8)
    assert first.version == 0
    as_process(0)  # before it is connected, the process takes itself for rank 0
    monkeypatch.setenv("DISK", str(tmp_path / "disk_1"))
    other = RankTensorBoardLogger("$DISK")
    own_choice = tmp_path / "disk_1" / "lightning_logs" / "version_7"
    assert own_choice.is_dir()
    connect(store, 4, 8)
    assert other.rank_dir == str(tmp_path / "disk_1" / "lightning_logs" / "version_0" / "rank_4")
    assert not own_choice.exists()


@pytest.mark.parametrize(("version", "folder"), [(7, "version_7"), ("final", "final")])
def test_a_given_version_is_appended_to(as_process: AsProcess, tmp_path: Path, version: int | str, folder: str) -> None:
    for step in (1, 2):
        as_process(0)
        logger = RankTensorBoardLogger(tmp_path, name="run", version=version)
        logger.log_metrics({"x": 10.0 * step}, step=step)
        logger.finalize("success")
    assert scalars(tmp_path / "run" / folder / "rank_0", "x") == [(1, 10.0), (2, 20.0)]


def test_a_logger_that_was_never_used_leaves_no_folder(as_process: AsProcess, tmp_path: Path) -> None:
    used, unused = RankTensorBoardLogger(tmp_path), RankTensorBoardLogger(tmp_path)
    used.log_metrics({"x": 1.0}, step=0)
    used.finalize("success")
    assert unused.version == 1
    del used, unused
    gc.collect()
    assert [folder.name for folder in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


def test_versions_are_counted_where_the_files_go(
    as_process: AsProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGS", str(tmp_path))
    for name in ("version_2", "version_10", "version_x", "other_11"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "version_99").touch()
    assert RankTensorBoardLogger("$LOGS", name="run").log_dir == str(tmp_path / "run" / "version_11")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_dir": 3}, "`save_dir` must be a path or a URL, got 3"),
        ({"name": 3}, "`name` must be a string or None, got 3"),
        ({"version": -1}, "`version` must be None, an integer of at least 0 or a folder's name, got -1"),
        ({"version": ""}, "`version` must be"),
        ({"version": True}, "`version` must be"),
        ({"prefix": None}, "`prefix` must be a string, got None"),
        ({"max_queue": 0}, "`max_queue` must be an integer of at least 1"),
        ({"flush_secs": "1"}, "`flush_secs` must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankTensorBoardLogger(**{"save_dir": tmp_path, **arguments})
    assert not list(tmp_path.iterdir())
