"""What people rely on in Lightning: each test would fail if the feature were ignored, or the ranks waited for ever."""

# a Trainer gets its attributes at run time, and what is an attribute of a module torch declares Tensor | Module
# mypy: disable-error-code="attr-defined, union-attr, operator"

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
import yaml
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_gossip import ElasticGossipStrategy
from lightning_gossip.strategies import meeting


def elastic(**kwargs: Any) -> ElasticGossipStrategy:
    return ElasticGossipStrategy(start_method="fork", timeout=timedelta(seconds=30), **kwargs)


def recorder_of(module: pl.LightningModule) -> Recorder:
    return next(c for c in module.trainer.callbacks if isinstance(c, Recorder))


def loader(rows: int = 48, batch_size: int = 4) -> Any:
    return DataLoader(regression(rows), batch_size)


# -- precision ------------------------------------------------------------------------------------------------------


class Single(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].to(self.dtype)
        out = self.layer(x)
        recorder_of(self).seen |= {"activations": str(out.dtype), "weights": str(self.layer.weight.dtype)}
        return out.square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        stats = self.trainer.strategy.exchange.stats
        recorder_of(self).seen["bytes"] = stats.bytes_sent / stats.exchanges


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("precision", "weights", "activations", "nbytes"),
    [
        ("32-true", "torch.float32", "torch.float32", 1024),
        ("64-true", "torch.float64", "torch.float64", 2048),
        ("bf16-mixed", "torch.float32", "torch.bfloat16", 1024),
        ("bf16-true", "torch.bfloat16", "torch.bfloat16", 512),
    ],
)
def test_precision(tmp_path: Path, precision: Any, weights: str, activations: str, nbytes: int) -> None:
    ranks = fit(tmp_path, Single(), elastic(), max_epochs=1, precision=precision)
    for rank in ranks:
        assert (rank["weights"], rank["activations"], rank["bytes"]) == (weights, activations, nbytes)
        assert torch.equal(rank["state"]["layer.weight"], ranks[0]["state"]["layer.weight"])


# -- clipping by value, schedulers ------------------------------------------------------------------------------------


class SeeGradients(Linear):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        gradients = [p.grad.abs().max().item() for p in self.parameters() if p.grad is not None]
        recorder_of(self).seen.setdefault("gradients", []).extend(gradients)


@pytest.mark.parametrize(("algorithm", "clip"), [("value", 0.01), ("norm", 0.01), ("norm", None)])
def test_gradient_clipping(tmp_path: Path, algorithm: str, clip: float | None) -> None:
    ranks = fit(
        tmp_path, SeeGradients(), elastic(), max_epochs=1, gradient_clip_val=clip, gradient_clip_algorithm=algorithm
    )
    for rank in ranks:
        assert (max(rank["gradients"]) <= 0.01 + 1e-9) == (clip is not None)


class Scheduled(Linear):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        if self.how == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "bad"}}
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": self.how}]

    def on_validation_epoch_end(self) -> None:
        self.log("bad", 1.0 + self.global_rank, sync_dist=True)  # gets no better: reduced after every epoch but one

    def on_train_epoch_end(self) -> None:
        recorder_of(self).seen.setdefault("lr", []).append(self.optimizers().param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("how", "lrs"),
    [
        ("step", [0.01 * 0.5**6, 0.01 * 0.5**12, 0.01 * 0.5**18]),
        ("epoch", [0.005, 0.0025, 0.00125]),
        ("plateau", [0.01, 0.01, 0.001]),
    ],
)
def test_learning_rate_schedulers(tmp_path: Path, how: str, lrs: list[float]) -> None:
    for rank in fit(tmp_path, Scheduled(how), elastic(), max_epochs=3, val=loader(), num_sanity_val_steps=0):
        assert rank["lr"] == pytest.approx(lrs)


# -- logging and decisions ------------------------------------------------------------------------------------------


class Logs(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.pooled = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.pooled.update(float(self.global_rank))
        self.log("own", float(self.global_rank))
        self.log("synced", float(self.global_rank), sync_dist=True)
        self.log("pooled", self.pooled)


def test_metrics_with_and_without_sync(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Logs(), elastic(), max_epochs=1, val=loader())
    assert [rank["metrics"]["own"] for rank in ranks] == [0.0, 1.0]
    assert [rank["metrics"]["synced"] for rank in ranks] == [0.5, 0.5]
    assert [rank["metrics"]["pooled"] for rank in ranks] == [0.5, 0.5]
    replicas = fit(tmp_path, Logs(), elastic(evaluate="replica"), max_epochs=1, val=loader())
    assert [rank["metrics"]["pooled"] for rank in replicas] == [0.0, 1.0]


class Disagree(Linear):
    """On rank 1 the metric gets worse from the second epoch on."""

    def on_validation_epoch_end(self) -> None:
        self.log("metric", float(self.current_epoch * (1 if self.global_rank == 1 else -1)))


def test_early_stopping_of_ranks_that_disagree_is_one_decision(tmp_path: Path) -> None:
    stopping = EarlyStopping("metric", patience=2)
    ranks = fit(tmp_path, Disagree(), elastic(), max_epochs=9, val=loader(), callbacks=[stopping])
    assert [rank["step"] for rank in ranks] == [18, 18], "after epoch 3 of 9"


class Unhurried(Linear):
    """Rank 1 comes late to the end of an epoch, where the states of a torchmetrics object are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.pooled.update(float(self.global_rank))
        self.log("pooled", self.pooled, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 1:
            time.sleep(4)


def test_a_rank_that_is_slow_is_waited_for_where_torchmetrics_pool(tmp_path: Path, monkeypatch: Any) -> None:
    """Beyond the timeout of gloo's own collectives: the ranks meet first."""
    gather = torchmetrics.metric.gather_all_tensors

    def quickly(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic()
        gathered = gather(*args, **kwargs)
        assert time.monotonic() - begin < 2, "the rank that came first waited in gloo"
        return gathered

    for module in (torchmetrics.metric, meeting):
        monkeypatch.setattr(module, "gather_all_tensors", quickly)
    ranks = fit(tmp_path, Unhurried(), elastic(), max_epochs=1)
    assert [rank["metrics"]["pooled"] for rank in ranks] == [0.5, 0.5]


class StopOnOneRank(Linear):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 1 and self.current_epoch == 1 and batch_idx == 2:
            self.trainer.should_stop = True


@pytest.mark.parametrize("validate", [False, True])
def test_should_stop_on_one_rank_ends_all(tmp_path: Path, validate: bool) -> None:
    val = loader() if validate else None
    ranks = fit(tmp_path, StopOnOneRank(), elastic(), devices=3, max_epochs=500, val=val)
    assert len({rank["step"] for rank in ranks}) == 1
    assert 7 <= ranks[0]["step"] < 100
    for rank in ranks:
        assert torch.equal(rank["state"]["layer.weight"], ranks[0]["state"]["layer.weight"])


# -- weight averaging, finetuning, compiled modules -------------------------------------------------------------------


class Kept(StochasticWeightAveraging):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        recorder_of(pl_module).seen["average"] = pl_module.layer.weight.detach().clone()


def test_stochastic_weight_averaging(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Linear(), elastic(), max_epochs=4, callbacks=[Kept(swa_lrs=0.01, swa_epoch_start=2)])
    averages = torch.stack([rank["average"] for rank in ranks])
    assert not torch.equal(averages[0], averages[1]), "each rank averages its own replica"
    for rank in ranks:
        torch.testing.assert_close(rank["state"]["layer.weight"], averages.mean(0), rtol=1e-12, atol=1e-12)


class ValidatesAverage(Linear):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        recorder_of(self).seen["validated"] = self.layer.weight.detach().clone()

    def on_validation_end(self) -> None:
        average = next(c for c in self.trainer.callbacks if isinstance(c, WeightAveraging))._average_model
        if average is not None:
            recorder_of(self).seen["own"] = average.module.layer.weight.detach().clone()


def test_the_mean_of_averaged_weights_is_validated(tmp_path: Path) -> None:
    ranks = fit(tmp_path, ValidatesAverage(), elastic(), max_epochs=2, val=loader(), callbacks=[WeightAveraging()])
    own = torch.stack([rank["own"] for rank in ranks])
    assert not torch.equal(own[0], own[1]), "each rank gets its own average back"
    for rank in ranks:
        torch.testing.assert_close(rank["validated"], own.mean(0), rtol=1e-12, atol=1e-12)


class Backbone(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.backbone(batch[0]), batch[1]), batch_idx)

    def on_train_epoch_end(self) -> None:
        recorder_of(self).seen.setdefault("bytes", []).append(self.trainer.strategy.exchange.stats.bytes_sent)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layer.parameters(), lr=0.01)


def test_parameters_that_unfreeze_begin_to_travel(tmp_path: Path) -> None:
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.001, train_bn=False)
    [seen, _] = [rank["bytes"] for rank in fit(tmp_path, Backbone(), elastic(), max_epochs=4, callbacks=[callback])]
    per_step = [(after - before) / 6 for before, after in itertools.pairwise([0, *seen])]
    assert per_step == [64, 64, 128, 128], "4 numbers of 8 bytes, then 16, to the end of the cache line"


def test_compiled_modules(tmp_path: Path) -> None:
    compiled: Any = torch.compile(Linear(), backend="eager")
    ranks = fit(tmp_path, compiled, elastic(), max_epochs=2)
    assert [rank["step"] for rank in ranks] == [12, 12]
    assert torch.equal(ranks[0]["state"]["layer.weight"], ranks[1]["state"]["layer.weight"])


# -- limits and intervals -------------------------------------------------------------------------------------------


class Counts(Linear):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        seen = recorder_of(self).seen
        seen["validated"] = seen.get("validated", 0) + 1


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("kwargs", "steps", "validated"),
    [
        ({"limit_train_batches": 3, "limit_val_batches": 2, "max_epochs": 2}, 6, 4),
        ({"val_check_interval": 2, "max_epochs": 1}, 6, 9),
        ({"val_check_interval": 0.5, "max_epochs": 1}, 6, 6),
        ({"overfit_batches": 2, "max_epochs": 2}, 4, 0),
        ({"fast_dev_run": 2}, 2, 2),
        ({"max_steps": 7, "max_epochs": -1}, 7, 3),
        ({"check_val_every_n_epoch": 2, "max_epochs": 3}, 18, 3),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 12, 6),
    ],
)
def test_limits(tmp_path: Path, kwargs: dict[str, Any], steps: int, validated: int) -> None:
    val = None if "overfit_batches" in kwargs else loader(batch_size=8)
    for rank in fit(tmp_path, Counts(), elastic(), val=val, num_sanity_val_steps=0, **kwargs):
        assert (rank["step"], rank.get("validated", 0)) == (steps, validated)


def test_max_time(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Linear(), elastic(), max_epochs=-1, max_time={"seconds": 2})
    assert ranks[0]["step"] == ranks[1]["step"] > 6


def test_max_steps_in_the_middle_of_a_round(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Linear(), elastic(period=4, delay=3), max_steps=9, max_epochs=-1)
    assert [rank["step"] for rank in ranks] == [9, 9]
    assert torch.equal(ranks[0]["state"]["layer.weight"], ranks[1]["state"]["layer.weight"])


class NoneOnOneRank(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.global_rank == 1 and batch_idx % 2 else super().training_step(batch, batch_idx)


def test_training_step_may_return_none_on_one_rank(tmp_path: Path) -> None:
    assert [rank["step"] for rank in fit(tmp_path, NoneOnOneRank(), elastic(), max_epochs=2)] == [12, 12]


# -- data -----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Gives rank k 4 + 3k batches, which nobody knows beforehand."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module

    def __iter__(self) -> Iterator[Any]:
        x, y = regression().tensors
        return iter([(x[i], y[i]) for i in range(4 + 3 * self.module.global_rank)])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"period": 2, "delay": 1}, {"peers": "uniform"}])
def test_unequal_batch_counts(tmp_path: Path, kwargs: dict[str, Any], validate: bool) -> None:
    module = Counting()
    ranks = fit(
        tmp_path,
        module,
        elastic(**kwargs),
        devices=3,
        max_epochs=2,
        train=DataLoader(Stream(module), 1),
        val=loader() if validate else None,
    )
    assert [rank["batches"] for rank in ranks] == [8, 14, 20], "every epoch is finished by every rank"
    assert [rank["step"] for rank in ranks] == [20, 20, 20], "clocks meet at the largest"
    for rank in ranks:
        assert torch.equal(rank["state"]["layer.weight"], ranks[0]["state"]["layer.weight"])


class Counting(Linear):
    def on_train_batch_end(self, *args: Any) -> None:
        seen = recorder_of(self).seen
        seen["batches"] = seen.get("batches", 0) + 1


class SkipsEpoch(Counting):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.global_rank == 1 and self.current_epoch == 1 and batch_idx == 2 else None


def test_a_rank_that_skips_the_rest_of_an_epoch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved")
    ranks = fit(tmp_path, SkipsEpoch(), elastic(), max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True)
    assert [rank["batches"] for rank in ranks] == [18, 14]
    assert [rank["step"] for rank in ranks] == [18, 18]


# -- evaluation alone, profilers, command line, finders ---------------------------------------------------------------


class Predicts(Linear):
    def predict_step(self, batch: Any, batch_idx: int) -> None:
        (Path(self.trainer.default_root_dir) / f"predicted_{self.global_rank}_{batch_idx}").touch()


def test_validate_test_and_predict_alone_and_after_fit(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=elastic(),
        logger=False,
        max_epochs=20,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Predicts()
    [before] = trainer.validate(module, loader(), verbose=False)
    trainer.fit(module, loader())
    [validated] = trainer.validate(module, loader(), verbose=False)
    [tested] = trainer.test(module, loader(), verbose=False)
    x, y = regression().tensors
    expected = float(nn.functional.mse_loss(module.layer(x).squeeze(1), y))
    assert validated["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert validated["val_loss"] < before["val_loss"]
    assert tested["test_loss"] > 0
    trainer.predict(module, loader(), return_predictions=False)
    assert len(list(tmp_path.glob("predicted_*"))) == 12, "sharded over the ranks"


def test_profilers(tmp_path: Path) -> None:
    class Durations(Recorder):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.seen["profiled"] = {name: len(times) for name, times in trainer.profiler.recorded_durations.items()}
            super().on_fit_end(trainer, pl_module)

    ranks = fit(tmp_path, Linear(), elastic(), max_epochs=1, profiler=SimpleProfiler(), recorder=Durations(tmp_path))
    for rank in ranks:
        assert rank["profiled"]["run_training_batch"] == 6


def test_lightning_cli_with_a_yaml_file(tmp_path: Path) -> None:
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "strategy": {
                "class_path": "lightning_gossip.ElasticGossipStrategy",
                "init_args": {"alpha": 0.25, "period": 2, "wire_dtype": "bfloat16", "start_method": "fork"},
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.strategy.init_args.seed", "3"]
    cli = LightningCLI(Linear, Data, args=arguments, save_config_callback=None)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, ElasticGossipStrategy)
    assert (strategy.alpha, strategy.schedule.period, strategy.schedule.seed) == (0.25, 2, 3)
    assert strategy.wire_dtype is torch.bfloat16
    assert cli.trainer.state.finished


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


class Rated(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-9

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_learning_rate_finder(tmp_path: Path) -> None:
    class Rate(Recorder):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.seen["lr"] = pl_module.lr
            super().on_fit_end(trainer, pl_module)

    finder = LearningRateFinder(min_lr=1e-6, max_lr=1.0, num_training_steps=20)
    ranks = fit(
        tmp_path, Rated(), elastic(), max_epochs=2, callbacks=[finder], train=loader(480), recorder=Rate(tmp_path)
    )
    assert ranks[0]["lr"] == ranks[1]["lr"] > 1e-8
    assert [rank["step"] for rank in ranks] == [120, 120], "the finder's steps are taken back"
    assert not list(tmp_path.glob(".lr_find*")), "its checkpoint is gone"


class Raises(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 3:
            raise ValueError("boom")
        return super().training_step(batch, batch_idx)


@pytest.mark.faults
def test_on_exception_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="boom"):
        fit(
            tmp_path,
            Raises(),
            elastic(),
            max_epochs=1,
            callbacks=[OnExceptionCheckpoint(tmp_path, "failed")],
            enable_checkpointing=True,
        )
    checkpoint = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"layer.weight", "layer.bias"}
    ranks = fit(tmp_path, Linear(), elastic(), max_epochs=2, ckpt_path=tmp_path / "failed.ckpt")
    assert ranks[0]["step"] == ranks[1]["step"] >= 9


def test_several_loaders_and_a_sampler_of_ones_own(tmp_path: Path) -> None:
    data = TensorDataset(*regression().tensors)
    mine = DataLoader(data, 4, sampler=torch.utils.data.SequentialSampler(data))
    ranks = fit(tmp_path, Counting(), elastic(), max_epochs=1, train=mine, use_distributed_sampler=False)
    assert [rank["batches"] for rank in ranks] == [12, 12], "not sharded"
