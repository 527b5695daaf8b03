"""A frozen base costs nothing: it is neither copied nor averaged, and stands on disk once. What differs is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, fit, recorded, regression
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_gossip import DiLoCoStrategy, DownpourStrategy, ElasticGossipStrategy
from lightning_gossip.strategies import checkpoint as files


class Adapted(Linear):
    """A frozen base, one value of a key that each rank keeps by itself, and a layer that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3, dtype=torch.float64).requires_grad_(False)
        self.key = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layer(self.base(x)).squeeze(1), y)

    def on_train_batch_end(self, *_: Any) -> None:
        self.key.data.mul_(0.9).add_(self.layer.weight.data[0], alpha=0.1)  # a version counter does not see it

    def on_validation_epoch_start(self) -> None:
        consensus: Any = self.trainer.strategy._consensus  # type: ignore[attr-defined]
        if consensus is not None and consensus.kept:
            recorded(self)["copied"] = set(consensus._consensus.now()._shared.present())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = dict(self.named_parameters())
        state = checkpoint["state_dict"]
        recorded(self)["in place"] = {n for n, p in own.items() if state[n].data_ptr() == p.data_ptr()}


def train(folder: Path, strategy: Any, epochs: int, ckpt_path: Any = None, callbacks: Any = ()) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    pl.seed_everything(5, verbose=False)
    checkpoint = ModelCheckpoint(dirpath=folder, save_last=True)
    loader = DataLoader(regression(), 4)
    return fit(
        folder,
        Adapted(),
        strategy,
        val=DataLoader(regression(), 24),
        train=loader,
        callbacks=[checkpoint, *callbacks],
        ckpt_path=ckpt_path,
        enable_checkpointing=True,
        max_epochs=epochs,
    )


def of_disk(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The checkpoint, and each rank's file."""
    path = folder / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    save_id = checkpoint[files.KEY]["save_id"]
    io = files.AtomicCheckpointIO()
    return checkpoint, [files.load_replica(io, path, save_id, rank, True) for rank in range(2)]


STRATEGIES: dict[str, Any] = {"elastic": ElasticGossipStrategy, "diloco": DiLoCoStrategy, "downpour": DownpourStrategy}
BASE = {"base.weight", "base.bias"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("evaluate", ["consensus", "replica"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_frozen_and_alike_is_not_copied_and_stands_on_disk_once(
    tmp_path: Path, name: str, evaluate: str
) -> None:
    ranks = train(tmp_path, STRATEGIES[name](evaluate=evaluate, start_method="fork"), 2)
    checkpoint, replicas = of_disk(tmp_path)
    for rank, replica in zip(ranks, replicas, strict=True):
        if evaluate == "consensus":
            assert not rank["copied"] & BASE
            assert {"layer.weight", "layer.bias", "key"} <= rank["copied"]
        assert rank["in place"] >= BASE
        held = {key for key, value in replica["state_dict"].items() if value is not None}
        assert not held & BASE
        assert {"layer.weight", "layer.bias", "key"} <= held
        assert list(replica["state_dict"]) == list(checkpoint["state_dict"])
    assert not torch.equal(*(replica["state_dict"]["key"] for replica in replicas))
    assert all(value is not None for value in checkpoint["state_dict"].values())


@pytest.mark.one_in(4)
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("evaluate", ["consensus", "replica"])
def test_a_resume_takes_it_from_the_checkpoint(tmp_path: Path, evaluate: str, ema: bool) -> None:
    def make() -> Any:
        return ElasticGossipStrategy(alpha=0.3, period=4, delay=3, evaluate=evaluate, start_method="fork")  # type: ignore[arg-type]

    def callbacks() -> list[Any]:
        return [EMAWeightAveraging(decay=0.8)] if ema else []

    unbroken = train(tmp_path / "unbroken", make(), 4, callbacks=callbacks())
    train(tmp_path / "broken", make(), 2, callbacks=callbacks())
    resumed = train(tmp_path / "broken", make(), 4, tmp_path / "broken" / "last.ckpt", callbacks())
    for one, other in zip(unbroken, resumed, strict=True):
        for key, value in one["state"].items():
            assert torch.equal(other["state"][key], value), key
    _, whole = of_disk(tmp_path / "unbroken")
    _, parts = of_disk(tmp_path / "broken")
    for one, other in zip(whole, parts, strict=True):  # also what each rank has for itself
        assert torch.equal(one["state_dict"]["key"], other["state_dict"]["key"])


def test_what_a_rank_has_changed_for_itself_is_in_its_file(tmp_path: Path) -> None:
    """Frozen or not."""

    class Unlike(Adapted):
        def on_train_epoch_start(self) -> None:
            self.base.weight.data.fill_(float(self.global_rank))

    pl.seed_everything(5, verbose=False)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    strategy = ElasticGossipStrategy(start_method="fork")
    fit(tmp_path, Unlike(), strategy, max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True)
    consensus, replicas = of_disk(tmp_path)
    assert [replica["state_dict"]["base.weight"].unique().tolist() for replica in replicas] == [[0.0], [1.0]]
    assert consensus["state_dict"]["base.weight"].unique().tolist() == [0.5]
    assert replicas[0]["state_dict"]["base.bias"] is None
