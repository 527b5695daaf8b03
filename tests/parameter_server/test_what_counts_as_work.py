"""What a worker's work is (what optimizers own), and the call by which all go on from rank 0's parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy, GossipStrategy


def strategies() -> dict[str, Any]:
    return {
        "downpour": DownpourStrategy(n_push=2, n_pull=3, dealt=False, start_method="fork"),
        "two shards": DownpourStrategy(n_push=3, n_pull=1, shards=2, max_staleness=2, dealt=False, start_method="fork"),
        "adagrad": DownpourStrategy(
            n_push=1, server_optimizer={"class_path": "torch.optim.Adagrad"}, dealt=False, start_method="fork"
        ),
        "warm-up": DownpourStrategy(n_push=2, warmup_steps=3, evaluate="replica", dealt=False, start_method="fork"),
        "elastic": ElasticGossipStrategy(start_method="fork"),
        "delayed": ElasticGossipStrategy(period=4, delay=3, start_method="fork"),
        "push": GossipStrategy("push", shared_memory=False, start_method="fork"),
    }


class Momentum(Linear):
    """Keeps an average of its layer as a submodule whose parameters require a gradient, outside of any optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.layer)
        self.largest = 0.0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.largest = max(self.largest, self.layer.weight.abs().max().item())
            for average, parameter in zip(self.average.parameters(), self.layer.parameters(), strict=True):
                average.lerp_(parameter, 0.5)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layer.parameters(), lr=0.02)


class Own(Recorder):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["own"] = [p.detach().clone() for p in pl_module.average.parameters()]
        self.seen["largest"] = pl_module.largest


@pytest.mark.one_in(2)
@pytest.mark.parametrize("evaluate", ["consensus", "replica"])
def test_what_no_optimizer_owns_is_not_added_up(tmp_path: Path, evaluate: Any) -> None:
    strategy = DownpourStrategy(n_push=1, n_pull=1, evaluate=evaluate, start_method="fork")
    train = DataLoader(regression(96), 4)
    results = fit(tmp_path, Momentum(), strategy, devices=4, recorder=Own(tmp_path), train=train, max_epochs=40)
    largest = max(result["largest"] for result in results)
    means = [torch.stack(values).mean(0) for values in zip(*(result["own"] for result in results), strict=True)]
    for rank, result in enumerate(results):
        assert result["state"]["average.weight"].abs().max() <= largest, "no value that the network never had"
        expected = means if evaluate == "consensus" else results[rank]["own"]
        for name, value in zip(("average.weight", "average.bias"), expected, strict=True):
            torch.testing.assert_close(result["state"][name], value)


class Unused(Linear):
    """A head that is trainable from the start, and that an optimizer comes to own in mid-training."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1, dtype=torch.float64)
        self.when = when

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and self.when == "added":
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            optimizer.add_param_group({"params": self.head.parameters()})
        if batch_idx == 2 and self.when == "unfrozen":
            self.layer.bias.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        if self.when == "unfrozen":
            self.layer.bias.requires_grad_(False)
        return torch.optim.SGD(self.layer.parameters(), lr=0.01)


@pytest.mark.parametrize(("when", "named"), [("added", "head.weight"), ("unfrozen", "layer.bias")])
def test_what_optimizers_come_to_own_later_is_refused_by_name(tmp_path: Path, when: str, named: str) -> None:
    with pytest.raises(Exception, match=f"parameter '{named}' requires a gradient"):
        fit(tmp_path, Unused(when), DownpourStrategy(start_method="fork"), max_epochs=1)


def test_what_is_renamed_in_mid_training_is_refused_as_that(tmp_path: Path) -> None:
    class Pruned(Linear):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                prune.l1_unstructured(self.layer, "weight", 1)

    with pytest.raises(Exception, match=r"'layer.weight' was renamed in mid-training, to 'layer.weight_orig'"):
        fit(tmp_path, Pruned(), DownpourStrategy(start_method="fork"), max_epochs=1)


def test_without_an_optimizer_of_lightnings_everything_is_work(tmp_path: Path) -> None:
    class ByHand(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.layer.bias.add_(1.0)
            return torch.zeros(())

        def configure_optimizers(self) -> None:
            return None

    module = ByHand()
    nn.init.zeros_(module.layer.bias)
    results = fit(tmp_path, module, DownpourStrategy(n_push=2, n_pull=100, start_method="fork"), max_epochs=1)
    assert [result["state"]["layer.bias"].item() for result in results] == [12.0, 12.0], "6 steps of each"


class Back(Callback):
    """Goes back to what rank 0 had at the start: rank 0 loads it, and all adopt it."""

    def __init__(self, at_step: int, then_stand_still: bool = True) -> None:
        self.at_step, self.then_stand_still = at_step, then_stand_still
        self.kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.kept = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.at_step:
            if trainer.global_rank == 0:
                pl_module.load_state_dict(self.kept)
            trainer.strategy.adopt_rank_zero()
            recorder = next(c for c in trainer.callbacks if isinstance(c, Recorder))
            recorder.seen["adopted"] = copy.deepcopy(pl_module.state_dict())
            recorder.seen["kept"] = self.kept
            if self.then_stand_still:
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] = 0.0


class Counted(Linear):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += self.global_rank + 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("at_step", [1, 5, 12])
@pytest.mark.parametrize("name", strategies())
def test_all_go_back_to_what_rank_0_kept(tmp_path: Path, name: str, at_step: int) -> None:
    """Afterwards nothing is made (the learning rate is 0): whatever comes in later was made before."""
    results = fit(tmp_path, Counted(), strategies()[name], callbacks=[Back(at_step)], max_epochs=2)
    kept = results[0]["kept"]
    for result in results:
        for key, value in kept.items():
            assert torch.equal(result["adopted"][key], value)
            if key != "seen":
                assert torch.equal(result["state"][key], value), key


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["downpour", "adagrad", "delayed"])
def test_training_goes_on_from_there(tmp_path: Path, name: str) -> None:
    train = DataLoader(regression(160), 4)
    results = fit(tmp_path, Counted(), strategies()[name], callbacks=[Back(5, False)], max_epochs=4, train=train)
    assert all(torch.equal(results[0]["state"][key], value) for key, value in results[1]["state"].items())
    moved = results[0]["state"]["layer.weight"] - results[0]["kept"]["layer.weight"]
    assert moved.abs().max() > 0.05
    assert results[0]["step"] == 80, "the clock goes on"


def test_a_call_where_it_can_not_hold_is_refused(tmp_path: Path) -> None:
    class Early(Callback):
        def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
            trainer.strategy.adopt_rank_zero()

    with pytest.raises(RuntimeError, match=r"middle of a `fit`.*adopt_consensus\(\)"):
        ElasticGossipStrategy().adopt_rank_zero()
    with pytest.raises(Exception, match="within a validation"):
        fit(
            tmp_path,
            Linear(),
            ElasticGossipStrategy(start_method="fork"),
            callbacks=[Early()],
            val=DataLoader(regression(), 4),
            num_sanity_val_steps=0,
        )
