"""RankTensorBoardLogger under Lightning's own launchers, and read by TensorBoard's own server: real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from curves import scalars
from environments import LEAN
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_gossip.monitoring import run_folder
from lightning_gossip.monitoring.loggers import RankTensorBoardLogger


@pytest.mark.one_in(2)
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_every_rank_of_a_launched_run_has_its_values_in_one_folder(tmp_path: Path, strategy: str) -> None:
    program = Path(__file__).parents[1] / "programs" / "log_on_every_rank.py"
    path = os.pathsep.join((str(Path(__file__).parents[2]), LEAN["PYTHONPATH"]))
    (tmp_path / "temporary").mkdir()
    inherited = {key: value for key, value in LEAN.items() if key not in ("LOCAL_RANK", "NODE_RANK")}
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path), strategy],
        env=inherited | {"PYTHONPATH": path, "TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output
    assert [entry.name for entry in tmp_path.glob("logs_*")] == ["logs_0"]
    version = tmp_path / "logs_0" / "run" / "version_0"
    assert [entry.name for entry in version.parent.iterdir()] == ["version_0"]
    for rank in (0, 1):
        seen, *log_dirs = json.loads((tmp_path / f"seen_{rank}.json").read_text())
        assert log_dirs == [str(version)] * 2
        assert scalars(version / f"rank_{rank}", "value") == list(enumerate(seen))
        assert [value for _, value in scalars(version / f"rank_{rank}", "test_value")] == [float(rank)]
    assert json.loads((version / "metadata.json").read_text())["world_size"] == 2


@pytest.fixture
def tensorboard(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Start TensorBoard on ``tmp_path/logs``; what is returned asks its HTTP interface."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "logs").mkdir()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "logs")]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0", "--load_fast", "false", "--reload_interval", "1"],
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)), None)
        assert found is not None, "TensorBoard did not start"

        def ask(path: str) -> Any:
            with urllib.request.urlopen(found[0] + path, timeout=30) as response:
                return json.load(response)

        yield ask
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_tensorboard_serves_the_curves_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: Callable[[str], Any]
) -> None:
    monkeypatch.setenv("LIGHTNING_GOSSIP_RUN_FOLDERS", "{}")  # restored afterwards
    monkeypatch.setattr(run_folder, "_handed_on", {})
    for rank in range(4):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        monkeypatch.setattr(fabric_rank_zero_only, "rank", rank)
        logger = RankTensorBoardLogger(tmp_path / "logs", name="run", version=0)
        for step in range(5):
            logger.log_metrics({"val_acc": step / 8, "gossip/partner": float(rank)}, step=step)
        logger.finalize("success")
    runs = {f"run/version_0/rank_{rank}" for rank in range(4)}
    deadline = time.monotonic() + 60
    while set(tags := tensorboard("/data/plugin/scalars/tags")) != runs and time.monotonic() < deadline:
        time.sleep(0.2)
    assert {run: set(tags[run]) for run in tags} == {run: {"val_acc", "gossip/partner"} for run in runs}
    for rank in range(4):
        query = urllib.parse.urlencode({"tag": "gossip/partner", "run": f"run/version_0/rank_{rank}"})
        points = tensorboard(f"/data/plugin/scalars/scalars?{query}")
        assert [(step, value) for _, step, value in points] == [(step, float(rank)) for step in range(5)]
