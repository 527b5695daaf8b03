"""The storm of faults: its schedule, and its numbers by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.faults import storm_report as report
from benchmarks.faults.storm import CALM, Plan, run
from benchmarks.faults.storm_leaks import Holding, growth
from benchmarks.faults.storm_report import Fault, Step
from benchmarks.faults.storm_schemes import SCHEMES, launch_of
from benchmarks.shared.namespaces import NetworkUnavailable, check_requirements


def test_a_storm_is_the_same_for_all_schemes_and_leaves_time_at_both_ends() -> None:
    storms = [Plan(scheme, 8, 600, 0.1, 21, 1).storm() for scheme in ("asynchronous", "gossip", "ddp")]
    assert storms[0] == storms[1] == storms[2] != Plan("ddp", 8, 600, 0.1, 21, 2).storm()
    times = [fault.when for fault in storms[0]]
    assert times == sorted(times)
    assert times[0] >= CALM
    assert times[-1] <= 600 - CALM
    assert sorted(fault.kind for fault in storms[0]) == ["cut"] * 7 + ["kill"] * 7 + ["stop"] * 7
    assert all(one.rank != other.rank for one, other in zip(storms[0], storms[0][1:], strict=False))


def steps(rank: int, times: list[float], process: str = "a", first: int = 1, loss: float | None = None) -> list[Step]:
    return [Step(when, rank, process, first + k, loss) for k, when in enumerate(times)]


def test_a_rank_is_not_charged_for_its_own_faults_but_the_others_are() -> None:
    whole = [k / 2 for k in range(1, 21)]  # to 10 s
    killed = [*steps(1, [0.5, 1.0, 1.5]), *steps(1, [4.5, 5.0], "b", 4, loss=0.25)]
    made = sorted([*steps(0, whole, loss=0.75), *killed], key=lambda step: step.when)
    found = report.numbers("gossip", 2, made, [Fault(1.6, "kill", 1)], 0.0, 10.0)
    assert found["live_s"] == pytest.approx(2 * 10 - 2.9)
    assert found["steps"] == 25
    assert found["next_step_s"] == found["next_step_max_s"] == pytest.approx(0.4)
    assert found["back_s"] == found["back_max_s"] == pytest.approx(2.9)
    assert found["loss"] == 0.5


def test_a_standstill_of_all_is_no_outage_of_one() -> None:
    both = sorted([*steps(0, [1.0, 80.0]), *steps(1, [1.0, 80.0])], key=lambda step: step.when)
    found = report.numbers("ddp", 2, both, [Fault(2.0, "kill", 1)], 0.0, 100.0)
    assert found["live_s"] == 2 * 100 - report.OWN_MOST
    assert found["next_step_s"] == 78.0


def test_what_ddp_makes_twice_counts_once() -> None:
    again = [*steps(0, [1.0, 2.0, 3.0]), *steps(0, [5.0, 6.0, 7.0], "b", 2)]
    found = report.numbers("ddp", 1, again, [], 0.0, 8.0)
    assert found["steps"] == 4


def test_rows_are_kept_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = steps(0, [k / 2 for k in range(1, 21)], loss=0.5)
    fault = Fault(2.0, "stop", 0)
    report.keep(tmp_path, "gossip", 1.0, 0, 1, made, [], 0.0, 10.0)
    report.keep(tmp_path, "gossip", 1.0, 1, 1, made[:10], [fault], 0.0, 10.0)
    assert report.is_there(tmp_path, "gossip", 1, 1.0)
    assert not report.is_there(tmp_path, "ddp", 1, 1.0)
    report.show_table(tmp_path)
    assert "0.526" in capsys.readouterr().out, "10 of 19 steps: it was stopped for half a second"
    report.draw_all(tmp_path)
    assert (tmp_path / "faults_storm.png").stat().st_size > 10_000


def test_what_is_half_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "3_17.0_99").write_text("1.5,20,0.25\n1.6,21,\n1.7")
    assert report.steps_in(tmp_path) == [Step(1.5, 3, "3_17.0_99", 20, 0.25), Step(1.6, 3, "3_17.0_99", 21, None)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_ranks_are_started_one_way_or_the_other(scheme: str, tmp_path: Path) -> None:
    launch = launch_of(scheme, 8, 0.1, tmp_path, "10.0.0.9")
    assert launch.started == ((0,) if scheme == "ddp" else tuple(range(8)))
    assert launch.are_apart == (launch.server is not None) == (scheme != "ddp")
    assert str(tmp_path) in launch.command


def test_what_grows_is_seen_and_what_only_began_is_not() -> None:
    seen = [Holding(60.0 * k, 9, 100.0 if k < 3 else 250.0, 40, 12, 500 + k, 7) for k in range(40)]
    found = growth(seen)
    assert found == {"processes": 0, "memory_mib": 0, "descriptors": 0, "threads": 0, "keys": 20, "files": 0}


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.faults
@pytest.mark.timeout(5000)
@pytest.mark.parametrize("scheme", ["asynchronous", "gossip"])
def test_an_hour_of_storm_leaves_nothing_behind(scheme: str, tmp_path: Path) -> None:
    """125 faults; MINUTES in the environment makes it shorter."""
    try:
        check_requirements()
    except NetworkUnavailable as error:
        pytest.skip(str(error))
    minutes = float(os.environ.get("MINUTES", "60"))
    seen = run(Plan(scheme, 8, 60 * minutes, 0.1, round(125 * minutes / 60), 3), tmp_path / "run", watched=True)
    found = growth(seen.held)
    (tmp_path / "held.txt").write_text("\n".join(map(str, seen.held)))
    print(f"grown by: {found}; all looks are in {tmp_path / 'held.txt'}")
    assert found["processes"] == 0
    assert found["memory_mib"] < 10
    assert found["descriptors"] <= 4
    assert found["threads"] <= 2
    assert found["keys"] <= 10 * len(seen.faults)
    assert found["files"] <= 0
    made = report.numbers(scheme, 8, seen.steps, seen.faults, seen.began, seen.ended)
    assert (made["steps"] or 0) > 0.9 * (made["live_s"] or 0) / 0.11, made
