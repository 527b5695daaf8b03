"""The examples of loops without a Trainer: each learns, and goes on from what it has saved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from environments import ENVIRONMENT
from ports import free_port
from processes import run_program

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = pytest.mark.parametrize("as_a_user", [False, pytest.param(True, marks=pytest.mark.long)])


def run(folder: Path, command: list[str], arguments: list[Any]) -> list[str]:
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


def learns_and_goes_on(run: Callable[[list[Any]], list[str]], folder: Path) -> None:
    begun = run(["--epochs", 2, "--folder", folder])
    resumed = run(["--epochs", 4, "--folder", folder, "--resume"])
    assert [line.split(":")[0] for line in begun] == ["epoch 1", "epoch 2", "consensus model"]
    assert [line.split(":")[0] for line in resumed] == ["epoch 3", "epoch 4", "consensus model"]
    assert float(resumed[-1].split()[-1]) > 0.9


@RUN
def test_the_plain_loop(tmp_path: Path, as_a_user: bool) -> None:
    program = EXAMPLES / "plain_loop.py"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", str(program)]
    forked = partial(run_program, tmp_path, program, world_size=2)
    learns_and_goes_on(partial(run, tmp_path, torchrun) if as_a_user else forked, tmp_path)


@RUN
def test_the_loop_of_fabric(tmp_path: Path, as_a_user: bool) -> None:
    """Fabric's launcher takes ten seconds to end."""
    program = EXAMPLES / "fabric_loop.py"
    launched = partial(run, tmp_path, [str(program), "--devices=2"])
    forked = partial(run_program, tmp_path, program, world_size=2)
    learns_and_goes_on(launched if as_a_user else lambda arguments: forked(["--devices=2", *arguments]), tmp_path)
