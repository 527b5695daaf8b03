"""What is said where a strategy is used wrong, or for nothing: each text names what to do."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from environments import LEAN
from forked import Linear, fit, regression
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_gossip import DiLoCoStrategy, DownpourStrategy, ElasticGossipStrategy, GossipStrategy, LocalSGDStrategy
from lightning_gossip.strategies.misuse import OF_DDP

CLASSES: list[Any] = [GossipStrategy, ElasticGossipStrategy, LocalSGDStrategy, DiLoCoStrategy, DownpourStrategy]


@pytest.mark.parametrize("strategy", CLASSES)
@pytest.mark.parametrize("argument", OF_DDP)
def test_an_argument_of_ddps_is_told_why_it_is_not_there(strategy: Any, argument: str) -> None:
    with pytest.raises(TypeError, match=f"{strategy.__name__} has no such arguments .* Leave them out: `{argument}`: "):
        strategy(**{argument: True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'alhpa'"):
        strategy(alhpa=0.5)


def test_these_are_arguments_of_ddps() -> None:
    """Lightning hands what it does not know to torch's DDP."""
    known = {
        *inspect.signature(DDPStrategy.__init__).parameters,
        *inspect.signature(DistributedDataParallel).parameters,
    }
    assert set(OF_DDP) <= known


@pytest.mark.parametrize("strategy", CLASSES)
def test_classes_show_their_arguments_as_ever(strategy: Any) -> None:
    assert list(inspect.signature(strategy).parameters) == list(inspect.signature(strategy.__init__).parameters)[1:]


def test_the_class_in_place_of_an_object() -> None:
    with pytest.raises(ValueError, match=r"a Trainer takes an object of it, ElasticGossipStrategy\(…\)"):
        pl.Trainer(strategy=ElasticGossipStrategy, accelerator="cpu", devices=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bf16", "fp16", "half", "16"])
def test_a_dtypes_nickname(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`wire_dtype` must be a dtype or its name: for '{name}' say 'b?float16'"):
        ElasticGossipStrategy(wire_dtype=name)


class Warned(Linear):
    """Keeps what its rank is warned of as training begins."""

    def on_train_start(self) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.texts = self.caught.__enter__()
        warnings.simplefilter("always")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.caught.__exit__(None, None, None)
            trainer: Any = self.trainer
            found = [str(w.message) for w in self.texts or [] if "exchange" in str(w.message)]
            trainer.callbacks[-1].seen["warned"] = found


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("period", "limits", "most"),
    [
        (7, {"max_epochs": 1}, 6),
        (6, {"max_epochs": 1}, None),
        (7, {"max_epochs": 2}, None),
        (7, {"max_epochs": 2, "max_steps": 5}, 5),
        (4, {"max_epochs": 1, "accumulate_grad_batches": 2}, 3),
        (3, {"max_epochs": 1, "accumulate_grad_batches": 2}, None),
    ],
)
@pytest.mark.parametrize("strategy", [ElasticGossipStrategy, LocalSGDStrategy])
def test_rounds_further_apart_than_the_training_is_long(
    tmp_path: Path, strategy: Any, period: int, limits: dict[str, Any], most: int | None
) -> None:
    """Two ranks make 6 steps an epoch."""
    made = strategy(period=period, start_method="fork")
    ranks = fit(tmp_path, Warned(), made, train=DataLoader(regression(48), 4), **limits)
    text = (
        f"Nothing will ever be exchanged: rounds come every {period} steps, and this `fit` makes {most} steps at most,"
        f" from step 0. Give {strategy.__name__} a smaller `period`."
    )
    assert [rank["warned"] for rank in ranks] == [[text] if most else [], []]


def test_a_single_rank_exchanges_nothing(tmp_path: Path) -> None:
    [rank] = fit(tmp_path, Warned(), ElasticGossipStrategy(start_method="fork"), devices=1, max_epochs=1)
    assert rank["warned"] == [
        "ElasticGossipStrategy trains a single rank, which exchanges nothing: give the Trainer `devices=2` or more,"
        " or `num_nodes`."
    ]


@pytest.mark.long
def test_two_runs_on_one_port(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import lightning.pytorch as pl, lightning_gossip\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "pl.Trainer(strategy='elastic_gossip', accelerator='cpu', devices=2, barebones=True).fit(BoringModel())\n"
    )
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        command, environment = [sys.executable, str(program)], LEAN | {"MASTER_PORT": port, "NODE_RANK": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode not in (0, None)
    assert (
        f"port {port} is taken, by another run it may be: give each run on a host a MASTER_PORT of its own"
        in done.stderr
    )


def test_a_store_on_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "lightning_gossip", "store", "--port", port]
        done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert f"port {port} is taken, by another run it may be" in done.stderr
