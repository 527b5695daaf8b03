"""Epochs of dealt work that are resumed in their middle, and such that lose ranks (design §10, §11)."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from dealt import SLOW, Walk, alike, batches, downpour, samples, train
from forked import recorded
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy, GossipStrategy, LocalSGDStrategy


class AtSaves(Callback):
    """Keeps what was trained of the present epoch when a checkpoint was saved."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        epochs = recorded(pl_module)["epochs"]
        step = checkpoint["global_step"]
        recorded(pl_module).setdefault("at", {})[step] = list(epochs.get(trainer.current_epoch, ()))


def trained_by(results: list[dict[str, Any]], step: int) -> list[int]:
    return [index for result in results for batch in result["at"][step] for index in batch]


def saver(folder: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=every, save_top_k=-1)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("before", "after", "workers"),
    [
        (4, 2, 0),
        (2, 4, 2),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((4, 4, 0), (4, 4, 2), (4, 2, 2), (2, 4, 0))),
    ],
)
def test_a_resume_trains_what_was_not(tmp_path: Path, before: int, after: int, workers: int) -> None:
    callbacks = [saver(tmp_path, 15), AtSaves()]
    module = Walk(240, SLOW, num_workers=workers)
    first = train(tmp_path, module, devices=before, callbacks=callbacks, max_epochs=2)
    trained = trained_by(first, 15)
    assert 20 < len(trained) < 240
    path = tmp_path / "saved/step=15.ckpt"
    second = train(tmp_path, Walk(240, SLOW, num_workers=workers), devices=after, ckpt_path=path, max_epochs=3)
    rest = samples(second, 0)
    assert sorted([*trained, *rest]) == list(range(240)), "every sample once, before or after"
    for epoch in (1, 2):
        assert samples(second, epoch) == list(range(240))
    alike(second)
    assert second[0]["epoch"] == 3


@pytest.mark.long
def test_a_resume_at_a_validation_within_an_epoch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path / "saved", filename="{step}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False
    )
    first = train(tmp_path, Walk(240, SLOW), callbacks=[checkpoint, AtSaves()], val_check_interval=0.5, max_epochs=1)
    middle, end = [step for _, step in first[0]["validated"]]
    trained = trained_by(first, middle)
    second = train(
        tmp_path,
        Walk(240, SLOW),
        ckpt_path=tmp_path / f"saved/step={middle}.ckpt",
        val_check_interval=0.5,
        max_epochs=2,
    )
    assert sorted([*trained, *samples(second, 0)]) == list(range(240))
    assert len(second[0]["validated"]) == 3, "that of the middle is not repeated"
    for devices in (4, 3):
        path = tmp_path / f"saved/step={end}.ckpt"
        third = train(tmp_path, Walk(240), devices=devices, ckpt_path=path, val_check_interval=0.5, max_epochs=2)
        assert samples(third, 0) == []
        assert samples(third, 1) == list(range(240))


@pytest.mark.long
def test_a_resume_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    callbacks = [ModelCheckpoint(tmp_path / "saved", filename="last", enable_version_counter=False)]
    train(tmp_path, Walk(120, SLOW), callbacks=callbacks, max_epochs=2)
    results = train(tmp_path, Walk(120), ckpt_path=tmp_path / "saved/last.ckpt", max_epochs=3)
    assert [samples(results, epoch) for epoch in range(3)] == [[], [], list(range(120))]
    results = train(tmp_path, Walk(120), ckpt_path=tmp_path / "saved/last.ckpt", max_epochs=-1, max_steps=200)
    assert samples(results, 2) == list(range(120))


@pytest.mark.long
def test_checkpoints_go_between_dealt_work_and_shares(tmp_path: Path) -> None:
    callbacks = [saver(tmp_path, 10), AtSaves()]
    train(tmp_path, Walk(120, SLOW), callbacks=callbacks, max_epochs=1)
    path = tmp_path / "saved/step=10.ckpt"
    results = train(tmp_path, Walk(120), downpour(dealt=False), ckpt_path=path, max_epochs=2)
    assert samples(results, 1) == list(range(120))
    train(tmp_path / "b", Walk(120), downpour(dealt=False), callbacks=[saver(tmp_path / "b", 10)], max_epochs=1)
    results = train(tmp_path, Walk(120), ckpt_path=tmp_path / "b/saved/step=10.ckpt", max_epochs=2)
    assert samples(results, 1) == list(range(120))


def test_what_is_resumed_with_less_than_a_batch_for_each_keeps_schedulers_alike(tmp_path: Path) -> None:
    class Scheduled(Walk):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def on_train_end(self) -> None:
            recorded(self)["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]

    class Last(Callback):
        """Saves when two batches are left."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 8 and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "near.ckpt")

    train(tmp_path, Scheduled(40), devices=2, callbacks=[Last(), AtSaves()], max_epochs=1, val_check_interval=1.0)
    results = train(tmp_path, Scheduled(40), devices=3, ckpt_path=tmp_path / "near.ckpt", max_epochs=3)
    assert 0 in batches(results, 0)
    assert [result["lr"] for result in results] == [pytest.approx(0.0125)] * 3
    for epoch in (1, 2):
        assert samples(results, epoch) == list(range(40))


# -- ranks that are lost ----------------------------------------------------------------------------------------------


class Written(Walk):
    """Writes what it has trained to a file at once: who is killed says nothing at the end."""

    def __init__(self, folder: Path, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder = folder

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with (self.folder / f"trained_{self.global_rank}").open("a") as file:
            file.write(f"{self.trainer.current_epoch} {' '.join(map(str, batch[2].tolist()))}\n")


def written(folder: Path, epoch: int, ranks: Any = range(4)) -> list[int]:
    found: list[int] = []
    for rank in ranks:
        for line in (folder / f"trained_{rank}").read_text().splitlines():
            number, *indices = map(int, line.split())
            found += indices if number == epoch else []
    return found


class Kill(Callback):
    def __init__(self, rank: int, epoch: int, batch: int) -> None:
        self.at = rank, epoch, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def members(name: str, **kwargs: Any) -> Any:
    make: Any = {
        "downpour": DownpourStrategy,
        "elastic": ElasticGossipStrategy,
        "push": lambda **options: GossipStrategy("push", period=3, **options),
        "local": lambda **options: LocalSGDStrategy(period=4, **options),
    }[name]
    options = {"min_replicas": 1, "lost_after": timedelta(seconds=20), "timeout": timedelta(seconds=60), "dealt": True}
    return make(start_method="fork", **options | kwargs)


@pytest.mark.one_in(2)
@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("downpour", 2),
        ("elastic", 0),
        *(pytest.param(name, 2, marks=pytest.mark.long) for name in ("elastic", "push", "local")),
        *(pytest.param(name, 0, marks=pytest.mark.long) for name in ("downpour", "push", "local")),
    ],
)
def test_a_lost_rank_loses_what_it_held_and_no_more(tmp_path: Path, name: str, victim: int) -> None:
    for rank in range(4):
        torch.save(None, tmp_path / f"rank_{rank}.pt")
    module = Written(tmp_path, 200, (0.01, 0.01, 0.01, 0.03))
    results = train(tmp_path, module, members(name), callbacks=[Kill(victim, 1, 6)], max_epochs=4)
    left = [result for result in results if result is not None]
    assert len(left) == 3
    alike(left)
    assert sorted(written(tmp_path, 0)) == list(range(200))
    second = written(tmp_path, 1)
    assert len(second) == len(set(second))
    assert 200 - 2 * 3 <= len(second) < 200, "the batch that it had begun, and two that it held"
    for epoch in (2, 3):
        assert sorted(written(tmp_path, epoch)) == list(range(200))


@pytest.mark.long
@pytest.mark.parametrize("name", ["elastic", "push", "local"])
def test_ranks_that_go_together_deal_on_request(tmp_path: Path, name: str) -> None:
    begin = time.monotonic()
    callbacks = [saver(tmp_path, 10)]
    strategy = members(name, min_replicas=None)
    results = train(tmp_path, Walk(240, SLOW), strategy, callbacks=callbacks, val_check_interval=0.5, max_epochs=2)
    assert time.monotonic() - begin < 30
    alike(results)
    for epoch in range(2):
        assert samples(results, epoch) == list(range(240))
    assert [epoch for epoch, _ in results[0]["validated"]] == [0, 0, 1, 1]
