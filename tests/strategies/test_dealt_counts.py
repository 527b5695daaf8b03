"""What ranks at paces of their own decide by their counts, and epochs that end with the first (design §11)."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from dealt import SLOW, TIMEOUT, Numbered, Rows, Walk, alike, batches, downpour, samples, train
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gossip import ElasticGossipStrategy
from lightning_gossip.strategies.counting import who_waited


@pytest.mark.one_in(3)
@pytest.mark.parametrize("interval", [0.25, 0.34, 1.0])
def test_validations_by_parts_of_an_epoch(tmp_path: Path, interval: float) -> None:
    results = train(tmp_path, Walk(400, SLOW), val_check_interval=interval, max_epochs=2)
    alike(results)
    for epoch in range(2):
        assert samples(results, epoch) == list(range(400))
        seen = [step for number, step in results[0]["validated"] if number == epoch]
        assert len(seen) == {0.25: 4, 0.34: 3, 1.0: 1}[interval]


@pytest.mark.long
def test_validations_and_checkpoints_by_the_count_of_the_first(tmp_path: Path) -> None:
    callbacks = [
        ModelCheckpoint(tmp_path / "a", filename="{step}", every_n_train_steps=20, save_top_k=-1),
        ModelCheckpoint(tmp_path / "b", filename="{step}", every_n_train_steps=30, save_top_k=-1),
    ]
    begin = time.monotonic()
    results = train(tmp_path, Walk(400, SLOW), callbacks=callbacks, val_check_interval=20, max_epochs=1)
    assert time.monotonic() - begin < 15
    alike(results)
    assert samples(results, 0) == list(range(400))
    assert results[0]["validated"] == [(0, 20), (0, 40), *([(0, 60)] if results[0]["global_step"] >= 60 else [])]
    assert sorted(set(results[0]["saved"])) == [20, 30, 40, *([60] if results[0]["global_step"] >= 60 else [])]
    assert {path.name for path in (tmp_path / "a").glob("*.ckpt")} >= {"step=20.ckpt", "step=40.ckpt"}
    assert {path.name for path in (tmp_path / "b").glob("*.ckpt")} >= {"step=30.ckpt"}


@pytest.mark.long
def test_validations_by_batches_across_epochs(tmp_path: Path) -> None:
    results = train(tmp_path, Walk(160, SLOW), val_check_interval=15, check_val_every_n_epoch=None, max_epochs=2)
    alike(results)
    assert len(results[0]["validated"]) >= 2
    assert all(step % 15 == 0 for _, step in results[0]["validated"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dealt", [None, False])
def test_the_first_to_make_the_steps_ends_training_for_all(tmp_path: Path, dealt: bool | None) -> None:
    begin = time.monotonic()
    results = train(
        tmp_path, Walk(800, (0.2, 0.02, 0.02)), downpour(dealt=dealt), devices=3, max_steps=40, max_epochs=-1
    )
    assert time.monotonic() - begin < 10, "8 s for the slow one alone"
    alike(results)
    assert results[0]["global_step"] == 40
    counts = batches(results, 0)
    assert 40 in counts[1:]
    assert counts[0] < 20


def test_accumulation_windows(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "a", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    results = train(
        tmp_path, Walk(200, SLOW), callbacks=[checkpoint], accumulate_grad_batches=3, val_check_interval=10,
        max_epochs=2,
    )  # fmt: skip
    alike(results)
    for epoch in range(2):
        assert samples(results, epoch) == list(range(200))


def test_one_rank_that_stops_stops_all(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop |= trainer.global_rank == 1 and trainer.global_step == 10

    results = train(tmp_path, Walk(2000), callbacks=[Stop()], max_epochs=5)
    alike(results)
    assert results[0]["epoch"] == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("rows", [96, 90], ids=["even", "uneven"])
def test_a_collective_in_every_step_gives_all_as_many_batches(tmp_path: Path, rows: int) -> None:
    class Pooled(Walk):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=True)
            return loss

    results = train(tmp_path, Pooled(rows), val_check_interval=0.25, max_epochs=2)
    alike(results)
    assert len(results[0]["validated"]) >= 8
    for epoch in range(2):
        assert batches(results, epoch) == [rows // 8] * 4
        seen = samples(results, epoch)
        assert len(seen) == len(set(seen)) == rows // 8 * 8


# -- fixed shares -----------------------------------------------------------------------------------------------------


def test_an_epoch_that_ends_with_the_first(tmp_path: Path) -> None:
    results = train(tmp_path, Walk(320, SLOW), downpour(dealt=False, epoch_ends="first"), max_epochs=2)
    alike(results)
    for epoch in range(2):
        counts = batches(results, epoch)
        assert max(counts) == 40
        assert counts[0] < 30
        ends = [result["ends"][epoch] for result in results]
        assert max(ends) - min(ends) < 0.5
        assert all(result["lasts"][epoch] for result in results)
    assert [epoch for epoch, _ in results[0]["validated"]] == [0, 1]


@pytest.mark.long
def test_ranks_that_go_together_end_with_the_first(tmp_path: Path) -> None:
    strategy = ElasticGossipStrategy(period=8, epoch_ends="first", start_method="fork", timeout=TIMEOUT)

    class Uneven(Walk):
        def train_dataloader(self) -> Any:
            return DataLoader(Numbered(60 if self.trainer.global_rank == 1 else 400), 2)

    results = train(
        tmp_path, Uneven(pauses=(0.02,) * 3), strategy, devices=3, use_distributed_sampler=False, max_epochs=2
    )
    alike(results, "step")
    for epoch in range(2):
        counts = batches(results, epoch)
        assert counts[1] == 30
        assert max(counts) < 60


@pytest.mark.long
def test_iterable_data_that_ends_with_the_first(tmp_path: Path) -> None:
    class Long(Walk):
        def train_dataloader(self) -> Any:
            return DataLoader(Rows(100), 2)

    results = train(tmp_path, Long(pauses=SLOW), downpour(epoch_ends="first"), max_epochs=2)
    for epoch in range(2):
        counts = batches(results, epoch)
        assert max(counts) == 50
        assert counts[0] < 40
        assert all(result["lasts"][epoch] for result in results)


def test_a_line_says_who_waited_for_whom(tmp_path: Path) -> None:
    class Lines(logging.Handler):
        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.folder = folder

        def emit(self, record: logging.LogRecord) -> None:
            with (self.folder / "lines").open("a") as file:
                file.write(record.getMessage() + "\n")

    handler = Lines(tmp_path)
    logging.getLogger("lightning_gossip").addHandler(handler)
    try:
        train(tmp_path, Walk(160, SLOW), downpour(dealt=False), max_epochs=2)
    finally:
        logging.getLogger("lightning_gossip").removeHandler(handler)
    lines = [line for line in (tmp_path / "lines").read_text().splitlines() if "waited" in line]
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1"], "one an epoch, of one rank"
    assert all("ranks 1, 2, 3 waited up to" in line and "for rank 0" in line for line in lines)
    assert all("`dealt=True`" in line and "`epoch_ends='first'`" in line for line in lines)


def test_who_waited() -> None:
    assert who_waited({0: 0.0, 1: 1.0, 2: 0.9}, 11.0) is None
    assert who_waited({0: 0.3, 1: 0.35, 2: 0.3}, 2.5) is None, "that is what the meeting took"
    line = who_waited({0: 0.0, 1: 40.0, 2: 39.0, 3: 5.0}, 60.0)
    assert line is not None
    assert line.startswith("ranks 1, 2 waited up to 40.0 s for rank 0, 67% of the epoch")
    assert who_waited({0: 2.0, 1: 42.0, 2: 41.0, 3: 7.0}, 60.0) == line
