"""The examples of loops without a Trainer, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from environments import ENVIRONMENT
from launched import free_port

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


def test_the_plain_loop_learns_and_goes_on(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    torchrun.append(str(ROOT / "examples" / "plain_loop.py"))
    unbroken = run(tmp_path, torchrun, "--epochs", 4, "--folder", tmp_path / "whole")
    run(tmp_path, torchrun, "--epochs", 2, "--folder", tmp_path / "parts")
    resumed = run(tmp_path, torchrun, "--epochs", 4, "--folder", tmp_path / "parts", "--resume")
    assert unbroken[-3:] == resumed[-3:]
    assert float(unbroken[-1].split()[-1]) > 0.9
