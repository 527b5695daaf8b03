"""benchmarks/text: ids, bytes, computed times, what a curve comes to, and a training of two ranks."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ROOT
from benchmarks.shared.rows import append, read
from benchmarks.text import step
from benchmarks.text.links import BANDWIDTH, LATENCY, Link, means, reduced, ring
from benchmarks.text.report import Curve, against_diloco, load, payload, sooner, table, tried
from benchmarks.text.schemes import OUTER, POST_LOCAL_START, POWERSGD_START, ROWS, Row
from benchmarks.text.training import Setting
from lightning_gossip import DiLoCoStrategy, ElasticGossipStrategy

SETTING = Setting("nano", 0.003, 200, 64, 64, seed=0)


def curve(row: Row, loss: Sequence[float], seconds: Sequence[float], mb_sent: float = 1.0) -> Curve:
    updates = np.arange(len(loss), dtype=float)
    sent = np.linspace(0, mb_sent, len(loss))
    return Curve(row, 0, updates, np.array(loss), sent, [loss[-1]] * row.ranks, 0.0, np.array(seconds))


def test_ids_say_what_is_trained() -> None:
    assert {"ddp", "diloco-25", "elastic-outer-100", "diloco-25@8", "powersgd-4"} <= set(ROWS)
    assert [ROWS[name].id for name in ROWS] == list(ROWS)
    assert ROWS["elastic-outer-25@8"].title == "elastic gossip, outer step, period 25, 8 ranks"


def test_the_outer_step_is_the_same_for_both() -> None:
    diloco, elastic = (ROWS[f"{name}-25"].strategy(seed=3) for name in ("diloco", "elastic-outer"))
    assert isinstance(diloco, DiLoCoStrategy)
    assert isinstance(elastic, ElasticGossipStrategy)
    for strategy in (diloco, elastic):
        assert OUTER.items() <= strategy.hyperparameters.items()
    plain = ROWS["elastic-25"].strategy(seed=3)
    assert isinstance(plain, ElasticGossipStrategy)
    assert plain.outer is None


def test_what_ddp_reduces() -> None:
    assert ring(4) == 1.5
    assert reduced(Row("ddp"), 600, 10.0, 0.0) == 6000
    assert reduced(Row("powersgd-1"), 600, 10.0, 7.0) == POWERSGD_START * 10 + 7
    # gradients of 99 updates, and means after update 100, 125, ..., 600
    row = Row("post-local", 25)
    assert [means(row, updates) for updates in (0, 99, 100, 124, 125, 600)] == [0, 0, 1, 1, 2, 21]
    assert reduced(row, 600, 10.0, 0.0) == (POST_LOCAL_START - 1 + 21) * 10


def test_times_by_hand() -> None:
    size = 1e6
    wire = size * 8 / (BANDWIDTH * 1448 / 1514)
    quick, slow = Link(compute=0.01, payload=size), Link(compute=1.0, payload=size)
    reduce = 1.5 * wire + 6 * LATENCY
    assert quick.seconds(Row("ddp"), 10) == pytest.approx(10 * (0.01 / 3 + reduce))
    assert slow.seconds(Row("ddp"), 10) == pytest.approx(10)  # all beside the backward pass
    assert quick.seconds(Row("diloco", 5), 10) == pytest.approx(8 * 0.01 + 2 * reduce)
    assert quick.seconds(Row("elastic-outer", 5), 10) == pytest.approx(8 * 0.01 + 2 * (wire + LATENCY))
    assert slow.seconds(Row("diloco", 5), 10) == slow.seconds(Row("elastic", 5), 10) == 10
    local = quick.seconds(Row("post-local", 25), 200) - quick.seconds(Row("post-local", 25), 99)
    assert local == pytest.approx(101 * 0.01 + 5 * reduce)
    compressed = Link(0.01, size, compressed=size / 100, compressing=0.02)
    one = compressed.seconds(Row("powersgd-1"), POWERSGD_START + 1) - compressed.seconds(
        Row("powersgd-1"), POWERSGD_START
    )
    assert one == pytest.approx(0.02 + 1.5 * wire / 100 + 18 * LATENCY)


def test_a_loss_is_reached_on_the_line_between_two_looks() -> None:
    own = curve(Row("diloco", 25), [4.0, 3.0, 3.5, 2.0], [0.0, 10.0, 20.0, 30.0])
    assert own.reaches(4.0) == 0
    assert own.reaches(3.5) == 5
    assert own.reaches(2.5) == pytest.approx(25)
    assert math.isnan(own.reaches(1.9))
    ddp = curve(Row("ddp"), [4.0, 2.0], [0.0, 400.0])
    # DDP has 2.06 after 388 s, the other after 29.4
    assert sooner(own, ddp) == pytest.approx(388 / 29.4)


def test_the_table_compares_seed_by_seed() -> None:
    curves = {
        "ddp": [curve(Row("ddp"), [4.0, 2.0], [0.0, 400.0], mb_sent=100)],
        "diloco-25": [curve(Row("diloco", 25), [4.0, 2.05], [0.0, 20.0], mb_sent=6)],
        "elastic-outer-25": [curve(Row("elastic-outer", 25), [4.0, 2.0705], [0.0, 20.0], mb_sent=4)],
    }
    head, _, ddp, diloco, elastic = table(curves).splitlines()
    assert "sooner to DDP's + 3 %" in head
    assert "| +0.0 % |" in ddp
    assert "| +2.5 % |" in diloco
    assert "| 6 | 0.0600 |" in diloco
    assert elastic.endswith("| – |")
    [line] = against_diloco(curves)
    assert line == "elastic gossip, outer step, period 25: +1.00 % of DiLoCo's loss, 0.667 of its bytes"


def test_rows_are_read_with_the_steps_that_were_measured(tmp_path: Path) -> None:
    key = {"id": "ddp", "ranks": 4, "model": "nano", "lr": 0.003, "steps": 200, "batch": 64, "context": 64, "seed": 0}
    looks = [
        {"updates": u, "loss": loss, "replicas": "2.5 2.5", "distance": 0.0, "mb_sent": u / 10}
        for u, loss in ((0, 5.0), (100, 3.0), (100, 3.0), (200, 2.5))  # one was there when a run was ended
    ]
    append(tmp_path / "text_curves.csv", [key | look for look in looks])
    assert load(tmp_path, SETTING, ["ddp"], [0]) == {}  # of a training that is whole there is a row
    append(tmp_path / "text.csv", [key | {"loss": 2.5, "distance": 0.0}])
    for round_, cpu_ms in enumerate((10.0, 30.0, 20.0)):
        row = {"model": "nano", "context": 64, "windows": 16, "setup": "none", "round": round_, "cpu_ms": cpu_ms}
        append(tmp_path / step.FILE, [row])
    [own] = load(tmp_path, SETTING, ["ddp", "diloco-25"], [0, 1])["ddp"]
    assert own.updates.tolist() == [0, 100, 200]
    assert own.replicas == [2.5, 2.5]
    assert tried(tmp_path, SETTING).count("\n") == 1  # one learning rate alone says nothing
    append(tmp_path / "text.csv", [key | {"lr": 0.001, "loss": 2.6, "distance": 0.0}])
    assert "| DDP | 2.600 | 2.500 |" in tried(tmp_path, SETTING)
    assert own.seconds[-1] == pytest.approx(Link(0.02, payload("nano")).seconds(Row("ddp"), 200))


@pytest.mark.long
@pytest.mark.processes
def test_a_training_is_kept_and_not_run_again(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "benchmarks.text",
        "--rows",
        "elastic-outer-25",
        "--seeds",
        "0",
        "--out",
        str(tmp_path),
    ]
    line += ["--steps", "100", "--batch", "4", "--context", "16"]
    for _ in range(2):
        subprocess.run(line, cwd=ROOT, check=True, timeout=300)
    [row] = read(tmp_path / "text.csv")
    points = read(tmp_path / "text_curves.csv")
    assert [int(point["updates"]) for point in points] == [0, 50, 100]
    assert float(points[0]["loss"]) > float(row["loss"]) == float(points[-1]["loss"]) > 0
    assert len(points[-1]["replicas"].split()) == 4
    # two ranks of each pair send all parameters in each of four rounds
    assert float(row["mb_sent"]) == pytest.approx(4 * payload("nano") / 1e6, rel=1e-4)
    shown = subprocess.run([*line, "--table"], cwd=ROOT, check=True, timeout=120, capture_output=True, text=True)
    assert "elastic gossip, outer step, period 25" in shown.stdout
