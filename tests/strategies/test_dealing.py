"""Work dealt on demand under Lightning: every sample once an epoch, and epochs that end together (design §11)."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from dealt import SLOW, Numbered, Plain, Rows, Walk, batches, downpour, samples, train
from forked import recorded
from lightning.pytorch.callbacks import LearningRateFinder
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy, GossipStrategy, LocalSGDStrategy

# -- epochs -----------------------------------------------------------------------------------------------------------


def test_every_sample_once_an_epoch_whatever_the_ranks_speeds(tmp_path: Path) -> None:
    results = train(tmp_path, Walk(400, SLOW), max_epochs=3)
    orders = set()
    for epoch in range(3):
        assert samples(results, epoch) == list(range(400))
        counts = batches(results, epoch)
        assert counts[0] < 35 < min(counts[1:]), "20, where all had 50 with fixed shares"
        ends = [result["ends"][epoch] for result in results]
        assert max(ends) - min(ends) < 0.06 * 2 + 0.15, "two batches of the slow one, and a busy machine"
        assert all(result["lasts"][epoch] for result in results), "each knew its last batch as such"
        orders.add(tuple(results[1]["epochs"][epoch][0]))
    assert len(orders) == 3, "shuffled anew"
    assert all(result["first"] == 50 for result in results), "the fair share"
    assert [epoch for epoch, _ in results[0]["validated"]] == [0, 1, 2]
    assert len({tuple(result["validated"]) for result in results}) == 1


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "loader",
    [
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True, "in_order": False},
        {"shuffle": False},  # Lightning shuffles all the same where it places the sampler
        {"drop_last": True, "batch_size": 5},
        {"batch_size": 5},
        {"batch_size": None},
    ],
    ids=str,
)
def test_loaders_as_users_have_them(tmp_path: Path, loader: dict[str, Any]) -> None:
    results = train(tmp_path, Walk(102, (0.02, 0.005, 0.005), **loader), devices=3, max_epochs=3)
    whole = 100 if loader.get("drop_last") else 102
    for epoch in range(3):
        seen = samples(results, epoch)
        assert len(seen) == len(set(seen)) == whole
        assert all(result["lasts"][epoch] for result in results)


class Buckets(BatchSampler):
    """Batches of two sizes in an order of its own, by torch's global generator."""

    def __iter__(self) -> Any:
        order = list(self.sampler)
        cuts = [order[:9], order[9:12], *(order[k : k + self.batch_size] for k in range(12, len(order), 3))]
        return (cuts[k] for k in torch.randperm(len(cuts)).tolist())


def test_a_batch_sampler_of_the_users(tmp_path: Path) -> None:
    class Bucketed(Walk):
        def train_dataloader(self) -> Any:
            torch.manual_seed(self.trainer.global_rank)
            data = Numbered(60)
            return DataLoader(data, batch_sampler=Buckets(RandomSampler(data), 3, False))

    results = train(tmp_path, Bucketed(), devices=3, max_epochs=2)
    for epoch in range(2):
        assert samples(results, epoch) == list(range(60))
        assert Counter(len(batch) for result in results for batch in result["epochs"][epoch]) == {9: 1, 3: 17}


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("limit", "expected"), [(5, 15), (0.5, 24), (1.0, 48), (100, 48), (1, 3)], ids=lambda value: str(value)
)
def test_limits_are_of_a_fair_share(tmp_path: Path, limit: Any, expected: int) -> None:
    results = train(tmp_path, Walk(96), devices=3, limit_train_batches=limit, max_epochs=2)
    for epoch in range(2):
        seen = samples(results, epoch)
        assert len(seen) == len(set(seen)) == 2 * expected
    assert results[0]["first"] == expected / 3


def test_seeds_that_differ_from_rank_to_rank(tmp_path: Path) -> None:
    class Seeded(Walk):
        def setup(self, stage: str) -> None:
            pl.seed_everything(self.trainer.global_rank, verbose=False)

    results = train(tmp_path, Seeded(60), devices=2, max_epochs=2)
    for epoch in range(2):
        assert samples(results, epoch) == list(range(60))


def test_data_that_differ_from_rank_to_rank_are_told(tmp_path: Path) -> None:
    class Different(Walk):
        def train_dataloader(self) -> Any:
            return DataLoader(Numbered(60 + self.trainer.global_rank), 2)

    with pytest.raises(Exception, match=r"have to be the same on all ranks. Set `dealt=False`"):
        train(tmp_path, Different(), devices=2, max_epochs=1)


class Fetchers(pl.Callback):
    """Counts those of Lightning's fetchers that are left, with all that they fetch from; no collector helps."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Any]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.disable()
        self.seen.append(weakref.ref(trainer.fit_loop._data_fetcher))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        recorded(pl_module)["fetchers"] = len({id(ref()) for ref in self.seen if ref() is not None})
        self.seen.clear()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dealt", [True, False])
def test_a_loader_that_is_made_anew_goes_with_what_was_dealt(tmp_path: Path, dealt: bool) -> None:
    options: dict[str, Any] = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1, "callbacks": [Fetchers()]}
    results = train(tmp_path, Walk(48), ElasticGossipStrategy(start_method="fork", dealt=dealt), **options)
    assert [result["fetchers"] for result in results] == [1] * len(results)


def test_who_looks_at_the_loader_in_mid_training_takes_nothing(tmp_path: Path) -> None:
    class Curious(Walk):
        def on_train_batch_end(self, *args: Any) -> None:
            loader: Any = self.trainer.train_dataloader
            assert len(list(loader)) == 12

    results = train(tmp_path, Curious(48), devices=2, max_epochs=2)
    for epoch in range(2):
        assert samples(results, epoch) == list(range(48))


def test_a_loader_iterator_in_the_training_step(tmp_path: Path) -> None:
    class Iterating(Walk):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, index, _ = next(dataloader_iter)
            return super().training_step(batch, index)

    results = train(tmp_path, Iterating(48), devices=2, max_epochs=2)
    for epoch in range(2):
        assert samples(results, epoch) == list(range(48))


@pytest.mark.long
def test_estimates_go_by_the_fair_share(tmp_path: Path) -> None:
    class Scheduled(Walk):
        def configure_optimizers(self) -> Any:
            recorded(self)["estimated"] = self.trainer.estimated_stepping_batches
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "epoch"}]

        def on_train_end(self) -> None:
            recorded(self)["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]

    results = train(tmp_path, Scheduled(96, SLOW), max_epochs=3, accumulate_grad_batches=2)
    assert all(result["estimated"] == 18 for result in results)
    assert all(result["lr"] == pytest.approx(0.0125) for result in results), "once an epoch"
    for epoch in range(3):
        assert samples(results, epoch) == list(range(96))


def test_loaders_made_anew_and_a_second_fit(tmp_path: Path) -> None:
    results = train(tmp_path, Walk(60), devices=2, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    for epoch in range(3):
        assert samples(results, epoch) == list(range(60))


def test_the_learning_rate_finder_takes_nothing_from_the_first_epoch(tmp_path: Path) -> None:
    class Tunable(Walk):
        def __init__(self) -> None:
            super().__init__(120)
            self.lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def on_train_epoch_start(self) -> None:
            recorded(self).pop("epochs", None) if self.trainer.current_epoch == 0 else None

    finder = LearningRateFinder(num_training_steps=12, early_stop_threshold=None)
    results = train(tmp_path, Tunable(), devices=2, callbacks=[finder], max_epochs=2)
    for epoch in range(2):
        assert samples(results, epoch) == list(range(120))


def test_a_warm_up_alone_takes_from_the_others_shares(tmp_path: Path) -> None:
    results = train(tmp_path, Walk(240, (0.01,) * 3), downpour(warmup_steps=15), devices=3, max_epochs=2)
    assert batches(results, 0)[0] >= 15
    for epoch in range(2):
        assert samples(results, epoch) == list(range(240))


def test_fast_dev_run(tmp_path: Path) -> None:
    results = train(tmp_path, Walk(60), devices=2, fast_dev_run=2)
    assert max(batches(results, 0)) == 2, "the first that has made two steps ends it"


# -- what cannot be dealt ---------------------------------------------------------------------------------------------


OWN = {
    "iterable": (lambda: DataLoader(Rows(), 2), "Rows is iterable"),
    "sampler": (
        lambda: DataLoader(Numbered(24), 2, sampler=torch.utils.data.WeightedRandomSampler([1.0] * 24, 24)),
        "a sampler of its own, a DistributedSamplerWrapper",
    ),
    "distributed": (
        lambda: DataLoader(Numbered(24), 2, sampler=torch.utils.data.DistributedSampler(Numbered(24), 2, 0)),
        "a sampler of its own, a DistributedSampler",
    ),
    "two": (lambda: [DataLoader(Numbered(24), 2), DataLoader(Numbered(24), 2)], "2 loaders at once"),
    "few": (lambda: DataLoader(Numbered(2), 2), "1 batches for 2 ranks"),
    "plain": (Plain, "a Plain is no torch DataLoader"),
}


class Own(Walk):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def train_dataloader(self) -> Any:
        return OWN[self.name][0]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0] if isinstance(batch, list) and len(batch) == 2 else batch, batch_idx)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", OWN)
def test_others_keep_their_shares(tmp_path: Path, name: str) -> None:
    results = train(tmp_path, Own(name), devices=2, max_epochs=2)
    counts = batches(results, 1)
    assert counts == {"iterable": [12, 12], "few": [1, 1], "plain": [8, 8]}.get(name, [6, 6])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", OWN)
def test_others_asked_for_are_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(Exception, match=f"`dealt=True` deals .* but .*{OWN[name][1]}"):
        train(tmp_path, Own(name), downpour(dealt=True), devices=2, max_epochs=1)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"use_distributed_sampler": False}, "use_distributed_sampler=False"),
        ({"max_time": timedelta(hours=1)}, "max_time"),
    ],
    ids=str,
)
def test_trainers_under_which_nothing_can_be_dealt(tmp_path: Path, kwargs: dict[str, Any], said: str) -> None:
    results = train(tmp_path, Walk(24), devices=2, max_epochs=1, **kwargs)
    assert batches(results, 0) == ([12, 12] if "use" in said else [6, 6])
    with pytest.raises(Exception, match=f"`dealt=True` deals .*{said}"):
        train(tmp_path, Walk(24), downpour(dealt=True), devices=2, max_epochs=1, **kwargs)


@pytest.mark.parametrize("strategy", [DownpourStrategy, ElasticGossipStrategy, GossipStrategy, LocalSGDStrategy])
def test_bad_arguments(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"`dealt` must be .*True.*'yes'"):
        strategy(dealt="yes")
    with pytest.raises(ValueError, match=r"`epoch_ends` must be .*'all'.*'first'.*'last'"):
        strategy(epoch_ends="last")
    with pytest.raises(ValueError, match=r"`epoch_ends='first'` is for fixed shares.*`dealt=True`"):
        strategy(dealt=True, epoch_ends="first")
    values = strategy(dealt=False, epoch_ends="first").hyperparameters
    assert (values["dealt"], values["epoch_ends"]) == (False, "first")
    assert (strategy().hyperparameters["dealt"], strategy().hyperparameters["epoch_ends"]) == (None, "all")


def test_one_rank_has_nothing_to_deal(tmp_path: Path) -> None:
    results = train(tmp_path, Walk(24), downpour(dealt=True), devices=1, max_epochs=2)
    assert batches(results, 1) == [12]
