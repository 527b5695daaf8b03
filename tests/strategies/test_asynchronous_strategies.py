"""Asynchronous gossip in real `Trainer.fit` runs: nobody waits, and the replicas' mean is the optimizers' alone."""

# a Trainer gets its attributes at run time, and what is an attribute of a module torch declares Tensor | Module
# mypy: disable-error-code="attr-defined, union-attr, operator"

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, Recorder, fit, recorded, regression
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gossip import ElasticGossipStrategy, GossipMonitor, GossipStrategy
from lightning_gossip.exchange.asynchronous import AsynchronousExchange


def asynchronous(make: Any = ElasticGossipStrategy, **options: Any) -> Any:
    options = {"start_method": "fork", "timeout": timedelta(seconds=30), "evaluate": "replica", **options}
    return make(asynchronous=True, **{"dealt": False, **options})


class Uneven(Linear):
    """Rank 0 is three times slower; it sums what its optimizer adds, and notes when its parameters stand still."""

    def __init__(self, seconds: float = 0.005) -> None:
        super().__init__()
        self.seconds = seconds
        self.updates = {name: torch.zeros_like(p) for name, p in self.named_parameters()}
        self.still: list[tuple[str, bool]] = []
        self.waited = 0.0

    def look(self, where: str) -> None:
        exchange = self.trainer.strategy.exchange
        if exchange.step:  # it takes part from its first step on
            self.still.append((where, bool(exchange._still._open)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.look("training_step")
        time.sleep(self.seconds * (3 if self.global_rank == 0 else 1))
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        before = {name: p.detach().clone() for name, p in self.named_parameters()}
        super().optimizer_step(*args, **kwargs)
        for name, p in self.named_parameters():
            self.updates[name] += p.detach() - before[name]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.look("update")

    def on_train_start(self) -> None:
        seen = recorded(self)
        seen["initial"] = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.trainer.strategy.exchange.records = seen["records"] = []
        seen["began"] = time.monotonic()

    def on_train_batch_end(self, *args: Any) -> None:
        self.look("between")
        recorded(self)["ended"] = time.monotonic()  # before it waits for the others' last batches
        stats = self.trainer.strategy.exchange.stats
        self.waited = max(self.waited, stats.wait_seconds)

    def on_train_epoch_end(self) -> None:
        recorded(self).setdefault("epochs", []).append(time.monotonic())

    def on_train_end(self) -> None:
        seen = recorded(self)
        seen |= {"updates": self.updates, "still": self.still, "waited": self.waited}
        seen["stats"] = self.trainer.strategy.exchange.stats


def check_mean(ranks: list[dict[str, Any]]) -> None:
    for name in ranks[0]["initial"]:
        mean = torch.stack([rank["state"][name] for rank in ranks]).mean(0)
        alone = torch.stack([rank["initial"][name] + rank["updates"][name] for rank in ranks]).mean(0)
        torch.testing.assert_close(mean, alone, rtol=0, atol=1e-12)


def check_window(ranks: list[dict[str, Any]], every_batch_is_a_step: bool = True) -> None:
    """The window is open but at updates; after a meeting, such as an epoch's end, from the next step on."""
    for rank in ranks:
        assert set(rank["still"]) >= {("training_step", True), ("update", False), ("between", True)}
        never = {("update", True)}
        if every_batch_is_a_step:
            never |= {("training_step", False), ("between", False)}
        assert not never & set(rank["still"])


@pytest.mark.parametrize("devices", [2, 4])
def test_the_fast_ranks_do_not_wait_and_the_mean_is_the_optimizers(tmp_path: Path, devices: int) -> None:
    rows = 160 * devices
    data = DataLoader(regression(rows), 4)
    ranks = fit(tmp_path, Uneven(0.01), asynchronous(), devices=devices, max_epochs=1, train=data)
    check_mean(ranks)
    check_window(ranks)
    first, *others = ((rank["ended"] - rank["began"]) / 40 for rank in ranks)
    assert all(seconds < 0.75 * first for seconds in others), (first, others)
    for rank in ranks:
        stats = rank["stats"]
        assert stats.exchanges == len(rank["records"]) > 5
        assert rank["step"] == 40
        assert rank["waited"] < 0.05
    lags = [record.lag for rank in ranks[1:] for record in rank["records"] if record.others[0][0] == 0]
    assert lags
    assert max(lags) > 3, "rank 0 falls behind"


@pytest.mark.parametrize("variant", ["pull", "push"])
def test_gossip_pulls_and_pushes(tmp_path: Path, variant: str) -> None:
    strategy = asynchronous(GossipStrategy, variant=variant, period=2)
    ranks = fit(tmp_path, Uneven(0.002), strategy, devices=3, max_epochs=2, train=DataLoader(regression(120), 4))
    check_window(ranks)
    assert all(rank["step"] == 20 for rank in ranks)
    assert sum(rank["stats"].exchanges for rank in ranks) > 10
    weights = torch.stack([rank["state"]["layer.weight"] for rank in ranks])
    assert (weights - weights.mean(0)).abs().max() < 1


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.5}, {"precision": "64-true"}]
)
def test_what_a_trainer_does_besides(tmp_path: Path, options: dict[str, Any]) -> None:
    ranks = fit(tmp_path, Uneven(0.002), asynchronous(period=2), max_epochs=2, **options)
    check_mean(ranks)
    check_window(ranks, every_batch_is_a_step="accumulate_grad_batches" not in options)
    assert ranks[0]["step"] == 12 // options.get("accumulate_grad_batches", 1)


class ByHand(Uneven):
    """Manual optimization with two optimizers, of which the second is called past Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(3, 1, dtype=torch.float64)
        self.updates = {name: torch.zeros_like(p) for name, p in self.named_parameters()}

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        x, y = batch
        before = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.look("training_step")
        for optimizer, layer in ((second.optimizer, self.other), (first, self.layer)):
            time.sleep(self.seconds)
            loss = nn.functional.mse_loss(layer(x).squeeze(1), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.look("update")
        for name, p in self.named_parameters():
            self.updates[name] += p.detach() - before[name]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (self.layer, self.other)]


def test_manual_optimization_shuts_before_the_first_update_of_any_optimizer(tmp_path: Path) -> None:
    ranks = fit(tmp_path, ByHand(), asynchronous(), max_epochs=2)
    check_mean(ranks)
    check_window(ranks)


class Searching(Uneven):
    """LBFGS calls its closure several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_an_optimizer_that_calls_its_closure_again_updates_behind_shut_doors(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Searching(0.001), asynchronous(), max_epochs=1)
    check_mean(ranks)
    for rank in ranks:
        looks = [still for where, still in rank["still"] if where == "training_step"]
        assert looks[:2] == [True, False]


def test_validations_and_checkpoints_are_of_the_mean(tmp_path: Path) -> None:
    """All meet for them, and nothing is half applied then."""
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, filename="{epoch}", every_n_epochs=1)
    ranks = fit(
        tmp_path,
        Uneven(0.002),
        asynchronous(evaluate="consensus"),
        devices=3,
        max_epochs=3,
        train=DataLoader(regression(72), 4),
        val=DataLoader(regression(), 4),
        callbacks=[checkpoint],
        enable_checkpointing=True,
    )
    last = torch.load(tmp_path / "checkpoints" / "epoch=2.ckpt", weights_only=False)
    for name in ("layer.weight", "layer.bias"):
        alone = torch.stack([rank["initial"][name] + rank["updates"][name] for rank in ranks]).mean(0)
        torch.testing.assert_close(last["state_dict"][name], alone, rtol=0, atol=1e-12)
        for rank in ranks:
            torch.testing.assert_close(rank["state"][name], alone, rtol=0, atol=1e-12)


class Unequal(pl.LightningDataModule):
    """Rank 0 has a third of the batches."""

    def train_dataloader(self) -> Any:
        rows = 40 if self.trainer.global_rank == 0 else 120
        return DataLoader(regression(rows), 4)

    def val_dataloader(self) -> Any:
        return DataLoader(regression(), 4)


def test_a_rank_that_is_out_of_batches_is_busy_and_follows_the_others(tmp_path: Path) -> None:
    ranks = fit(
        tmp_path,
        Uneven(0.002),
        asynchronous(evaluate="consensus"),
        devices=3,
        max_epochs=2,
        train=Unequal(),
        use_distributed_sampler=False,
    )
    assert [rank["step"] for rank in ranks] == [20, 60, 60]
    for name in ("layer.weight", "layer.bias"):
        alone = torch.stack([rank["initial"][name] + rank["updates"][name] for rank in ranks]).mean(0)
        for rank in ranks:
            torch.testing.assert_close(rank["state"][name], alone, rtol=0, atol=1e-12)


class Starts(Recorder):
    """Notes what a training begins with."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen["step at start"] = trainer.strategy.step
        self.seen["exchanges at start"] = trainer.strategy.exchange.stats.exchanges
        self.seen["weights at start"] = pl_module.layer.weight.detach().clone()


def test_a_resume_goes_on_from_each_rank_s_replica_and_clock(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
    before = fit(
        tmp_path, Uneven(0.001), asynchronous(), max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True
    )
    after = fit(
        tmp_path,
        Linear(),
        asynchronous(),
        max_epochs=3,
        recorder=Starts(tmp_path),
        ckpt_path=tmp_path / "checkpoints" / "epoch=1.ckpt",
    )
    for earlier, later in zip(before, after, strict=True):
        assert later["step at start"] == 12
        assert later["exchanges at start"] == earlier["stats"].exchanges
        torch.testing.assert_close(later["weights at start"], earlier["state"]["layer.weight"], rtol=0, atol=0)
        assert later["step"] == 18


class Metrics(pl.loggers.Logger):
    """Keeps in the recorder what is logged."""

    name, version = "metrics", 0

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Logged(Recorder):
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["rows"] = trainer.loggers[0].rows
        super().on_fit_end(trainer, pl_module)


def test_the_monitor_logs_lags_and_the_share_of_busy_rounds(tmp_path: Path) -> None:
    ranks = fit(
        tmp_path,
        Uneven(0.003),
        asynchronous(),
        devices=3,
        max_epochs=1,
        train=DataLoader(regression(360), 4),
        callbacks=[GossipMonitor(every_n_steps=2)],
        recorder=Logged(tmp_path),
        logger=Metrics(),
    )
    rows = ranks[0]["rows"]
    for tag in ("gossip/busy", "gossip/partner_step_lag", "gossip/wait_seconds", "gossip/exchanges"):
        assert any(tag in row for row in rows), tag
    assert all(0 <= row["gossip/busy"] <= 1 for row in rows if "gossip/busy" in row)
    assert any(row.get("gossip/partner_step_lag", 0) < 0 for row in rows), "the others are ahead of rank 0"


class Dies(Uneven):
    """Rank 1 is killed at its tenth batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if (self.global_rank, batch_idx) == (1, 10):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_those_that_are_left_go_on_without_one_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"rank_1\.pt"):
        fit(
            tmp_path,
            Dies(),
            asynchronous(min_replicas=2, evaluate="consensus"),
            devices=4,
            max_epochs=2,
            train=DataLoader(regression(320), 4),
            val=DataLoader(regression(), 4),
        )
    left = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in (0, 2, 3)]
    assert all(rank["step"] > 20 for rank in left)
    assert all(rank["waited"] < 0.5 for rank in left)
    for rank in left[1:]:
        torch.testing.assert_close(rank["state"]["layer.weight"], left[0]["state"]["layer.weight"], rtol=0, atol=0)
    late = [record for rank in left for record in rank["records"] if record.moment > 20]
    assert late
    assert all(record.others[0][0] != 1 for record in late)


class Fails(Uneven):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if (self.global_rank, batch_idx) == (1, 10):
            raise RuntimeError("enough of this")


def test_an_exception_ends_all_with_its_cause(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match="enough of this"):
        fit(tmp_path, Fails(0.01), asynchronous(), devices=3, max_epochs=5, train=DataLoader(regression(360), 4))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("make", [ElasticGossipStrategy, GossipStrategy])
def test_arguments(make: Any) -> None:
    assert make(asynchronous=True).hyperparameters["asynchronous"] is True
    assert make().hyperparameters["asynchronous"] is False
    assert make().steps_go_together
    assert not make(asynchronous=True).steps_go_together
    with pytest.raises(ValueError, match=r"`delay` must be 0 with `asynchronous=True`, got 3"):
        make(asynchronous=True, period=4, delay=3)
    with pytest.raises(ValueError, match=r"`asynchronous=True` needs gloo"):
        make(asynchronous=True, process_group_backend="nccl")
    with pytest.raises(ValueError, match=r"`asynchronous` must be"):
        make(asynchronous="yes")


def test_an_exchange_in_flight_by_step_is_not_taken_over() -> None:
    strategy = ElasticGossipStrategy(asynchronous=True)
    exchange = AsynchronousExchange(0, 1, strategy.schedule, strategy.rule, None, None, dict)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`asynchronous=True` can not apply"):
        exchange.load_state_dict({"step": 3, "stats": {}, "in_flight": {"step": 3}})
