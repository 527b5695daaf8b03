"""`lightning-gossip plan`: a workload in, a table, a picture and a recommendation out."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from lightning_gossip.__main__ import main
from lightning_gossip.monitoring import plan_inputs
from lightning_gossip.monitoring.plan import Plan, make_plan
from lightning_gossip.monitoring.plan_inputs import measure_step, parse_parameters, read_checkpoint
from lightning_gossip.monitoring.plan_schemes import (
    SCHEMES,
    AllReduced,
    Asynchronous,
    Downpour,
    Gossip,
    Outer,
    Scheme,
    Workload,
)
from lightning_gossip.rules.simulation import TCP_SHARE

LAN = Workload(parameters=5_000_000, ranks=8, mbit=10_000, step_ms=600)
SLOW_LINK = Workload(parameters=2_900_000, ranks=4, mbit=200, step_ms=28.4)
UNEVEN = Workload(parameters=5_000_000, ranks=8, mbit=10_000, step_ms=600, straggler=3)
PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
OPTIONS = ["--ranks", "4", "--mbit", "200", "--step-ms", "28.4"]


# What is given


@pytest.mark.parametrize(
    ("text", "number"),
    [("4810", 4810), ("25M", 25_000_000), ("1.3B", 1_300_000_000), ("350k", 350_000), ("2.9e6", 2_900_000)],
)
def test_a_number_of_parameters_may_be_short(text: str, number: int) -> None:
    assert parse_parameters(text) == number


@pytest.mark.parametrize("inside", ["whole", "state_dict", "model"])
def test_a_checkpoint_says_the_size(inside: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False)).bfloat16()
    network[2].weight = network[0].weight
    state: Any = network.state_dict()
    torch.save(state if inside == "whole" else {inside: state, "epoch": 3}, tmp_path / "model.ckpt")
    numel = 64 + 4 * 8  # a tied weight once, no count of batches
    assert read_checkpoint(tmp_path / "model.ckpt") == (numel, 2 * numel)


def test_a_measured_step_takes_its_time() -> None:
    assert 0 < measure_step(1_000) < 1_000


def wrong(tmp_path: Path) -> list[tuple[list[str], str]]:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    size, missing = ["--parameters", "25M"], tmp_path / "missing.ckpt"
    return [
        (
            ["--parameters", "many", *OPTIONS],
            "`parameters` must be a number above 0, such as 4810, 25M or 1.3B, got 'm",
        ),
        (["--parameters", "0", *OPTIONS], "`parameters` must be a number above 0"),
        ([*size, *OPTIONS, "--ranks", "1"], "`ranks` must be an integer of at least 2, got 1"),
        ([*size, *OPTIONS, "--ranks", "2.5"], "argument --ranks: invalid int value: '2.5'"),
        ([*size, *OPTIONS, "--mbit", "0"], "`mbit` must be a number in (0, inf), got 0.0"),
        ([*size, *OPTIONS, "--latency-ms", "-1"], "`latency_ms` must be a number in [0, inf), got -1.0"),
        ([*size, *OPTIONS, "--step-ms", "nan"], "`step_ms` must be a number in (0, inf), got nan"),
        ([*size, *OPTIONS, "--straggler", "0.5"], "`straggler` must be a number in [1, inf), got 0.5"),
        ([*size, *OPTIONS, "--cores-per-rank", "0"], "`cores_per_rank` must be a number in (0, inf), got 0.0"),
        ([*size, *OPTIONS, "--wire-dtype", "bf16"], "`wire_dtype` must be a dtype or its name: for 'bf16' say 'bfl"),
        ([*size, *OPTIONS, "--measure"], "argument --measure: not allowed with argument --step-ms"),
        ([*size, *OPTIONS[:4]], "one of the arguments --step-ms --measure is required"),
        (OPTIONS, "one of the arguments --parameters --checkpoint is required"),
        (["--parameters", "1B", *OPTIONS[:4], "--measure"], "`measure` takes models of at most 250,000,000 param"),
        (
            ["--checkpoint", str(missing), *OPTIONS],
            f"`checkpoint` must be a file that torch.save wrote, got '{missing}",
        ),
        (["--checkpoint", str(tmp_path / "text.ckpt"), *OPTIONS], "`checkpoint` must be a file that torch.load(weig"),
        (["--checkpoint", str(tmp_path / "empty.ckpt"), *OPTIONS], "`checkpoint` must hold the state_dict of a model"),
    ]


def test_what_is_not_allowed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in wrong(tmp_path):
        with pytest.raises(SystemExit) as end:
            main(["plan", *arguments])
        assert end.value.code == 2
        assert f"lightning-gossip plan: error: {message}" in capsys.readouterr().err


# What each scheme does


def test_an_all_reduce_is_what_the_link_takes() -> None:
    outlook = AllReduced().outlook(SLOW_LINK)
    sent = 1.5 * 4 * 2.9e6
    transfer = sent * 8 / (200e6 * TCP_SHARE) + 6e-4
    assert outlook.step == pytest.approx(0.0284 / 3 + transfer + 0.75e-9 * sent)
    assert outlook.sent == pytest.approx(sent / outlook.step)
    assert outlook.distance == 0


def test_rounds_of_all_wait_for_what_a_step_does_not_hide() -> None:
    outlook = Outer("LocalSGD", 1, 32).outlook(SLOW_LINK)
    sent = 1.5 * 4 * 2.9e6
    late = sent * 8 / (200e6 * TCP_SHARE) + 2e-4 - 0.0284
    assert outlook.step == pytest.approx(0.0284 + (late + 1.8e-9 * sent) / 32)
    assert outlook.waited == pytest.approx(late / 32 / outlook.step)
    drifts = [math.sqrt(step % 32 * 3 / 4) for step in range(32)]  # random walks of 4 ranks, from their mean
    assert outlook.distance == pytest.approx(math.sqrt(sum(d * d for d in drifts) / 32))


def test_a_slow_rank_sets_the_pace_by_step_and_holds_up_nobody_else() -> None:
    for scheme in (AllReduced(), Gossip(8), Outer("DiLoCo", 2, 32)):
        assert scheme.outlook(UNEVEN).step == pytest.approx(1.8, rel=0.05)
        assert scheme.outlook(UNEVEN).waited == pytest.approx(7 / 8 * 2 / 3, abs=0.03)
    for free in (Asynchronous(8), Downpour(8)):
        assert free.outlook(UNEVEN).rate == pytest.approx(UNEVEN.rate_alone, rel=0.02)
        assert free.outlook(UNEVEN).waited == 0


def test_ranks_of_one_pace_gossip_asynchronously_as_by_step() -> None:
    by_step, free = Gossip(8).outlook(LAN), Asynchronous(8).outlook(LAN)
    assert free.distance == pytest.approx(by_step.distance, rel=0.15)
    assert free.sent == pytest.approx(by_step.sent, rel=0.03)


@pytest.mark.parametrize("period", [1, 8])
def test_merged_steps_change_little(period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Workload(parameters=2_900_000, ranks=16, mbit=50, step_ms=28.4)  # 68 steps an exchange
    merged = Asynchronous(period).outlook(slow)
    monkeypatch.setattr("lightning_gossip.monitoring.plan_schemes.FINEST", 1000)
    single = Asynchronous(period).outlook(slow)
    assert merged.sent == pytest.approx(single.sent, rel=0.1)
    assert merged.distance == pytest.approx(single.distance, rel=0.15)


def test_what_ranks_never_send_in_time_is_bounded_by_the_link() -> None:
    slow = Workload(parameters=10**9, ranks=8, mbit=100, step_ms=500)
    for scheme in SCHEMES:
        assert scheme.outlook(slow).sent <= 1.02 * 100e6 / 8 * TCP_SHARE, scheme.name
    assert Downpour(8).outlook(slow).sent <= 100e6 / 8 / 8, "the server's link is shared by all"


@pytest.mark.parametrize(
    ("scheme", "copies", "half"),
    [
        (AllReduced(), 1, 1),
        (Gossip(8), 2, 1),
        (Asynchronous(8), 2, 1),
        (Outer("LocalSGD", 1, 32), 3, 3),
        (Outer("DiLoCo", 2, 32), 4, 4),
        (Downpour(8), 3, 3),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else "",
)
def test_copies_that_a_rank_keeps(scheme: Scheme, copies: int, half: int) -> None:
    """On one host copies of 1.0, 2.0, 3.1 and 4.1 were measured for DDP, gossip, LocalSGD and DiLoCo."""
    narrow = Workload(SLOW_LINK.parameters, 4, 200, 28.4, wire_dtype="bfloat16")
    assert scheme.outlook(SLOW_LINK).memory == copies * SLOW_LINK.size
    assert scheme.outlook(narrow).memory == half * SLOW_LINK.size


def test_a_narrower_wire_halves_what_is_sent() -> None:
    narrow = Workload(LAN.parameters, LAN.ranks, LAN.mbit, LAN.step_ms, wire_dtype="bfloat16")
    assert Gossip(8).outlook(narrow).sent == pytest.approx(Gossip(8).outlook(LAN).sent / 2, rel=0.02)
    assert AllReduced().outlook(narrow).sent == AllReduced().outlook(LAN).sent
    assert Workload(10, 2, 1, 1, nbytes=20, wire_dtype="bfloat16").payload == 20, "it is narrow already"


# What is recommended


@pytest.mark.parametrize(
    ("workload", "recommended"),
    [(LAN, '"ddp"'), (SLOW_LINK, "ElasticGossipStrategy(period=32, delay=31)"),
     (UNEVEN, "ElasticGossipStrategy(period=1, asynchronous=True)")],
    ids=["LAN", "200 Mbit/s", "uneven machines"],
)  # fmt: skip
def test_the_nearest_that_keep_up_are_recommended(workload: Workload, recommended: str) -> None:
    plan = make_plan(workload)
    assert plan.recommended.code == recommended
    assert "of 5 % allowed" in plan.reason


def test_where_nothing_keeps_up_it_is_the_fastest() -> None:
    plan = make_plan(SLOW_LINK, [AllReduced(), Gossip(1), Gossip(8)])
    assert plan.recommended == Gossip(8)
    assert plan.reason == "all lose more than 5 % of the steps, and it is the fastest"


def test_equals_are_told_apart_by_bytes_then_by_memory() -> None:
    plan = make_plan(LAN, [Outer("DiLoCo", 2, 32), Outer("LocalSGD", 1, 32)])
    assert plan.recommended == Outer("LocalSGD", 1, 32)
    assert plan.reason.endswith(", and sends and stores least")


def test_a_link_that_is_much_too_slow_is_said_to_be() -> None:
    plan = make_plan(Workload(10**9, 8, 10, 500), [Asynchronous(8), Downpour(8)])
    assert "but one payload takes 6,692 steps on this link" in plan.reason


# What is shown


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(SLOW_LINK)


def test_the_command_prints_a_table_and_writes_files(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--parameters", "2.9M", *OPTIONS, "--out", str(tmp_path / "new")]) == 0
    table, _, rest = capsys.readouterr().out.partition("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["scheme", "steps/s", "waited, %", "GB/rank/day", "distance", "memory, MB"]
    assert [row[0] for row in rows[2:]] == [scheme.name for scheme in SCHEMES]
    assert rows[2] == ["DDP", "1.33", "94.5", "2,002", "0.00", "11.6"]
    assert rows[-1][4] == "-", "nothing is made up for Downpour"
    assert f"recommended: {plan.recommended.code}, because {plan.reason}." in " ".join(rest.split())
    assert table in PAGE.read_text(), "it shows what the command prints"
    with (tmp_path / "new" / "plan.csv").open() as stream:
        written = list(csv.DictReader(stream))
    assert [row["code"] for row in written] == [scheme.code for scheme in SCHEMES]
    for row, outlook in zip(written, plan.outlooks.values(), strict=True):
        assert float(row["step_seconds"]) == pytest.approx(outlook.step, rel=1e-5)
        assert float(row["bytes_a_second"]) == pytest.approx(outlook.sent, rel=1e-5)
        assert row["distance"] == ("" if outlook.distance is None else f"{outlook.distance:.6g}")
    assert [row["code"] for row in written if row["recommended"] == "1"] == [plan.recommended.code]
    picture = tmp_path / "new" / "plan.png"
    assert picture.stat().st_size > 10_000
    height, width, _ = imread(picture).shape
    assert width == 2600
    assert 800 < height < 1200


def test_a_checkpoint_and_a_measured_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(nn.Linear(1000, 2900, bias=False).state_dict(), tmp_path / "model.pt")
    monkeypatch.setattr(plan_inputs, "measure_step", lambda parameters: 28.4 * parameters / 2.9e6)
    assert main(["plan", "--checkpoint", str(tmp_path / "model.pt"), *OPTIONS[:4], "--measure"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("measured: 28.4 ms a step\n")
    assert "| 2,002 |" in out.replace("  ", "")


def test_without_matplotlib_there_is_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("plan_plots", "report_plots"):
        monkeypatch.delitem(sys.modules, f"lightning_gossip.monitoring.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "--parameters", "1k", *OPTIONS, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "recommended: " in printed.out
    assert "plan: package 'matplotlib' is missing: pip install 'lightning-gossip[report]'" in printed.err
