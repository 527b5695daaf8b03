"""`lightning-gossip report`: event files in, plots and a table out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from torch.utils.tensorboard import SummaryWriter

from lightning_gossip.__main__ import main
from lightning_gossip.monitoring import event_files, report_plots
from lightning_gossip.monitoring.event_files import choose_tag, read_run
from lightning_gossip.monitoring.report import as_markdown, final_numbers

START = 1.7e9  # of every run here, in seconds since the epoch
Points = Mapping[str, list[tuple[int, float]]]
"""For each tag the steps and values; step s is logged s seconds after the start."""


def write_rank(folder: Path, points: Points, late: float = 0.0) -> Path:
    writer = SummaryWriter(str(folder))
    for tag, values in points.items():
        for step, value in values:
            writer.add_scalar(tag, value, step, walltime=START + late + step)
    writer.close()
    return folder


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(START + seconds, UTC).isoformat()


def write_run(folder: Path, ranks: list[Points], **metadata: Any) -> Path:
    for rank, points in enumerate(ranks):
        write_rank(folder / f"rank_{rank}", points)
    (folder / "metadata.json").write_text(json.dumps({"start_time": stamp(0), **metadata}))
    return folder


GOSSIP: Points = {
    "val_acc": [(10, 0.5), (20, 0.75)],
    "val_loss": [(10, 1.5), (20, 0.5)],
    "consensus/val_acc": [(10, 0.6), (20, 0.8)],
    "gossip/consensus_distance": [(10, 0.0), (20, 0.01)],
    "gossip/partner_distance": [(10, 0.02), (20, 0.015)],
    "gossip/bytes_sent": [(10, 4e6), (20, 8e6)],
    "gossip/wait_seconds": [(10, 0.001), (20, 0.003)],
    "test_acc": [(21, 0.7)],
    "consensus/test_acc": [(21, 0.8)],
}
DOWNPOUR: Points = {
    "valid/accuracy": [(10, 40.0), (20, 60.0)],
    "downpour/bytes_sent": [(10, 1e6), (20, 2e6)],
    "downpour/wait_seconds": [(20, 0.5)],
    "downpour/staleness": [(10, 2.0), (20, 4.0)],
}


@pytest.fixture
def gossip_run(tmp_path: Path) -> Path:
    second = {tag: [(step, value + 0.125) for step, value in values] for tag, values in GOSSIP.items()}
    strategy = {"class": "lightning_gossip.strategies.GossipStrategy", "arguments": {"evaluate": "replica"}}
    return write_run(tmp_path / "logs" / "version_0", [GOSSIP, second], strategy=strategy, world_size=2)


@pytest.fixture
def downpour_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "logs" / "version_1", [DOWNPOUR], strategy={"class": "x.DownpourStrategy"})


# Reading


def test_a_curve_is_the_mean_and_spread_over_ranks(gossip_run: Path) -> None:
    curve = read_run(gossip_run).curve("val_acc")
    assert curve is not None
    assert curve.to_dict("list") == {
        "step": [10, 20],
        "seconds": [10, 20],
        "mean": [0.5625, 0.8125],
        "low": [0.5, 0.75],
        "high": [0.625, 0.875],
        "ranks": [2, 2],
    }
    assert read_run(gossip_run).curve("no such tag") is None


def test_ranks_that_logged_at_other_steps_are_interpolated_within_their_own_range(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [{"x": [(0, 0.0), (20, 20.0)]}, {"x": [(10, 30.0), (30, 30.0)]}]))
    curve = run.curve("x")
    assert curve is not None
    assert curve["step"].tolist() == [0, 10, 20, 30]
    assert curve["mean"].tolist() == [0, 20, 25, 30]
    assert curve["ranks"].tolist() == [1, 2, 2, 1]


def test_windows_average_over_steps(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [{"x": [(step, float(step)) for step in range(1, 9)]}]))
    curve = run.curve("x", windows=2)
    assert curve is not None
    assert curve["mean"].tolist() == [2.5, 6.5]


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_a_gap_of_its_rank(tmp_path: Path, lost: float) -> None:
    nan = float("nan")
    run = read_run(write_run(tmp_path / "run", [{"x": [(1, lost), (2, lost)]}, {"x": [(1, 4.0), (2, lost)]}]))
    curve = run.curve("x")
    assert curve is not None
    np.testing.assert_array_equal(curve["mean"], [4.0, nan])


def test_of_a_step_logged_again_after_a_resume_the_last_value_counts_and_the_pause_does_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"x": [(1, 1.0), (2, 2.0)]}], start_time=stamp(1000.0))
    write_rank(run / "rank_0", {"x": [(2, 20.0), (3, 30.0)]}, late=1000.0)
    (run / "metadata.json").write_text(json.dumps({"start_time": stamp(1000), "earlier": [{"start_time": stamp(0)}]}))
    curve = read_run(run).curve("x")
    assert curve is not None
    assert curve["mean"].tolist() == [1, 20, 30]
    # two seconds before the pause, then two and three after it
    assert curve["seconds"].tolist() == [1, 2 + 2, 2 + 3]


def test_launching_is_no_part_of_the_time(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "rank_0"
    begin = time.time()
    writer = SummaryWriter(str(folder))  # opened now, a minute after the start
    writer.add_scalar("x", 1.0, 1, walltime=begin + 5)
    writer.close()
    stamp = datetime.fromtimestamp(begin - 60, UTC).isoformat()
    (folder.parent / "metadata.json").write_text(json.dumps({"start_time": stamp}))
    curve = read_run(folder.parent).curve("x")
    assert curve is not None
    assert 4 < curve["seconds"].item() <= 5


@pytest.mark.parametrize(
    ("tags", "chosen"),
    [
        (["train_acc", "val_acc", "test_acc"], "val_acc"),
        (["valid/Accuracy"], "valid/Accuracy"),
        (["val_acc_step", "val_acc_epoch"], "val_acc_epoch"),
        (["val_acc/dataloader_idx_1", "val_acc/dataloader_idx_0"], "val_acc/dataloader_idx_0"),
        (["val_acc_top5", "validation-accuracy"], "validation-accuracy"),
        (["consensus/val_acc"], None),
        (["interval_acc", "val_loss", "acc"], None),
    ],
)
def test_the_accuracy_tag_is_found_by_its_name(tags: list[str], chosen: str | None) -> None:
    assert choose_tag(tags, "acc", {"val", "valid", "validation"}) == chosen


# The command


def test_a_report_has_every_plot_that_there_is_data_for(
    gossip_run: Path, downpour_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "logs"), "--out", str(out)]) == 0
    plots = [
        "accuracy_vs_time.png",
        "accuracy_vs_updates.png",
        "bytes_sent_vs_updates.png",
        "consensus_distance_vs_updates.png",
        "loss_vs_time.png",
        "loss_vs_updates.png",
        "partner_distance_vs_updates.png",
        "staleness_vs_updates.png",
        "wait_seconds_vs_updates.png",
    ]
    names = sorted([*plots, "report.html", "summary.csv", "summary.md"])
    assert sorted(file.name for file in out.iterdir()) == names
    printed = capsys.readouterr()
    assert sorted(Path(line).name for line in printed.out.split()) == names
    assert printed.err == ""
    for plot in plots:
        image = imread(out / plot)[..., :3]
        assert image.shape[1] == 1500, "five inches at 300 dots"
        assert image.std() > 0.02, "something is drawn"
        edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (edges == 1).all(), "nothing is cut off"


def test_the_table_holds_final_numbers_in_its_units(gossip_run: Path, downpour_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["report", str(gossip_run), str(downpour_run), "--out", str(out)]) == 0
    gossip, downpour = pd.read_csv(out / "summary.csv").to_dict("records")
    assert gossip["run"] == "version_0 (Gossip)"
    assert (gossip["strategy"], gossip["evaluated"], gossip["ranks"]) == ("GossipStrategy", "replica", 2)
    assert (gossip["updates"], gossip["seconds"]) == (21, 21)
    accuracy = [gossip[f"val_accuracy_percent{suffix}"] for suffix in ("", "_min", "_max")]
    assert accuracy == [81.25, 75.0, 87.5]
    assert gossip["test_accuracy_percent"] == pytest.approx(76.25)
    assert gossip["bytes_sent_per_rank"] == pytest.approx(8e6)
    assert gossip["wait_seconds_per_step"] == pytest.approx((0.001 + 0.003) / 2 + 0.125 / 2)
    assert (downpour["val_accuracy_percent"], downpour["staleness"]) == (60.0, 3.0)
    assert np.isnan(downpour["consensus_distance"])
    markdown = (out / "summary.md").read_text().splitlines()
    assert markdown[0].startswith("| run | strategy | evaluated | ranks | updates | time (s) | val. accuracy (%) |")
    assert markdown[2].startswith("| version_0 (Gossip) | GossipStrategy | replica | 2 | 21 | 21.0 | 81.25 | 75.00 |")
    assert [line.count("|") for line in markdown[:4]] == [markdown[0].count("|")] * 4
    assert " – |" in markdown[3], "what a run did not log"


@pytest.mark.parametrize("after_fit", [{"test_acc": [(10, 0.5)]}, {}])
def test_updates_are_counted_with_and_without_a_test(tmp_path: Path, after_fit: Points) -> None:
    """Lightning logs the last of ten under 9, and what follows them under 10."""
    within: Points = {"val_acc": [(4, 0.5), (9, 0.5)], "gossip/bytes_sent": [(9, 4e6)]}
    run = read_run(write_run(tmp_path / "run", [{**within, **after_fit}]))
    assert final_numbers("run", run)["updates"] == 10


def test_a_plain_tensorboard_folder_is_a_run_of_one_rank(tmp_path: Path) -> None:
    write_rank(tmp_path / "plain", {"val_acc": [(1, 0.5)], "val_loss": [(1, 2.0)]})
    (tmp_path / "plain" / "hparams.yaml").write_text("lr: 0.1")
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "plain"), "--out", str(out)]) == 0
    row = pd.read_csv(out / "summary.csv").iloc[0]
    assert (row["run"], row["ranks"], row["val_accuracy_percent"], row["val_loss"]) == ("plain", 1, 50.0, 2.0)


def test_given_tags_are_used_and_unknown_ones_are_named(
    gossip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["report", str(gossip_run), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--accuracy-tag", "test_acc", "--loss-tag", "perplexity"]) == 0
    row = pd.read_csv(tmp_path / "out" / "summary.csv").iloc[0]
    assert row["val_accuracy_percent"] == pytest.approx(76.25)
    assert "no run has the tag 'perplexity'; there are: consensus/test_acc," in capsys.readouterr().err
    assert not (tmp_path / "out" / "loss_vs_time.png").exists()


def cut_off(run: Path) -> None:
    file = next((run / "rank_1").iterdir())
    os.truncate(file, file.stat().st_size - 5)


def flip_a_bit(run: Path) -> None:
    file = next((run / "rank_1").iterdir())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def tear_metadata(run: Path) -> None:
    (run / "metadata.json").write_text('{"start_time": ')


def bad_start_time(run: Path) -> None:
    (run / "metadata.json").write_text('{"start_time": "yesterday"}')


def empty(run: Path) -> None:
    for file in run.glob("rank_*/*"):
        file.unlink()


def without_scalars(run: Path) -> None:
    empty(run)
    write_rank(run / "rank_0", {})


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off, "is damaged or cut off at byte"),
        (flip_a_bit, "is damaged or cut off at byte"),
        (tear_metadata, "metadata.json cannot be read"),
        (bad_start_time, "start time in metadata.json cannot be read"),
        (empty, "no event files"),
        (without_scalars, "no scalars in its event files"),
    ],
)
def test_a_run_that_cannot_be_read_is_named_and_skipped(
    gossip_run: Path,
    downpour_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    damage(gossip_run)
    out = tmp_path / "out"
    assert main(["report", str(gossip_run), "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert f"skipped {gossip_run}: " in message
    assert reason in message
    assert not out.exists()
    assert main(["report", str(tmp_path / "logs"), "--out", str(out)]) == 0
    assert reason in capsys.readouterr().err
    assert pd.read_csv(out / "summary.csv")["run"].tolist() == ["version_1 (Downpour)"]


def test_a_run_that_is_under_way_is_read(gossip_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(RawEventFileLoader):
        """Of a file to which the run adds when the last record has been read."""

        def __init__(self, file: str) -> None:
            super().__init__(file)
            self.file = Path(file)

        def Load(self) -> Any:
            yield from super().Load()
            self.file.write_bytes(self.file.read_bytes() * 2)

    monkeypatch.setattr(event_files, "RawEventFileLoader", Reader)
    assert sorted(read_run(gossip_run).ranks) == [0, 1]


def test_missing_folders_and_missing_ranks_are_named(
    gossip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs" / "version_7").mkdir()
    (tmp_path / "nothing").mkdir()
    metadata = json.loads((gossip_run / "metadata.json").read_text())
    (gossip_run / "metadata.json").write_text(json.dumps(metadata | {"world_size": 4}))
    given = [str(tmp_path / name) for name in ("absent", "nothing", "logs")]
    assert main(["report", *given, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"lightning-gossip report: skipped {tmp_path / 'absent'}: no such folder",
        f"lightning-gossip report: skipped {tmp_path / 'nothing'}: no event files",
        f"lightning-gossip report: {gossip_run}: scalars of 2 ranks, of 4 that ran",
        f"lightning-gossip report: skipped {tmp_path / 'logs' / 'version_7'}: no event files",
    ]


def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("report", "report_page", "report_plots", "event_files"):
        monkeypatch.delitem(sys.modules, f"lightning_gossip.monitoring.{module}")
    monkeypatch.setitem(sys.modules, "tbparse", None)
    assert main(["report", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "package 'tbparse' is missing: pip install 'lightning-gossip[report]'" in message


# Units and scales


def test_accuracy_is_in_percent_however_it_was_logged(gossip_run: Path, downpour_run: Path) -> None:
    runs = {"fraction": read_run(gossip_run), "percent": read_run(downpour_run)}
    accuracy, loss = report_plots.accuracy_and_loss(runs)
    assert accuracy.label == "Validation accuracy (%)"
    assert accuracy.curves["fraction"]["mean"].tolist() == [56.25, 81.25]
    assert accuracy.curves["percent"]["mean"].tolist() == [40.0, 60.0]
    assert accuracy.consensus["fraction"]["mean"].tolist() == pytest.approx([66.25, 86.25])
    assert (list(loss.curves), loss.consensus) == (["fraction"], {})


def test_bytes_and_waiting_are_scaled_to_the_unit_on_their_axis(gossip_run: Path, downpour_run: Path) -> None:
    runs = {"gossip": read_run(gossip_run), "downpour": read_run(downpour_run)}
    plots = {plot.name: plot for plot in report_plots.network(runs)}
    assert plots["bytes_sent"].label.endswith("(MB)")
    assert plots["bytes_sent"].curves["downpour"]["mean"].tolist() == pytest.approx([1.0, 2.0])
    assert plots["wait_seconds"].label.endswith("(ms)")
    assert plots["wait_seconds"].curves["downpour"]["mean"].tolist() == pytest.approx([500.0])
    assert plots["consensus_distance"].log
    assert plots["partner_distance"].log
    assert list(plots["staleness"].curves) == ["downpour"]


def test_a_run_that_diverged_at_once_stays_in_the_table(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [{"val_loss": [(1, float("nan"))]}]))
    assert all(not plot.curves for plot in report_plots.accuracy_and_loss({"run": run}))
    row = final_numbers("a|b", run)
    assert np.isnan(row["val_loss"])
    assert "| a\\|b |" in as_markdown(pd.DataFrame([row]))
