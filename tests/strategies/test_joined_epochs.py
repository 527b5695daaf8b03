"""The data of ranks that come back in the middle of an epoch whose shares are of their own making (design §10, §11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, recorded, regression
from lightning.pytorch.callbacks import Callback
from test_joining import OnceOnly, Pace
from test_surviving import run, surviving
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset
from waiting import until

from lightning_gossip import LocalSGDStrategy
from lightning_gossip.strategies.counting import LAST_BATCHES
from lightning_gossip.strategies.joined_epoch import RestOfEpoch, Stand, TrainingData, place_among

BATCHES = [[0, 1], [2, 3], [4, 5]]


def test_the_rest_of_an_epoch_begins_where_the_donor_stands_and_begins_again_where_it_does_not_last() -> None:
    rest = RestOfEpoch(BATCHES, taken=1, length=5)
    assert len(rest) == 5
    assert list(rest) == [[2, 3], [4, 5], [0, 1], [2, 3]]
    assert list(RestOfEpoch(BATCHES, 2, 3)) == [[4, 5]]
    assert list(RestOfEpoch(BATCHES, 4, 2)) == [[0, 1], [2, 3]], "of several loaders, a shorter one began again"
    assert list(RestOfEpoch([], 0, 3)) == []


def test_a_loader_is_given_back_as_it_was() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6)), 2)
    own = loader.batch_sampler
    data = TrainingData()
    taken: Any = data.take(loader, Stand(1, (4,)))
    assert taken is loader
    assert len(loader) == 4
    assert [x.tolist() for (x,) in loader] == [[2, 3], [4, 5], [0, 1]]
    assert data.lengths() == (4,)
    data.begin_loading()
    assert loader.batch_sampler is own
    assert data.lengths() == ()


class Stream(IterableDataset[int]):
    """So many numbers, and says so."""

    def __iter__(self) -> Any:
        return iter(range(6))

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(torch.arange(6)), batch_size=None, collate_fn=lambda x: x[0]),
        DataLoader(Stream(), batch_size=None),
        range(6),
    ],
    ids=["samples", "stream", "no DataLoader"],
)
def test_loaders_of_every_kind_are_as_long_as_the_donors(loader: Any) -> None:
    taken = TrainingData().take(loader, Stand(2, (8,)))
    assert len(taken) == 8
    assert [int(x) for x in taken] == [2, 3, 4, 5, 0, 1]


def test_what_has_no_length_is_left_alone() -> None:
    loader: Any = iter(range(3))
    data = TrainingData()
    assert data.take(loader, Stand(1, (4,))) is loader
    other = DataLoader(TensorDataset(torch.arange(6)))
    assert data.take(other, Stand(1, (4, None))) is other
    assert len(other) == 6
    assert data.lengths() == (None, 6)


def test_who_was_not_dealt_in_stands_in_the_place_of_another() -> None:
    assert place_among(2, [0, 1, 2]) == (0, 1, 2)
    assert place_among(3, [0, 1, 2]) == (3, 1, 2)
    assert place_among(0, [1, 3, 2]) == (0, 3, 2)


class Shares(Sampler[int]):
    """Every so-many-th row, by who takes part: shares of unequal lengths."""

    def __init__(self, trainer: pl.Trainer, rows: int) -> None:
        strategy: Any = trainer.strategy
        self.members: tuple[int, ...] = strategy.members
        self.rows = list(range(self.members.index(strategy.global_rank), rows, len(self.members)))

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class OwnShares(pl.LightningDataModule):
    """Data whose sampler is the user's; a sample's last part is its number."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        x, y = regression(self.rows).tensors
        data = TensorDataset(x, y, torch.arange(self.rows))
        return DataLoader(data, 4, sampler=Shares(self.trainer, self.rows))

    def val_dataloader(self) -> Any:
        return DataLoader(regression(), 4)


class Rows(Linear):
    """Records what it is trained on."""

    def on_train_start(self) -> None:
        recorded(self)["trained"] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, rows = batch
        recorded(self)["trained"].append((self.trainer.current_epoch, rows.tolist()))
        return super().training_step((x, y), batch_idx)


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize("epoch_ends", ["all", pytest.param("first", marks=pytest.mark.long)])
@pytest.mark.parametrize("rows", [240, 193], ids=["equal with three and with four", "unequal"])
def test_a_joiner_goes_as_far_as_its_donor(tmp_path: Path, rows: int, epoch_ends: Any) -> None:
    seen = run(
        tmp_path,
        Pace(),
        OnceOnly(2, hook="on_train_batch_end", batch=2),
        lost=(),
        strategy=surviving(restarts=1, epoch_ends=epoch_ends),
        module=Rows(),
        train=OwnShares(rows),
        val=None,
        use_distributed_sampler=False,
        max_epochs=6,
    )
    for other in seen:
        torch.testing.assert_close(other["state"], seen[0]["state"], rtol=0, atol=0)
        assert set(other["members"][-1]) == {0, 1, 2, 3}
        assert other["step"] == seen[0]["step"]
        assert other["losses"][-1] == seen[0]["losses"][-1]
    changes = [change.split(" at ")[0] for change in seen[0]["changes"]]
    assert changes == ["rank 2 lost", "rank 2 joining", "rank 2 joined"]
    epoch = seen[2]["trained"][0][0]
    ours = [rows for at, rows in seen[2]["trained"] if at == epoch]
    donors = [rows for at, rows in seen[0]["trained"] if at == epoch]
    assert 0 < len(ours) <= len(donors)
    share = list(range(2, rows, 4 if epoch == 1 else 3))
    batches = [share[k : k + 4] for k in range(0, len(share), 4)]
    begin = batches.index(ours[0]) if epoch_ends == "first" else len(donors) - len(ours)
    assert ours == [*batches, *batches][begin : begin + len(ours)]


class ComesLast(Callback):
    """Holds one that joins back, with its donor's state loaded, until the others have trained all of the epoch."""

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        control: Any = trainer.strategy.control  # type: ignore[attr-defined]
        if control.incarnation:
            arrivals = f"await/{LAST_BATCHES}/{control._waits[LAST_BATCHES] + 1}"
            until(lambda: control._store.check([f"{arrivals}/{rank}.0" for rank in (0, 1, 3)]), seconds=60)


@pytest.mark.faults
@pytest.mark.parametrize(
    "strategy",
    [
        lambda: surviving(restarts=1, asynchronous=True),
        pytest.param(lambda: surviving(restarts=1, dealt=True), marks=pytest.mark.long),
        pytest.param(
            lambda: LocalSGDStrategy(period=64, dealt=True, min_replicas=1, restarts=1, start_method="fork"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["asynchronous", "by step", "rounds"],
)
def test_a_joiner_for_which_nothing_of_the_epoch_is_left_goes_on_with_the_next(tmp_path: Path, strategy: Any) -> None:
    seen = run(
        tmp_path,
        Pace(0.2),
        OnceOnly(2, hook="on_train_batch_end", batch=1),
        ComesLast(),
        lost=(),
        strategy=strategy(),
        module=Rows(),
        train=DataLoader(TensorDataset(*regression(240).tensors, torch.arange(240)), 4),
        max_epochs=4,
    )
    for other in seen:
        torch.testing.assert_close(other["state"], seen[0]["state"], rtol=0, atol=0)
        assert set(other["members"][-1]) == {0, 1, 2, 3}
        assert (other["steps"][-1], other["losses"][-1]) == (seen[0]["steps"][-1], seen[0]["losses"][-1])
    changes = [change.split(" at ")[0] for change in seen[0]["changes"]]
    assert changes == ["rank 2 lost", "rank 2 joining", "rank 2 joined"]
    assert {epoch for epoch, _ in seen[2]["trained"]} == {2, 3}
    for epoch in (2, 3):
        trained = [row for rank in seen for at, rows in rank["trained"] if at == epoch for row in rows]
        assert sorted(trained) == list(range(240))
