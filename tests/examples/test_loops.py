"""The examples of loops without a Trainer, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from environments import ENVIRONMENT
from ports import free_port

ROOT = Path(__file__).parents[2]


def run(folder: Path, command: list[str], *arguments: Any) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


EXAMPLES = ROOT / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]


def test_the_plain_loop_learns_and_goes_on(tmp_path: Path) -> None:
    command = [*TORCHRUN, f"--master-port={free_port()}", str(EXAMPLES / "plain_loop.py")]
    run(tmp_path, command, "--epochs", 2, "--folder", tmp_path)
    resumed = run(tmp_path, command, "--epochs", 4, "--folder", tmp_path, "--resume")
    assert [line.split(":")[0] for line in resumed] == ["epoch 3", "epoch 4", "consensus model"]
    assert float(resumed[-1].split()[-1]) > 0.9


def test_the_loop_of_fabric_learns_and_goes_on(tmp_path: Path) -> None:
    """Fabric's launcher takes ten seconds to end."""
    command = [str(EXAMPLES / "fabric_loop.py"), "--devices=2", "--folder", str(tmp_path)]
    begun = run(tmp_path, command, "--epochs", 2)
    resumed = run(tmp_path, command, "--epochs", 4, "--resume")
    assert [line.split(":")[0] for line in begun] == ["epoch 1", "epoch 2", "consensus model"]
    assert [line.split(":")[0] for line in resumed] == ["epoch 3", "epoch 4", "consensus model"]
    assert float(resumed[-1].split()[-1]) > 0.9
