"""The benchmark of one GPU: its rehearsal on the CPU, what it says without a GPU, and how it reads a profile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import LEAN

from benchmarks import ROOT
from benchmarks.gpu import profiling
from benchmarks.gpu.rows import CHECKS, PROFILE, SPEED, Check, failures, yes
from benchmarks.shared.rows import read


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=LEAN, capture_output=True, text=True, timeout=170, check=False)


@pytest.mark.long
def test_the_rehearsal_goes_through_every_part(tmp_path: Path) -> None:
    ended = run("--rehearse", "--ranks", "2", "--rounds", "1", "--results", str(tmp_path))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    checks = read(tmp_path / CHECKS)
    parts = {row["part"] for row in checks}
    assert parts >= {
        "streams",
        "nccl",
        "exactness",
        "consensus",
        "resume",
        "precision",
        "compile",
        "downpour",
        "profile",
    }
    assert failures(tmp_path) == []
    assert {row["setup"] for row in read(tmp_path / SPEED)} >= {"none", "none again", "probability 1", "period 8"}
    assert [row["setup"] for row in read(tmp_path / PROFILE)] == ["none", "probability 1"]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ended = run("--results", str(tmp_path))
    assert ended.returncode == 2
    assert "no GPU" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_check_holds_up_to_its_bar() -> None:
    assert Check("part", "name", 2, 1e-12, 1e-12).holds
    assert not Check("part", "name", 2, 2e-12, 1e-12).holds
    assert not Check("part", "name", 2, float("nan"), 1e-12).holds
    assert yes("part", "name", 2, True).holds
    assert not yes("part", "name", 2, False).holds


def event(category: str, name: str, start: float, duration: float, tid: int = 1, stream: int = 7) -> dict[str, Any]:
    arguments = {"stream": stream}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": tid, "args": arguments}


def test_a_profile_tells_hidden_copies_and_who_waits() -> None:
    trace = [
        event("kernel", "gemm", 0, 600),
        event("kernel", "gemm", 500, 500),
        event("gpu_memcpy", "DtoH", 900, 400, stream=20),  # a quarter beside the kernels
        event("gpu_memcpy", "DtoD", 0, 100),  # training's own
        event("user_annotation", profiling.BEGIN, 0, 100),
        event("user_annotation", profiling.END, 1000, 500),
        event("cuda_runtime", "cudaStreamSynchronize", 10, 5),
        event("cuda_runtime", "cudaEventSynchronize", 1100, 5),
        event("cuda_runtime", "cudaDeviceSynchronize", 700, 5),
        event("cuda_runtime", "cudaEventSynchronize", 20, 5, tid=2),  # a helper's
        event("cuda_runtime", "cudaLaunchKernel", 30, 5),
    ]
    assert profiling.figures(trace, steps=2) == pytest.approx(
        {
            "compute_ms": 0.5,
            "copies_ms": 0.2,
            "copies_hidden": 0.25,
            "begin_ms": 0.05,
            "end_ms": 0.25,
            "waits_in_begin": 0.5,
            "waits_in_end": 0.5,
            "waits_elsewhere": 0.5,
        }
    )
