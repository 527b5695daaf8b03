"""The machine that a benchmark runs on."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def cores() -> int:
    """Return the number of processors."""
    return os.cpu_count() or 1


def in_words() -> str:
    """Return processors, memory and torch's version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores()} cores ({cpu}), {memory:.0f} GiB of memory; torch {torch.__version__}, 1 thread a rank"
