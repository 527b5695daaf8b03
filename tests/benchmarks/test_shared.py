"""benchmarks/shared: rows that are kept, lists of options, ranks that are watched until they end."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.shared.options import at_least, listed, one_of
from benchmarks.shared.ranks import environment, watch
from benchmarks.shared.rows import append, find, read, rounds_missing, write

FORK = """
import os, sys, time
from benchmarks.shared.ranks import fork_ranks
def rank():
    with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as file:
        print(os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"], file=file)
    if sys.argv[2] == "fail" and os.environ["RANK"] == "1":
        sys.exit(3)
    if sys.argv[2] == "hang":
        time.sleep(600)
fork_ranks(2, rank, seconds=3.0)
"""


def test_rows_are_read_as_they_were_kept(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.csv"
    assert read(file) == []
    append(file, [{"setup": "a, b", "round": 0, "ms": 1.23456}])
    append(file, [{"setup": "c", "round": 1, "ms": None}], digits=2)
    assert read(file) == [{"setup": "a, b", "round": "0", "ms": "1.235"}, {"setup": "c", "round": "1", "ms": ""}]
    assert find(read(file), {"setup": "a, b", "ms": 1.235}) == read(file)[:1]
    with pytest.raises(ValueError, match=r"has the columns \['setup', 'round', 'ms'\], not \['other'\]"):
        append(file, [{"other": 1}])


def test_a_file_is_written_whole_and_its_comment_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    write(file, ["x"], [{"x": 0.1 + 0.2}])
    assert read(file) == [{"x": "0.30000000000000004"}]
    write(file, ["x"], [{"x": 2.0}], digits=3, comment="two cores")
    append(file, [{"x": 3.0}])
    assert file.read_text() == "# two cores\nx\n2\n3\n"
    assert read(file) == [{"x": "2"}, {"x": "3"}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_round_is_missing_where_one_block_is() -> None:
    rows = [{"setup": name, "round": round_} for name, round_ in (("a", "0"), ("b", "0"), ("a", "1"))]
    assert rounds_missing(rows, ["a", "b"], 3) == [1, 2]
    assert rounds_missing(rows, (name for name in "a"), 3) == [2]


@pytest.mark.parametrize(
    ("convert", "text", "message"),
    [
        (listed(at_least(2)), "2,1", "must be at least 2, got 1"),
        (listed(at_least(2)), "2,x", "'x' is no whole number"),
        (listed(one_of(["mlp", "convnet"])), "mlp,cnn", "'cnn' is none of mlp, convnet"),
        (listed(float), "1,", "could not convert string to float: ''"),
    ],
)
def test_lists_that_are_refused(convert: Callable[[str], list[object]], text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        convert(text)


def test_ranks_of_two_nodes() -> None:
    third = environment(rank=2, ranks=4, on_a_node=2, address="10.0.0.1", port=29500)
    assert [third[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE")] == ["2", "0", "1", "2"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("how", "message"), [("fail", "rank 1 ended with exit code 3"), ("hang", "within 3 s")])
def test_forked_ranks_that_end_badly_are_named_and_none_is_left(tmp_path: Path, how: str, message: str) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path), how]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert message in ran.stderr.splitlines()[-1]
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == ["0 2 127.0.0.1\n", "1 2 127.0.0.1\n"]


def test_forked_ranks_that_end_well(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK, str(tmp_path), "end"], cwd=ROOT, check=True, timeout=60)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_others_get_time_to_end_once_a_rank_has_failed() -> None:
    codes: list[list[int | None]] = [[None, None], [None, 1], [None, 1], [-15, 1]]
    with pytest.raises(RuntimeError, match="rank 1 ended with exit code 1"):
        watch(lambda: codes.pop(0), seconds=60)
    assert codes == [], "it waited for rank 0"
