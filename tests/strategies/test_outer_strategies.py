"""LocalSGD, DiLoCo and elastic gossip with an outer step under Lightning: real fits of forked ranks, and arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_gossip
from lightning_gossip import DiLoCoStrategy, ElasticGossipStrategy, GossipMonitor, LocalSGDStrategy
from lightning_gossip.strategies.base import ReplicaStrategy
from lightning_gossip.strategies.clocked import ClockedStrategy

ROUNDS: dict[str, Any] = {"period": 4, "delay": 3}  # 6 steps an epoch: an epoch ends in mid-flight and in mid-round


def strategies() -> dict[str, ReplicaStrategy]:
    return {
        "local_sgd": LocalSGDStrategy(**ROUNDS, start_method="fork"),
        "diloco": DiLoCoStrategy(**ROUNDS, start_method="fork"),
        "diloco, 16 bits": DiLoCoStrategy(**ROUNDS, wire_dtype="bfloat16", start_method="fork"),
        "elastic gossip": ElasticGossipStrategy(**ROUNDS, outer_lr=0.7, outer_momentum=0.9, start_method="fork"),
    }


class TwoLayers(Linear):
    """With layers for two fragments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(  # type: ignore[assignment]
            torch.nn.Linear(3, 5, dtype=torch.float64), torch.nn.Tanh(), torch.nn.Linear(5, 1, dtype=torch.float64)
        )


class Starts(Callback):
    """Keeps the common start and the clock at the end of training."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(trainer.strategy, ClockedStrategy)
        exchange = trainer.strategy.exchange
        assert exchange is not None
        if hasattr(exchange, "starts"):
            self.recorder.seen["starts"] = {name: start.clone() for name, start in exchange.starts.items()}
        self.recorder.seen["stats"] = exchange.stats


def run(folder: Path, strategy: Any, **kwargs: Any) -> list[dict[str, Any]]:
    pl.seed_everything(3, verbose=False)
    recorder = Recorder(folder)
    callbacks = [Starts(recorder), *kwargs.pop("callbacks", ())]
    kwargs.setdefault("max_epochs", 4)
    return fit(folder, kwargs.pop("module", TwoLayers()), strategy, recorder=recorder, callbacks=callbacks, **kwargs)


def parameters(seen: dict[str, Any]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in seen["state"].values()])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("scheme", strategies())
def test_a_resume_is_exact_in_mid_round_and_in_mid_flight(tmp_path: Path, scheme: str) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    unbroken = run(
        tmp_path,
        strategies()[scheme],
        callbacks=[checkpoint],
        enable_checkpointing=True,
        val=DataLoader(regression(), 8),
    )
    resumed = run(
        tmp_path, strategies()[scheme], ckpt_path=tmp_path / "saved" / "epoch=0.ckpt", val=DataLoader(regression(), 8)
    )
    for before, after in zip(unbroken, resumed, strict=True):
        assert torch.equal(parameters(before), parameters(after))
        assert before["step"] == after["step"] == 24
        assert before["metrics"]["val_loss"] == after["metrics"]["val_loss"]
    assert torch.equal(parameters(unbroken[0]), parameters(unbroken[1])), "the consensus remains"
    saved = torch.load(next((tmp_path / "saved" / "epoch=0.ckpt.replicas").glob("*/rank_1.pt")), weights_only=True)
    assert saved["lightning_gossip"]["state"]["in_flight"], "nothing was in flight"


def test_two_ranks_that_gossip_in_every_round_train_as_under_diloco(tmp_path: Path) -> None:
    """Two protocols, one result: pairs over shared memory, and the all-reduce over links."""
    diloco = run(tmp_path, DiLoCoStrategy(**ROUNDS, start_method="fork"), max_epochs=6)
    outer: Any = {"outer_lr": 0.7, "outer_momentum": 0.9}
    gossip = run(tmp_path, ElasticGossipStrategy(alpha=0.5, **outer, **ROUNDS, start_method="fork"), max_epochs=6)
    plain = run(tmp_path, ElasticGossipStrategy(alpha=0.5, **ROUNDS, start_method="fork"), max_epochs=6)
    torch.testing.assert_close(parameters(diloco[0]), parameters(gossip[0]), rtol=0, atol=1e-12)
    assert (parameters(diloco[0]) - parameters(plain[0])).abs().max() > 1e-3
    assert diloco[0]["stats"].exchanges == 9


def test_one_and_zero_are_plain_elastic_gossip_bit_for_bit(tmp_path: Path) -> None:
    assert ElasticGossipStrategy(outer_lr=1.0, outer_momentum=0.0).outer is None
    explicit = run(tmp_path, ElasticGossipStrategy(outer_lr=1, outer_momentum=0, period=2, start_method="fork"))
    plain = run(tmp_path, ElasticGossipStrategy(period=2, start_method="fork"))
    for one, other in zip(explicit, plain, strict=True):
        assert torch.equal(parameters(one), parameters(other))


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_four_ranks_have_one_start_and_fragments_come_in_turn(tmp_path: Path, wire_dtype: Any) -> None:
    strategy = DiLoCoStrategy(period=4, delay=3, fragments=2, wire_dtype=wire_dtype, start_method="fork")
    seen = run(tmp_path, strategy, devices=4, train=DataLoader(regression(96), 4))
    for rank in seen:
        assert all(torch.equal(start, seen[0]["starts"][name]) for name, start in rank["starts"].items())
        assert rank["stats"].exchanges == 24 // 4 + (24 + 2) // 4


@pytest.mark.parametrize("name", ["local_sgd_fork", "diloco_fork"])
def test_a_name_will_do(tmp_path: Path, name: str) -> None:
    seen = run(tmp_path, name, max_epochs=20)
    period = {"local_sgd_fork": 32, "diloco_fork": 100}[name]
    assert seen[0]["stats"].exchanges == 120 // period


def test_every_way_to_start_has_a_name() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    for name in ("local_sgd", "diloco"):
        for suffix in ("", "_spawn", "_fork", "_notebook"):
            assert f"{name}{suffix}" in StrategyRegistry
    assert {"DiLoCoStrategy", "LocalSGDStrategy"} <= set(lightning_gossip.__all__)


def test_training_gets_somewhere_and_the_monitor_counts_it(tmp_path: Path) -> None:
    class Memory(pl.loggers.logger.DummyLogger):
        logged: dict[str, float] = {}  # noqa: RUF012 - of the forked rank

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.logged.update(metrics)

    class Keep(Callback):
        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            [logger] = trainer.loggers
            assert isinstance(logger, Memory)
            recorder.seen["logged"] = dict(logger.logged)

    recorder = Recorder(tmp_path)
    pl.seed_everything(3, verbose=False)
    module = TwoLayers()
    at_start = float(module.training_step(regression()[:], 0).detach())
    seen = fit(
        tmp_path,
        module,
        DiLoCoStrategy(period=4, start_method="fork"),
        recorder=recorder,
        callbacks=[GossipMonitor(every_n_steps=6), Keep()],
        logger=Memory(),
        val=DataLoader(regression(), 8),
        max_epochs=12,
    )
    logged = seen[0]["logged"]
    nbytes = 256  # 26 elements of float64, padded to cache lines
    assert logged["gossip/exchanges"] == 72 // 4
    assert logged["gossip/bytes_sent"] == 72 // 4 * nbytes  # two ranks: half the model, twice
    assert logged["gossip/wait_seconds"] >= 0
    assert logged["gossip/mix_seconds"] > 0
    assert "gossip/partner" not in logged, "there is none"
    assert logged["gossip/consensus_distance"] < 0.5
    assert seen[0]["metrics"]["val_loss"] < at_start / 2


def test_ranks_with_unequal_numbers_of_batches_train_on(tmp_path: Path) -> None:
    class Uneven(TwoLayers):
        def train_dataloader(self) -> Any:
            rows = 48 if self.trainer.global_rank else 80
            return DataLoader(regression(rows), 4)

    recorder = Recorder(tmp_path)
    trainer_arguments: dict[str, Any] = {"use_distributed_sampler": False, "max_epochs": 3}
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DiLoCoStrategy(period=4, delay=2, start_method="fork"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Starts(recorder), recorder],
        **trainer_arguments,
    )
    trainer.fit(Uneven())
    seen = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    assert seen[0]["step"] == seen[1]["step"] == 60
    assert seen[0]["stats"].exchanges == seen[1]["stats"].exchanges == 9, "three rounds of each epoch, and no more"
    for name, start in seen[0]["starts"].items():
        assert torch.equal(start, seen[1]["starts"][name])


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        (DiLoCoStrategy, {"period": 0}, "`period` must be an integer of at least 1, got 0"),
        (DiLoCoStrategy, {"period": 4, "delay": 4}, r"`delay` must be an integer from 0 to 3 .*, got 4"),
        (DiLoCoStrategy, {"period": 4, "fragments": 5}, r"`fragments` must be an integer from 1 to 4 .*, got 5"),
        (DiLoCoStrategy, {"outer_lr": 0}, r"`outer_lr` must be a number in \(0, inf\), got 0"),
        (DiLoCoStrategy, {"outer_momentum": 1.0}, r"`outer_momentum` must be a number in \[0, 1\), got 1.0"),
        (DiLoCoStrategy, {"wire_dtype": "int8"}, "`wire_dtype` must be one of"),
        (LocalSGDStrategy, {"evaluate": "best"}, "`evaluate` must be one of"),
        (LocalSGDStrategy, {"period": True}, "`period` must be an integer of at least 1, got True"),
        (ElasticGossipStrategy, {"outer_lr": -1}, r"`outer_lr` must be a number in \(0, inf\), got -1"),
        (ElasticGossipStrategy, {"outer_momentum": "0.9"}, r"`outer_momentum` must be a number in \[0, 1\), got '0.9'"),
    ],
)
def test_arguments_are_checked_at_construction(strategy: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**arguments)


def test_unknown_arguments_are_not_swallowed() -> None:
    with pytest.raises(TypeError, match="outer_rate"):
        DiLoCoStrategy(outer_rate=0.7)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="outer_lr"):
        LocalSGDStrategy(outer_lr=0.7)  # type: ignore[call-arg]


def test_arguments_are_told_for_the_run_s_metadata() -> None:
    diloco = DiLoCoStrategy(period=50, delay=7, fragments=2, wire_dtype=torch.bfloat16).hyperparameters
    expected = {"period": 50, "delay": 7, "fragments": 2, "wire_dtype": "bfloat16", "evaluate": "consensus"}
    assert diloco.items() >= (expected | {"outer_lr": 0.7, "outer_momentum": 0.9}).items()
    assert "outer_lr" not in LocalSGDStrategy().hyperparameters
    gossip = ElasticGossipStrategy(outer_lr=0.7, outer_momentum=0.9).hyperparameters
    assert gossip.items() >= {"outer_lr": 0.7, "outer_momentum": 0.9}.items()


def test_more_fragments_than_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"`fragments` must be at most 1, the layers of this model, got 2"):
        run(tmp_path, DiLoCoStrategy(period=4, fragments=2, start_method="fork"), module=Linear())
