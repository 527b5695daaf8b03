"""A version outside the tested range is named in a warning, and nothing more."""

from __future__ import annotations

import re
import tomllib
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from lightning_gossip.strategies import versions

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("installed", ["2.12.1", "2.15.0a0+git", "3.0.1"])
def test_a_version_outside_is_named(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: installed)
    text = f"is tested with torch 2.13 to 2.14, and torch {installed} is installed"
    with pytest.warns(UserWarning, match=re.escape(text)):
        versions.warn_of_untested("torch")


@pytest.mark.parametrize("installed", ["2.13.0", "2.14.1+cpu", "2.14.9", None])
def test_one_within_is_not(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(versions, "version", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_of_untested("torch")


def test_the_oldest_tested_are_those_that_are_required() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package in ("torch", "lightning"):
        [bound] = [entry for entry in required if entry.startswith(f"{package}>=")]
        assert tuple(map(int, bound.partition(">=")[2].split(".")[:2])) == versions.TESTED[package][0]
        assert "<" not in bound


def test_the_oldest_set_is_of_the_lower_bounds() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(entry.split(">=") for entry in required)
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    oldest = dict(line.split("==") for line in lines)
    assert set(bounds) <= set(oldest)
    for package, bound in bounds.items():
        assert f"{oldest[package]}.".startswith(f"{bound}."), package
