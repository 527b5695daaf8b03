"""Processes of this package see what their parent sees, also where it was found through `sys.path` alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from environments import ENVIRONMENT

import lightning_gossip
from lightning_gossip.control.interpreter import module_command, path_in_environment
from lightning_gossip.parameter_server.process import ShardProcess

NOT_DEPENDED_ON = ("matplotlib", "scipy", "torchvision")  # torchmetrics would import them, for seconds
SOURCES = Path(lightning_gossip.__file__).parent

PROGRAM = """
import sys
if __name__ == "__main__":
    sys.path.insert(0, "sources")
import lightning.pytorch as pl
from torch.utils.data import DataLoader
from forked import Linear, regression
from lightning_gossip import DownpourStrategy

def main():
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=DownpourStrategy(shards=2), max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Linear(), DataLoader(regression(), 4))
    print(f"trained by {sys.modules['lightning_gossip'].__file__}", flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job that ships its sources; of the package nothing is installed, and its name is taken where it runs."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "lightning_gossip").symlink_to(SOURCES)
    (sources / "forked.py").symlink_to(Path(__file__).parents[1] / "forked.py")
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    """Without the package: an isolated user site, and of what is installed what a package like it brings along."""
    libraries = folder / "libraries"
    libraries.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "lightning_gossip" not in entry.name and not entry.name.startswith(NOT_DEPENDED_ON):
            (libraries / entry.name).symlink_to(entry)
    return {**ENVIRONMENT, "PYTHONPATH": str(libraries), "PYTHONNOUSERSITE": "1"}


@pytest.mark.long
@pytest.mark.parametrize("way", ["script", "module_after_sys_path"])
def test_downpour_from_a_job_that_ships_its_sources(job: Path, way: str) -> None:
    command = [str(job / "program.py")]
    if way == "module_after_sys_path":
        # the program is a module that only the first process can find, as with a launcher that prepares `sys.path`
        (job / "sources" / "program.py").write_text(PROGRAM)
        (job / "program.py").unlink()
        prepared = (
            "import sys, runpy; sys.path.insert(0, 'sources'); runpy.run_module('program', None, '__main__', True)"
        )
        (job / "launch.py").write_text(prepared)
        command = ["-c", prepared]
    interpreter = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run(
        [interpreter, *command],
        env=environment(job),
        cwd=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert done.stdout.count("trained by") == 2, done.stdout[-3000:]
    assert f"trained by {job}/sources" in done.stdout or "trained by sources" in done.stdout
    assert done.returncode == 0


def test_a_shard_is_not_led_astray_by_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning_gossip", "torch", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    shard = ShardProcess()
    try:
        assert shard.address.startswith("127.0.0.1:")
    finally:
        shard.close(grace=0)


@pytest.mark.parametrize("odd", ["with:colon", "with 'quotes' and\nlines", "ünï"])
def test_a_command_sees_the_path_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    folder = tmp_path / odd
    folder.mkdir()
    (folder / "shipped.py").write_text("import sys; print(len(sys.path), sys.argv[1:], __name__)")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path, Path("no string")])
    printed = subprocess.run(module_command("shipped", "a", "b c"), capture_output=True, text=True, check=True).stdout
    assert printed == f"{len(sys.path) - 1} ['a', 'b c'] __main__\n"


def test_the_environment_names_what_no_interpreter_has_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(sys, "path", ["", "/shipped", *sys.path])
    with path_in_environment():
        entries = os.environ["PYTHONPATH"].split(os.pathsep)
        assert entries[:2] == [os.getcwd(), "/shipped"]
        assert sysconfig.get_path("purelib") not in entries
        assert sysconfig.get_path("stdlib") not in entries
    assert os.environ["PYTHONPATH"] == "/elsewhere"
