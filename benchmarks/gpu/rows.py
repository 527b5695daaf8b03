"""The rows that every part of the benchmark writes: checks with a bar, and times."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.shared.rows import append, read
from benchmarks.shared.tables import markdown

CHECKS, SPEED, PROFILE = "gpu_checks.csv", "gpu_speed.csv", "gpu_profile.csv"
"""Names of the files of results."""


@dataclass(frozen=True)
class Check:
    """Something that must hold, and what was found.

    Attributes:
        part: of the benchmark.
        name: what was checked.
        ranks: that took part.
        found: the largest error, or 0 and 1 for no and yes.
        bar: ``found`` must be at most this; for yes and no: at least 1, written as -1.
        note: in words.
    """

    part: str
    name: str
    ranks: int
    found: float
    bar: float
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it does; what is not a number does not."""
        return self.found >= 1 if self.bar < 0 else self.found <= self.bar


def yes(part: str, name: str, ranks: int, answer: bool, note: str = "") -> Check:
    """Return a check that holds where ``answer`` is true."""
    return Check(part, name, ranks, float(answer), -1.0, note)


def machine(device: torch.device) -> dict[str, str]:
    """Return what the rows were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {"device": name, "torch": torch.__version__}


def add(results: Path, where: dict[str, str], check: Check) -> None:
    """Write a check to the results and print it."""
    append(results / CHECKS, [{**where, **asdict(check), "holds": check.holds}])
    state = "holds" if check.holds else "FAILS"
    text = f"{check.part}: {check.name}, {check.ranks} ranks: {check.found:.3g}"
    print(f"{state}  {text}{check.note and f' ({check.note})'}", flush=True)


def failures(results: Path) -> list[str]:
    """Return the names of the checks in these results that do not hold."""
    return [f"{row['part']}: {row['name']}" for row in read(results / CHECKS) if row["holds"] != "True"]


def print_tables(results: Path) -> None:
    """Print everything that is in ``results`` as Markdown."""
    for name in (CHECKS, SPEED, PROFILE):
        if rows := read(results / name):
            print()
            print("\n".join(markdown(list(rows[0]), [list(row.values()) for row in rows], words=(0, 1, 2, 3))))
