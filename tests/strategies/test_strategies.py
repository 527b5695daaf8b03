"""The strategies in real `Trainer.fit` runs: what a user sees, step by step."""

# a Trainer gets its attributes at run time, and what is an attribute of a module torch declares Tensor | Module
# mypy: disable-error-code="attr-defined, union-attr, operator"

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import BatchSizeFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_gossip import ElasticGossipStrategy, GossipStrategy, WeightedPeers
from lightning_gossip.strategies import elastic_gossip


def elastic(**kwargs: Any) -> ElasticGossipStrategy:
    return ElasticGossipStrategy(start_method="fork", timeout=timedelta(seconds=30), **kwargs)


class Pairing:
    """Ranks of each pair choose each other; everybody else is idle."""

    def __init__(self, *pairs: tuple[int, int]) -> None:
        self.pairs = pairs

    def choices(self, step: int, world_size: int) -> Any:
        choices = np.full(world_size, -1)
        for a, b in self.pairs:
            choices[[a, b]] = b, a
        return choices


# -- exactness through Lightning ----------------------------------------------------------------------------------


class InOrder(pl.LightningDataModule):
    """Each rank reads every n-th row, in order."""

    def train_dataloader(self) -> Any:
        x, y = regression().tensors
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(TensorDataset(x[rank::ranks], y[rank::ranks]), 4)


def replayed(accumulate: int, clip: float | None, epochs: int) -> list[dict[str, Tensor]]:
    """Two replicas by hand, on strided shares of the data, AdamW, elastic gossip with α = 0.3."""
    pl.seed_everything(3, verbose=False)
    modules = [Linear(), Linear()]
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers = [module.configure_optimizers() for module in modules]
    x, y = regression().tensors
    shares = [(x[rank::2].split(4), y[rank::2].split(4)) for rank in range(2)]
    for _ in range(epochs):
        for first in range(0, 6, accumulate):
            snapshots = [[p.detach().clone() for p in module.parameters()] for module in modules]
            for module, optimizer, (xs, ys) in zip(modules, optimizers, shares, strict=True):
                optimizer.zero_grad()
                for batch in range(first, first + accumulate):
                    (module.training_step((xs[batch], ys[batch]), batch) / accumulate).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
            for own, other, module in ((0, 1, modules[0]), (1, 0, modules[1])):
                for p, s_i, s_k in zip(module.parameters(), snapshots[own], snapshots[other], strict=True):
                    p.data -= 0.3 * (s_i - s_k)
    return [module.state_dict() for module in modules]


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.5), (3, None)])
def test_a_fit_equals_its_replay(tmp_path: Path, accumulate: int, clip: float | None) -> None:
    pl.seed_everything(3, verbose=False)
    ranks = fit(
        tmp_path,
        Linear(),
        elastic(alpha=0.3, evaluate="replica"),
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        train=InOrder(),
        use_distributed_sampler=False,
    )
    for rank, expected in enumerate(replayed(accumulate, clip, 3)):
        assert ranks[rank]["step"] == 3 * 6 // accumulate
        for name, value in expected.items():
            torch.testing.assert_close(ranks[rank]["state"][name], value, rtol=0, atol=1e-12)


class Gan(pl.LightningModule):
    """Two optimizers under manual optimization, two steps a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(2, 3), nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0].float()
        generator, discriminator = self.optimizers()
        for optimizer, sign in ((generator, 1.0), (discriminator, -1.0)):
            self.toggle_optimizer(optimizer)
            fake = self.generator(torch.randn(len(real), 2))
            loss = sign * (self.discriminator(real).mean() - self.discriminator(fake).mean())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.generator, self.discriminator)]


def test_manual_optimization_ticks_once_a_batch_and_both_networks_travel(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Gan(), elastic(evaluate="replica"), max_epochs=2)
    assert [rank["step"] for rank in ranks] == [12, 12]
    for name in ("generator.weight", "discriminator.weight"):
        first, second = (rank["state"][name] for rank in ranks)
        assert not torch.equal(first, second), "replicas of their own"
        # the difference left is the last step's updates: replicas met one step before
        assert (first - second).abs().max() < 0.2


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["gossip_fork", "gossip_notebook", "elastic_gossip_fork", "elastic_gossip_notebook"])
def test_registered_names_that_fork_fit_and_test(tmp_path: Path, name: str) -> None:
    """The others need processes that import everything anew, see test_launch.py."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=4,
        strategy=name,
        max_epochs=40,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(1, verbose=False)
    module = Linear()
    trainer.fit(module, DataLoader(regression(), 4))
    [tested] = trainer.test(module, DataLoader(regression(), 4), verbose=False)
    assert tested["test_loss"] < 2, "of 14 at the start"


# -- no collective in a step; when an exchange is posted and applied ------------------------------------------------


class Observer(Recorder):
    """Counts calls of torch.distributed, where they are called, and looks at the exchange at every hook."""

    COLLECTIVES = (
        "all_reduce all_gather all_gather_object all_gather_into_tensor broadcast broadcast_object_list barrier"
        " reduce reduce_scatter gather gather_object scatter monitored_barrier send recv isend irecv"
    ).split()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.events: list[str] = []
        for name in self.COLLECTIVES:
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, self._counting(getattr(module, name), name))

    def _counting(self, function: Any, name: str) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.events.append(name)
            return function(*args, **kwargs)

        return counting

    def look(self, where: str, trainer: Any) -> None:
        exchange = trainer.strategy.exchange
        self.events.append(f"{where}:{'flying' if exchange is not None and exchange.in_flight else 'nothing'}")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["events"] = self.events
        super().on_fit_end(trainer, pl_module)


for _hook in (
    "on_train_start on_train_epoch_start on_train_batch_start on_before_optimizer_step on_train_batch_end"
    " on_train_epoch_end on_validation_start on_validation_batch_start on_validation_end on_train_end"
).split():

    def _observe(self: Observer, trainer: Any, *args: Any, _where: str = _hook) -> None:
        self.look(_where, trainer)

    setattr(Observer, _hook, _observe)


class Watched(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trainer.callbacks[-1].look("training_step", self.trainer)
        return super().training_step(batch, batch_idx)


def test_no_collective_in_a_step_and_nothing_in_flight_at_any_hook(tmp_path: Path) -> None:
    val = DataLoader(regression(), 24)
    ranks = fit(tmp_path, Watched(), elastic(), max_epochs=2, val=val, recorder=Observer(tmp_path), devices=3)
    flying = idle = 0
    for rank in ranks:
        events = rank["events"]
        training, collectives = False, set()
        for event in events:
            if event in Observer.COLLECTIVES:
                collectives.add(event)
                assert not training, f"{event} between steps"
            training = (training or event.startswith("on_train_batch_start")) and not event.startswith(
                ("on_validation", "on_train_epoch_end")
            )
            where, _, state = event.partition(":")
            if where.startswith("on_") and where != "on_before_optimizer_step":
                assert state == "nothing", event
        assert {"all_reduce", "broadcast"} <= collectives, "the counting sees the consensus"
        flying += events.count("training_step:flying")
        idle += events.count("training_step:nothing")
    assert (flying, idle) == (16, 8), "posted before training_step; of three ranks one is idle in each of 8 rounds"


class SlowRankZero(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 0:
            time.sleep(0.4)
        else:
            self.trainer.callbacks[-1].seen.setdefault("begun", []).append(time.time())
        loss = super().training_step(batch, batch_idx)
        self.trainer.callbacks[-1].seen.setdefault("ended", []).append(time.time())
        return loss


def test_a_slow_rank_0_does_not_hold_up_ranks_that_do_not_exchange_with_it(tmp_path: Path) -> None:
    ranks = fit(tmp_path, SlowRankZero(), elastic(peers=Pairing((1, 2))), max_epochs=1, devices=3)
    assert len(ranks[1]["ended"]) == len(ranks[0]["ended"]) == 4
    for rank in ranks[1:]:
        assert rank["ended"][-1] < ranks[0]["ended"][1], "done while rank 0 is at its second batch of four"


def test_delayed_exchanges_are_in_flight_between_steps(tmp_path: Path) -> None:
    strategy = elastic(period=4, delay=3)
    ranks = fit(tmp_path, Watched(), strategy, max_epochs=2, recorder=Observer(tmp_path))
    for rank in ranks:
        hooks = [e.partition(":")[2] == "flying" for e in rank["events"] if e.startswith("on_train_batch_end")]
        # 12 steps: posted at 4 and 8, applied at the end of 7 and 11; posted at 12, settled at the end
        assert hooks == [False] * 3 + [True] * 3 + [False] + [True] * 3 + [False] + [True]
    torch.testing.assert_close(ranks[0]["state"], ranks[1]["state"], rtol=0, atol=0)


# -- evaluation and the end of fit ---------------------------------------------------------------------------------


class Probe(Linear):
    """BatchNorm statistics, an integer buffer and a buffer with infinities; validation keeps what it ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("rank_made", torch.zeros(2))
        self.metric = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.rank_made.fill_(self.global_rank + 1)
        return nn.functional.mse_loss(self.layer(self.norm(x)).squeeze(1), y)

    def on_train_epoch_end(self) -> None:
        self._keep("replica")

    def on_validation_epoch_start(self) -> None:
        self._keep("validated")
        self.metric.reset()
        self.rows = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.rows += len(batch[0])
        self.metric.update(self.global_rank)

    def on_validation_epoch_end(self) -> None:
        seen = self.trainer.callbacks[-1].seen
        seen["rows"], seen["metric"] = self.rows, self.metric.compute().item()

    def _keep(self, name: str) -> None:
        state = {key: value.clone() for key, value in self.state_dict().items()}
        self.trainer.callbacks[-1].seen[name] = state


def train_probe(tmp_path: Path, evaluate: Any) -> list[dict[str, Any]]:
    val = DataLoader(regression(), 8)
    strategy = elastic(evaluate=evaluate, peers=Pairing((0, 1)))
    return fit(tmp_path, Probe(), strategy, devices=3, max_epochs=1, val=val, num_sanity_val_steps=0)


def test_consensus_is_validated_sharded_and_kept(tmp_path: Path) -> None:
    ranks = train_probe(tmp_path, "consensus")
    for rank in ranks:
        assert rank["rows"] == 16, "a third of the data"
        for window in ("validated", "state"):
            for name, value in rank[window].items():
                replicas = torch.stack([r["replica"][name] for r in ranks])
                if name == "mask":
                    assert value.tolist() == [0.0, float("-inf")]
                elif value.is_floating_point() and name != "rank_made":
                    torch.testing.assert_close(value, replicas.mean(0), rtol=1e-6, atol=1e-12, msg=name)
                else:
                    assert torch.equal(value, replicas[0]), "other buffers are rank 0's"
        assert rank["metric"] == 1.0, "torchmetrics pools the ranks"
    assert [r["replica"]["rank_made"][0].item() for r in ranks] == [1, 2, 3], "replicas are restored after validation"
    assert not torch.equal(ranks[0]["replica"]["layer.weight"], ranks[2]["replica"]["layer.weight"])
    assert not torch.equal(ranks[0]["replica"]["norm.running_mean"], ranks[1]["replica"]["norm.running_mean"])


def test_replicas_are_validated_whole_and_kept(tmp_path: Path) -> None:
    ranks = train_probe(tmp_path, "replica")
    for number, rank in enumerate(ranks):
        assert rank["rows"] == 48, "the whole data"
        assert rank["metric"] == number, "each rank its own"
        for name, value in rank["replica"].items():
            assert torch.equal(rank["validated"][name], value), name
            assert torch.equal(rank["state"][name], value), name


class Offset(Linear):
    """Every rank brings other weights."""

    def configure_model(self) -> None:
        with torch.no_grad():
            self.layer.bias.fill_(10.0 + self.global_rank)

    def on_train_start(self) -> None:
        self.trainer.callbacks[-1].seen["start"] = self.layer.bias.item()


def test_all_ranks_start_from_rank_zeros_parameters(tmp_path: Path) -> None:
    assert [rank["start"] for rank in fit(tmp_path, Offset(), elastic(), devices=3, max_epochs=1)] == [10.0] * 3


class Frozen(Linear):
    """A frozen layer, a tied one, and a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = self.layer
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def on_train_start(self) -> None:
        with torch.no_grad():  # replicas that differ before the first step
            self.unused.fill_(float(self.global_rank))
            self.frozen.weight.fill_(float(self.global_rank))

    def on_train_batch_end(self, *args: Any) -> None:
        stats = self.trainer.strategy.exchange.stats
        self.trainer.callbacks[-1].seen["bytes"] = stats.bytes_sent / stats.exchanges


def test_frozen_tied_and_unused_parameters(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Frozen(), elastic(evaluate="replica"), max_epochs=1)
    for number, rank in enumerate(ranks):
        assert rank["state"]["frozen.weight"].eq(number).all(), "does not travel"
        assert rank["state"]["unused"].eq(0.5).all(), "travels without a gradient"
        assert rank["bytes"] == 64, "tied ones travel once: 3 + 1 + 2 numbers of 8 bytes, to the end of the cache line"


class NothingToLearn(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.layer.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).requires_grad_()

    def configure_optimizers(self) -> None:
        return None


def test_a_model_without_trainable_parameters(tmp_path: Path) -> None:
    assert [rank["step"] for rank in fit(tmp_path, NothingToLearn(), elastic(), max_epochs=1)] == [6, 6]


def test_world_size_1_trains_and_exchanges_nothing(tmp_path: Path) -> None:
    [alone] = fit(tmp_path, Linear(), elastic(), devices=1, max_epochs=2, val=DataLoader(regression(), 8))
    assert alone["step"] == 24
    assert alone["metrics"]["val_loss"] < 14


# -- what bad input gets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "kwargs", "message"),
    [
        (GossipStrategy, {"variant": "poke"}, r"`variant` must be one of 'pull', 'push'; got 'poke'"),
        (ElasticGossipStrategy, {"alpha": 0}, r"`alpha` must be a number in \(0, 1\], got 0"),
        (ElasticGossipStrategy, {"alpha": 1.1}, "`alpha`"),
        (ElasticGossipStrategy, {"alpha": "0.5"}, "`alpha`"),
        (ElasticGossipStrategy, {"probability": 2}, "`probability`"),
        (GossipStrategy, {"period": -1}, "`period`"),
        (GossipStrategy, {"peers": "all"}, "`peers`"),
        (GossipStrategy, {"delay": 1}, "`delay` must be an integer from 0 to 0 .*got 1"),
        (GossipStrategy, {"period": 8, "delay": 8}, "`delay`"),
        (GossipStrategy, {"wire_dtype": torch.int8}, "`wire_dtype`"),
        (GossipStrategy, {"wire_dtype": "int4"}, "`wire_dtype`"),
        (GossipStrategy, {"evaluate": "mean"}, "`evaluate` must be one of 'consensus', 'replica'; got 'mean'"),
        (GossipStrategy, {"seed": 1.5}, "`seed`"),
        (GossipStrategy, {"timeout": 30}, "`timeout` must be a positive datetime.timedelta, got 30"),
        (GossipStrategy, {"timeout": timedelta(0)}, "`timeout`"),
        (GossipStrategy, {"start_method": "thread"}, "`start_method`"),
        (GossipStrategy, {"process_group_backend": "mpi"}, "`process_group_backend`"),
    ],
)
def test_arguments_are_checked_at_construction(strategy: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**kwargs)


def test_a_typo_is_an_error() -> None:
    with pytest.raises(TypeError, match="aplha"):
        ElasticGossipStrategy(aplha=0.5)  # type: ignore[call-arg]


def test_hyperparameters_hold_every_argument() -> None:
    strategy = GossipStrategy(peers=WeightedPeers(2.0), wire_dtype="bfloat16", period=2)
    assert strategy.wire_dtype is torch.bfloat16
    assert strategy.hyperparameters == {
        "variant": "pull",
        "probability": 1.0,
        "period": 2,
        "peers": "WeightedPeers(penalty=2.0)",
        "delay": 0,
        "wire_dtype": "bfloat16",
        "seed": 0,
        "evaluate": "consensus",
        "timeout": 300.0,
        "shared_memory": True,
        "asynchronous": False,
        "min_replicas": None,
        "restarts": 0,
        "lost_after": 30.0,
        "nonfinite": "error",
        "dealt": None,
        "epoch_ends": "all",
        "process_group_backend": None,
        "start_method": "popen",
    }


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sync_batchnorm": True}, "sync_batchnorm=True"),
        ({"val_check_interval": "00:00:01:00"}, "time-based `val_check_interval`"),
        ({"callbacks": [BatchSizeFinder()]}, "Batch size finder is not supported with distributed"),
    ],
)
def test_what_replicas_can_not_have_is_refused(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    val = DataLoader(regression(), 8)
    with pytest.raises(Exception, match=f"(?s)MisconfigurationException: .*{message}"):
        fit(tmp_path, Linear(), elastic(), max_epochs=1, val=val, **kwargs)


def test_exponential_needs_a_power_of_two(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="power of two, got 3 ranks"):
        fit(tmp_path, Linear(), elastic(peers="exponential"), devices=3, max_epochs=1)


@pytest.mark.parametrize(("alpha", "warns"), [(0.9, True), (0.5, False)])
def test_an_unstable_alpha_is_warned_of(tmp_path: Path, alpha: float, warns: bool, monkeypatch: Any) -> None:
    warned = tmp_path / "warned"
    monkeypatch.setattr(elastic_gossip, "rank_zero_warn", warned.write_text)
    fit(tmp_path, Linear(), elastic(alpha=alpha, peers="uniform"), devices=4, max_epochs=1, limit_train_batches=1)
    assert warned.exists() == warns
    assert not warns or "alpha=0.9 exceeds 0.68, the stability limit" in warned.read_text()


class Star:
    """Everybody chooses rank 0, in ten rounds."""

    def __init__(self) -> None:
        self.asked = 0

    def choices(self, step: int, world_size: int) -> list[int]:
        self.asked += 1
        return [[1, *[0] * (world_size - 1)] for _ in range(10)][step - 1]


@pytest.mark.parametrize(("alpha", "asked", "warns"), [(0.5, 11, True), (0.35, 11, False), (0.25, 0, False)])
def test_peers_of_ones_own_are_asked_ahead_only_where_it_matters(
    alpha: float, asked: int, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(elastic_gossip, "rank_zero_warn", warned.append)
    monkeypatch.setattr(ElasticGossipStrategy, "world_size", 8)
    star: Any = Star()
    ElasticGossipStrategy(alpha=alpha, peers=star)._warn_if_unstable()
    assert star.asked == asked
    assert len(warned) == warns
    if warns:
        assert warned[0].startswith("alpha=0.5 exceeds 0.40, the stability limit of this schedule among 8 ranks")
        assert warned[0].endswith("Take an alpha below it.")


class Different(Linear):
    """Rank 1 has another shape, dtype or name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def configure_model(self) -> None:
        if self.global_rank == 1:
            if self.how == "shape":
                self.layer = nn.Linear(3, 2, dtype=torch.float64)
            elif self.how == "dtype":
                self.layer = nn.Linear(3, 1)
            else:
                self.extra = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"parameter 'layer.weight' is shape \(1, 3\).*on rank 0 but shape \(2, 3\).*on rank 1"),
        ("dtype", "'layer.weight' is .*float64.* on rank 0 but .*float32.* on rank 1"),
        ("name", "parameter 'extra.weight' is missing on rank 0 but shape .* on rank 1"),
    ],
)
def test_models_that_differ_are_told_at_start_up(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(Exception, match=f"(?s)the ranks have different models: .*{message}"):
        fit(tmp_path, Different(how), elastic(), devices=3, max_epochs=1)


def test_adopt_consensus_out_of_reach_says_so(tmp_path: Path) -> None:
    strategy = elastic(evaluate="replica")
    fit(tmp_path, Linear(), strategy, max_epochs=1)
    with pytest.raises(RuntimeError, match="their processes end with `fit`"):
        strategy.adopt_consensus()


def test_data_of_unequal_length_is_no_hang(tmp_path: Path) -> None:
    """Ranks that validate at different steps are told, until unequal batch counts are supported."""
    data = TensorDataset(*(t[:4] for t in regression().tensors))
    assert len(fit(tmp_path, Linear(), elastic(), train=DataLoader(data, 4), max_epochs=1)) == 2


class Counts(Linear):
    """Keeps a number of its own in a buffer, which it changes in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("validations", torch.zeros(()))
        self.register_buffer("nowhere", torch.full((2,), float("nan")))
        self.register_buffer("own", torch.zeros(1))

    def on_train_epoch_start(self) -> None:
        self.own.fill_(self.global_rank)

    def on_validation_epoch_end(self) -> None:
        self.validations += 1  # type: ignore[assignment]

    def on_train_epoch_end(self) -> None:
        self.trainer.callbacks[-1].seen["own"] = self.own.item()


def test_buffers_that_validation_changes_stay_changed(tmp_path: Path) -> None:
    val = DataLoader(regression(), 8)
    for world_size in (1, 3):
        ranks = fit(
            tmp_path, Counts(), elastic(), devices=world_size, max_epochs=3, val=val, num_sanity_val_steps=0
        )  # fmt: skip
        assert [rank["state"]["validations"].item() for rank in ranks] == [3.0] * world_size
        assert [rank["own"] for rank in ranks] == list(range(world_size)), "and those that it leaves alone come back"
