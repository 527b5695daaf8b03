"""What is published: the wheel, in an environment where the sources are not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

QUICKSTART = """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_gossip
from lightning_gossip import ElasticGossipStrategy


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    data = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=8)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=1, strategy=ElasticGossipStrategy(alpha=0.5, period=2), **options
    )
    trainer.fit(Linear(), data)
    if trainer.is_global_zero:
        print("from", lightning_gossip.__file__)
        print("steps", trainer.global_step)
"""


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.timeout(600)
def test_the_wheel_trains_and_plans(tmp_path: Path) -> None:
    pytest.importorskip("build")

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # what it depends on is taken from here; a path of such a file brings no editable installs with it
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "here.pth").write_text("\n".join(path for path in sys.path if Path(path).name == "site-packages"))
    (tmp_path / "quickstart.py").write_text(QUICKSTART)
    printed = run(python, "quickstart.py")
    assert f"from {own}" in printed
    assert "steps 4" in printed
    command = tmp_path / "venv" / "bin" / "lightning-gossip"
    arguments = ("--parameters", "1M", "--ranks", "4", "--mbit", "200", "--step-ms", "30")
    assert "recommended: " in run(command, "plan", *arguments)


def test_every_place_names_the_same_version() -> None:
    import lightning_gossip

    version = lightning_gossip.__version__
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == version
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version  # type: ignore[index]
    released = re.findall(r"^## \[(\d\S*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0][0] == version
    assert f"date-released: {released[0][1]}" in (ROOT / "CITATION.cff").read_text()
