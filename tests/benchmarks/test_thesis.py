"""benchmarks/thesis: ids, files of results and claims; no training."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks import RESULTS, ROOT
from benchmarks.thesis.checks import RATES, check
from benchmarks.thesis.results import (
    COLUMNS,
    CURVE_COLUMNS,
    Results,
    add,
    cut_torn_event_files,
    finished,
    load,
    read_curve,
)
from benchmarks.thesis.rows import EXPERIMENTS, METHODS, TABLES, parse
from benchmarks.thesis.table import as_markdown, published
from lightning_gossip.monitoring.event_files import UnreadableRunError

REFERENCES = sorted(RESULTS.glob("reference_thesis_*.csv"))


def lines_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in file.read_text().splitlines() if not line.startswith("#")))


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_ids_mean_what_the_published_tables_say(file: Path) -> None:
    lines = lines_of(file)
    assert len(lines) > 8
    for line in lines:
        row = parse(line["id"])
        assert METHODS[row.method][0] == line["method"]
        assert (row.workers, row.period) == (int(line["workers"]), int(line["period"] or 1))
        assert (row.probability or 0) == float(line["probability"] or 0)
        assert row.alpha == (float(line["alpha"]) if line["alpha"] else None)


@pytest.mark.parametrize(
    "row_id", ["EG-4", "GS-4-0.3", "GS-4-0.125-0.5", "AR-4-0.125", "EG-4-0.125-1.5", "XX-4", "EG-0-0.5"]
)
def test_other_ids_are_refused(row_id: str) -> None:
    with pytest.raises(ValueError, match=row_id):
        parse(row_id)


def test_tables_hold_rows_and_known_experiments() -> None:
    for experiment, ids in TABLES.values():
        assert experiment in EXPERIMENTS
        assert len({parse(row_id) for row_id in ids}) == len(ids) > 0


def result(row_id: str, mean: float, consensus: float, seed: int = 1234) -> dict[str, Any]:
    known = {"id": row_id, "seed": seed, "epochs": 100, "mean_over_ranks": mean, "consensus_test_accuracy": consensus}
    return dict.fromkeys(COLUMNS, 0) | known


def test_rows_are_added_once_each_with_their_curves(tmp_path: Path) -> None:
    def curve(row: dict[str, Any], value: float) -> list[dict[str, Any]]:
        return [{name: row.get(name, value) for name in CURVE_COLUMNS} for _ in range(2)]

    rows = [result("EG-4-0.031", 0.5, 0.5), result("EG-4-0.031", 0.6, 0.6, seed=1235), result("EG-4-0.031", 0.7, 0.7)]
    for row in rows:
        add(tmp_path, "mnist", row, curve(row, row["mean_over_ranks"]))
    results = load(tmp_path, "mnist", "thesis_mnist")
    assert finished(tmp_path, "mnist") == {("EG-4-0.031", 1234, 100), ("EG-4-0.031", 1235, 100)}
    assert results.rows["mean_over_ranks"].tolist() == [0.6, 0.7]
    assert results.curves["mean"].tolist() == [0.6, 0.6, 0.7, 0.7]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["thesis_mnist.csv", "thesis_mnist_curves.csv"]


def test_curves_are_read_from_files_that_a_kill_tore(tmp_path: Path) -> None:
    for rank, accuracy in enumerate((0.25, 0.75)):
        writer = SummaryWriter(str(tmp_path / f"rank_{rank}"))
        for step in (399, 799):
            writer.add_scalar("val_accuracy", accuracy, step)
            writer.add_scalar("gossip/bytes_sent", 10 * (step + 1), step)
        writer.close()
    key = ("EG-4-0.031", 1234, 2)
    whole = read_curve(tmp_path, key, 0)
    [torn] = (tmp_path / "rank_1").iterdir()
    with torn.open("ab") as file:
        file.write(b"\x18\x00\x00\x00half")
    with pytest.raises(UnreadableRunError):
        read_curve(tmp_path, key, 0)
    cut_torn_event_files(tmp_path)
    assert read_curve(tmp_path, key, 0) == whole
    assert [[*line.values()][3:] for line in whole] == [[400, 0.5, 0.25, 0.75, 4000], [800, 0.5, 0.25, 0.75, 8000]]


def outcomes(changes: dict[str, float]) -> list[bool | None]:
    """Return what is claimed of the published numbers themselves, ``changes`` (points) added to the means of rows."""
    reference = load(Path("none"), "mnist", "thesis_mnist")
    ids = ["AR-4", "NC-4", *(f"{method}-4-{rate}" for method in ("EG", "GS") for rate in RATES)]
    figures = {row_id: published(reference, row_id) for row_id in ids}
    rows = [result(i, mean + changes.get(i, 0.0) / 100, consensus) for i, (mean, consensus) in figures.items()]
    for seed, sign in ((1235, 1), (1236, -1)):
        rows += [result(i, figures[i][0] + sign * 1e-4, 0.9, seed) for i in ("EG-4-0.031", "GS-4-0.031")]
    rows = [row for row in rows if changes.get(row["id"]) != float("inf")]
    return [o.holds for o in check(Results(pd.DataFrame(rows), reference.curves, reference.reference), 100)]


def test_claims_hold_of_the_published_numbers_and_fail_of_worse() -> None:
    assert outcomes({}) == [True] * 5
    assert outcomes({"EG-4-0.031": -0.4}) == [True] * 5
    assert outcomes({"EG-4-0.031": -0.4, "GS-4-0.125": 0.4})[0] is False
    assert outcomes({"EG-4-0.031": -0.5})[1] is False
    assert outcomes({"AR-4": 0.25})[2] is False
    assert outcomes({"NC-4": -0.55})[3] is False
    assert outcomes({"EG-4-0.002": -0.4, "EG-4-0.125": -0.4})[4] is False
    assert outcomes({"GS-4-0.008": float("inf")}) == [None, None, True, True, None]


def test_tables_name_the_thesis_only_beside_its_numbers() -> None:
    for name, cells in (("mnist", 9), ("cifar10_alexnet", 5)):
        experiment = EXPERIMENTS[name]
        known = load(Path("none"), name, experiment.reference)
        rows = pd.DataFrame([result("AR-4", 0.9, 0.9) | {"epochs": experiment.epochs}])
        text = as_markdown(experiment, Results(rows, known.curves, known.reference))
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert [line.count("|") - 1 for line in lines] == [cells] * 3
        assert ("thesis" in text) == (cells == 9)


@pytest.mark.long
def test_the_command_line_is_one_that_the_example_takes(tmp_path: Path) -> None:
    """Without data it ends with status 2 and says what was looked for, after it has taken all options."""
    script = [
        sys.executable,
        "-m",
        "benchmarks.thesis",
        "--rows",
        "GS-4-tau8",
        "--data-dir",
        str(tmp_path / "none"),
    ]
    folders = ["--work-dir", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    ran = subprocess.run([*script, *folders], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "ended with exit code 2" in ran.stderr
    [log] = (tmp_path / "work" / "mnist").glob("*.log")
    assert str(tmp_path / "none") in log.read_text()
    assert "usage:" not in log.read_text()
    assert not (tmp_path / "results").exists()


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="there are as many GPUs as it needs")
def test_rows_that_need_gpus_say_so(tmp_path: Path) -> None:
    script = [sys.executable, "-m", "benchmarks.thesis", "--table", "cifar10-resnet18-w4"]
    folders = ["--work-dir", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    ran = subprocess.run([*script, *folders], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "rows of 4 workers need as many GPUs" in ran.stderr
    assert not any(tmp_path.iterdir())
