"""`server_optimizer` of Downpour from a LightningCLI: in YAML, on the command line, from the saved configuration."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from forked import Linear, regression
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_gossip import DownpourStrategy
from lightning_gossip.parameter_server.optimizers import ServerOptimizer


class Model(Linear):
    def train_dataloader(self) -> Any:
        return DataLoader(regression(), 4)


class Written(pl.Callback):
    """Writes what the run's strategy was told."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        Path(f"{self.path}.{trainer.global_rank}").write_text(json.dumps(trainer.strategy.hyperparameters))


FORMS = {
    "mapping": {"class_path": "torch.optim.Adagrad", "init_args": {"lr": 0.05}},
    "mapping without arguments": {"class_path": "torch.optim.Adagrad"},
    "import path": "torch.optim.Adagrad",
    "where it is written": {"class_path": "torch.optim.adamw.AdamW", "init_args": {"lr": 0.1, "betas": [0.8, 0.9]}},
    "none": None,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", FORMS)
def test_from_yaml_and_from_the_saved_configuration(tmp_path: Path, form: str) -> None:
    strategy = {"n_push": 2, "server_optimizer": FORMS[form], "start_method": "fork"}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "strategy": {"class_path": "lightning_gossip.DownpourStrategy", "init_args": strategy},
            "callbacks": [{"class_path": f"{__name__}.Written", "init_args": {"path": str(tmp_path / "told")}}],
        }
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    told = []
    for source in ("config.yaml", "saved/config.yaml"):
        saved = {"save_config_kwargs": {"overwrite": True}}
        if source == "config.yaml":
            (tmp_path / "saved").mkdir()
            config["trainer"]["default_root_dir"] = str(tmp_path / "saved")
            path.write_text(yaml.safe_dump(config))
        LightningCLI(Model, args=["fit", "--config", str(tmp_path / source)], **saved)  # type: ignore[arg-type]
        told += [json.loads((tmp_path / f"told.{rank}").read_text())["server_optimizer"] for rank in range(2)]
        [written] = (tmp_path / "saved").glob("**/config.yaml")
        written.rename(tmp_path / "saved" / "config.yaml")
    expected = DownpourStrategy(server_optimizer=FORMS[form]).hyperparameters["server_optimizer"]
    assert told == [expected] * 4
    assert (expected is None) == (FORMS[form] is None)


def test_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["--trainer.strategy=lightning_gossip.DownpourStrategy", "--trainer.accelerator=cpu"]
    as_json = json.dumps({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}})
    arguments += [f"--trainer.strategy.server_optimizer={as_json}"]
    cli = LightningCLI(Model, args=arguments, run=False, save_config_callback=None)
    assert isinstance(cli.trainer.strategy, DownpourStrategy)
    assert cli.trainer.strategy.hyperparameters["server_optimizer"] == {"class": "torch.optim.SGD", "lr": 0.5}


def test_all_ways_to_say_it_are_one() -> None:
    ways: list[Any] = [
        functools.partial(torch.optim.SGD, lr=0.5),
        {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
        {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.5}},
    ]
    assert len({repr(ServerOptimizer.of(way)) for way in ways}) == 1
    assert ServerOptimizer.of("torch.optim.Adam") == ServerOptimizer.of(torch.optim.Adam)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("torch.optim.LBFGS", "one of torch.optim.ASGD"),
        ("os.system", "got os.system"),
        ({"class_path": "os.system", "init_args": {"command": "true"}}, "got os.system"),
        ({"class": "torch.optim.SGD", "lr": 0.5}, "`class_path`"),
        ({"class_path": "torch.optim.SGD", "lr": 0.5}, "`init_args`"),
        ({"class_path": "torch.optim.SGD", "init_args": [0.5]}, "a mapping of keywords"),
        ({"class_path": "torch.optim.SGD", "init_args": {"rate": 0.5}}, "rate"),
    ],
    ids=str,
)
def test_what_is_no_optimizer_is_refused_by_name(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match="`server_optimizer`") as caught:
        DownpourStrategy(server_optimizer=given)
    assert said in str(caught.value)
