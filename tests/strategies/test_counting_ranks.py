"""Ranks with unequal numbers of batches, an empty loader among them, come to one decision (design §7)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, Recorder, regression
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from ranks import Rank, run_ranks
from torch.utils.data import DataLoader, IterableDataset

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy, GossipStrategy


class Unsized(IterableDataset):
    """Rows of which nobody knows the number."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        data = regression(self.rows)
        return (data[index] for index in range(self.rows))


class Uneven(Linear):
    """A number of batches for each rank and epoch."""

    def __init__(self, lengths: list[tuple[int, ...]], sized: bool = True, val: tuple[int, ...] = (3, 3, 3)) -> None:
        super().__init__()
        self.lengths, self.sized, self.val = lengths, sized, val
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def train_dataloader(self) -> Any:
        epoch = min(self.trainer.current_epoch, len(self.lengths) - 1)
        rows = 2 * self.lengths[epoch][self.trainer.global_rank]
        if not self.sized:
            return DataLoader(Unsized(rows), 2)
        data = torch.utils.data.Subset(regression(2 * max(map(max, self.lengths))), range(rows))
        return DataLoader(data, 2)

    def val_dataloader(self) -> Any:
        rows = 2 * self.val[self.trainer.global_rank]
        return DataLoader(torch.utils.data.Subset(regression(100), range(rows)), 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", Linear.training_step(self, batch, batch_idx))


class Watcher(Recorder):
    """Records the counts at which this rank validated and saved, and what is left at the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen |= {"validated": [], "saved": [], "batches": 0}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen["validated"].append(trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.seen["saved"].append(checkpoint["global_step"])

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen["batches"] += 1

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["global_step"], self.seen["epoch"] = trainer.global_step, trainer.current_epoch
        super().on_fit_end(trainer, pl_module)


def train(
    folder: Path, module: Uneven, strategy: Any = None, callbacks: Any = (), **kwargs: Any
) -> list[dict[str, Any]]:
    devices = len(module.lengths[0])
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy or ElasticGossipStrategy(start_method="fork", timeout=timedelta(seconds=30)),
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        use_distributed_sampler=False,
        callbacks=[*callbacks, Watcher(folder)],
        **kwargs,
    )
    trainer.fit(module)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(devices)]


def check_alike(results: list[dict[str, Any]], *names: str) -> None:
    for name in ("validated", "saved", "global_step", "epoch", "step", *names):
        assert all(result[name] == results[0][name] for result in results), (name, results)
    for key, value in results[0]["state"].items():
        assert all(torch.equal(value, result["state"][key]) for result in results), "all have the consensus"


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_validations_within_an_epoch(tmp_path: Path, sized: bool) -> None:
    results = train(tmp_path, Uneven([(8, 12)], sized), val_check_interval=5, max_epochs=2)
    check_alike(results)
    assert results[0]["validated"] == [5, 10, 17, 22]
    assert [result["batches"] for result in results] == [16, 24]


def test_the_number_of_steps_is_that_of_the_rank_with_most(tmp_path: Path) -> None:
    results = train(tmp_path, Uneven([(8, 12)]), max_steps=20, max_epochs=-1)
    check_alike(results)
    assert (results[0]["global_step"], [result["batches"] for result in results]) == (20, [16, 20])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_checkpoints_every_so_many_steps(tmp_path: Path, sized: bool) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    results = train(tmp_path, Uneven([(8, 12)], sized), callbacks=[checkpoint], max_epochs=3)
    check_alike(results)
    assert results[0]["saved"] == [10, 20, 30]
    assert sorted(path.name for path in (tmp_path / "saved").glob("*.ckpt")) == [f"step={n}.ckpt" for n in (10, 20, 30)]


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"val_check_interval": 7, "check_val_every_n_epoch": None},
        {"val_check_interval": 0.4},
        {"val_check_interval": 4, "max_steps": 22},
        {"val_check_interval": 2, "max_steps": 20},
        {"accumulate_grad_batches": 3, "val_check_interval": 4},
        {"limit_train_batches": 10, "val_check_interval": 5},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(8, 12, 10), (12, 8, 9)], ids=str)
def test_all_at_once_on_three_ranks(tmp_path: Path, kwargs: dict[str, Any], lengths: tuple[int, ...]) -> None:
    callbacks = [
        ModelCheckpoint(tmp_path / "a", every_n_train_steps=4, save_top_k=-1),
        ModelCheckpoint(tmp_path / "b", every_n_train_steps=3, monitor="val_loss", save_last=True),
        ModelCheckpoint(tmp_path / "c", monitor="val_loss"),
    ]
    results = train(tmp_path, Uneven([lengths]), callbacks=callbacks, **{"max_epochs": 2, **kwargs})
    check_alike(results)
    assert results[0]["validated"]
    assert len(set(results[0]["validated"])) == len(results[0]["validated"]), "each once"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("lengths", [(30, 12), (12, 30)], ids=str)
def test_downpour_workers_at_paces_of_their_own(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "a", every_n_train_steps=7, save_top_k=-1)
    strategy = DownpourStrategy(n_push=2, n_pull=3, start_method="fork", timeout=timedelta(seconds=30))
    results = train(
        tmp_path, Uneven([lengths]), strategy, [checkpoint], val_check_interval=5, max_epochs=2, max_steps=55
    )
    for name in ("validated", "saved", "global_step", "epoch"):
        assert results[0][name] == results[1][name]
    assert results[0]["validated"] == [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55]


def test_lengths_that_become_unequal(tmp_path: Path) -> None:
    module = Uneven([(6, 6), (4, 9), (6, 6)])
    results = train(tmp_path, module, val_check_interval=4, reload_dataloaders_every_n_epochs=1, max_epochs=3)
    check_alike(results)
    assert results[0]["validated"] == [4, 10, 14, 19]


def test_one_rank_that_stops_early_stops_all(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop |= trainer.global_rank == 1 and trainer.global_step == 10

    results = train(tmp_path, Uneven([(4, 400)]), callbacks=[Stop()], max_epochs=5)
    check_alike(results)
    assert results[0]["epoch"] == 1


@pytest.mark.one_in(4)
@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("name", ["elastic", "push", "downpour"])
def test_a_rank_without_batches_is_done(tmp_path: Path, empty: int, name: str) -> None:
    strategy: Any = {
        "elastic": ElasticGossipStrategy(start_method="fork", timeout=timedelta(seconds=30)),
        "push": GossipStrategy("push", period=2, start_method="fork", timeout=timedelta(seconds=30)),
        "downpour": DownpourStrategy(warmup_steps=2, start_method="fork", timeout=timedelta(seconds=30)),
    }[name]
    lengths = (0, 6) if empty == 0 else (6, 0)
    module = Uneven([lengths], val=(0, 3) if empty == 0 else (3, 0))
    callbacks = [ModelCheckpoint(tmp_path / "a", every_n_train_steps=4, save_top_k=-1)]
    results = train(tmp_path, module, strategy, callbacks, val_check_interval=3, max_epochs=2)
    if name == "downpour":
        for result in results:
            result["step"] = 0  # each worker's own
    check_alike(results)
    assert results[0]["validated"] == [3, 6, 9, 12]
    assert results[0]["saved"] == [4, 8, 12]
    assert results[empty]["batches"] == 0


def test_a_rank_that_becomes_empty(tmp_path: Path) -> None:
    module = Uneven([(4, 4, 4), (4, 0, 6), (0, 5, 3)])
    stop = EarlyStopping("val_loss", patience=50, check_finite=False)
    results = train(tmp_path, module, callbacks=[stop], reload_dataloaders_every_n_epochs=1, max_epochs=3)
    check_alike(results)
    assert [result["batches"] for result in results] == [8, 9, 13]


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [({"max_time": timedelta(hours=1)}, "max_time"), ({}, "train_time_interval")],
    ids=["max_time", "train_time_interval"],
)
def test_what_asks_all_ranks_for_the_time_is_refused(tmp_path: Path, kwargs: dict[str, Any], named: str) -> None:
    callbacks = [ModelCheckpoint(tmp_path / "a", train_time_interval=timedelta(hours=1))] if not kwargs else []
    with pytest.raises(Exception, match=f"{named}.*unequal numbers of batches, \\[8, 12\\]"):
        train(tmp_path, Uneven([(8, 12)]), callbacks=callbacks, max_epochs=1, **kwargs)


def test_a_collective_in_a_step_says_that_a_rank_is_done(tmp_path: Path) -> None:
    class Pooled(Uneven):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, sync_dist=True, on_step=True)
            return loss

    with pytest.raises(Exception, match=r"out of batches.*'reduce'"):
        train(tmp_path, Pooled([(3, 6)]), max_epochs=1)


def test_ranks_that_wait_follow_the_others() -> None:
    """Three ranks leave one after the other, and meet meanwhile for what those that are left want."""

    def body(rank: Rank) -> list[str]:
        met: list[str] = []

        def follow(reason: str) -> None:
            rank.control.meet(reason)
            met.append(reason)

        for turn in range(rank.rank):
            follow(f"turn {turn}")
        rank.control.await_all("the end", follow)
        return met

    for results in (run_ranks(3, body), run_ranks(4, body)):
        assert all(met == [f"turn {turn}" for turn in range(len(results) - 1)] for met in results)
