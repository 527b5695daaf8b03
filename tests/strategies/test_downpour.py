"""Downpour SGD in real `Trainer.fit` runs with real shards: nothing is lost or doubled, and nothing is left behind."""

from __future__ import annotations

import subprocess
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from test_strategies import Gan
from torch import Tensor, nn
from torch.utils.data import DataLoader
from waiting import until

from lightning_gossip import DownpourStrategy, GossipMonitor
from lightning_gossip.parameter_server import process
from lightning_gossip.parameter_server.process import ShardProcess
from lightning_gossip.strategies import checkpoint as files
from lightning_gossip.strategies import shards

LR = 0.01
State = dict[str, Tensor]


def downpour(**kwargs: Any) -> DownpourStrategy:
    """Workers with even shares; what is dealt on demand is tested in `test_dealing.py`."""
    return DownpourStrategy(start_method="fork", timeout=timedelta(seconds=20), dealt=False, **kwargs)


class Constant(Linear):
    """The gradient is the same wherever the parameters are, so that what the server must hold can be added up."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def initial(module: type[pl.LightningModule] = Constant) -> pl.LightningModule:
    pl.seed_everything(3, verbose=False)
    return module()


def after(epochs: float, rows: Tensor | None = None) -> State:
    """What `Constant` becomes when every row was seen by somebody, once an epoch."""
    x = regression().tensors[0] if rows is None else rows
    state = initial().state_dict()
    state["layer.weight"] -= epochs * LR * x.sum(0, keepdim=True)
    state["layer.bias"] -= epochs * LR * len(x)
    return state


def assert_equal(state: State, expected: State, atol: float = 1e-12) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=atol)


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_one_worker_of_a_server_started_by_hand_that_pushes_and_pulls_at_every_step_is_plain_sgd(
    tmp_path: Path,
) -> None:
    class Plain(Linear):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LR)

    data: dict[str, Any] = {"devices": 1, "max_epochs": 4, "use_distributed_sampler": False}
    with ShardProcess() as shard:
        strategy = downpour(n_push=1, n_pull=1, shard_addresses=[shard.address])
        [alone] = fit(tmp_path, initial(Plain), strategy, **data)
        shard.close(grace=5)
        assert shard._process.returncode == 0, "it ended by itself"
    [expected] = fit(tmp_path, initial(Plain), "auto", **data)
    assert_equal(alone["state"], expected["state"])
    assert alone["step"] == 48


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("arguments", "accumulate"),
    [
        ({"n_push": 2, "n_pull": 3, "shards": 2, "max_staleness": 1}, 1),
        ({"n_push": 1, "n_pull": 1, "warmup_steps": 5}, 1),
        ({"n_push": 2, "n_pull": 2, "warmup_steps": 2}, 2),
    ],
)
def test_after_fit_all_hold_all_that_all_have_made(tmp_path: Path, arguments: Any, accumulate: int) -> None:
    strategy = downpour(**arguments)
    ranks = fit(tmp_path, initial(), strategy, devices=3, max_epochs=3, accumulate_grad_batches=accumulate)
    for rank in ranks:
        assert_equal(rank["state"], after(3 / accumulate))
        assert all(torch.equal(value, ranks[0]["state"][name]) for name, value in rank["state"].items())
        assert rank["step"] == 3 * 4 // accumulate


class Ends(Recorder):
    """Keeps when each step ended."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(0.02)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault("ends", []).append(time.monotonic())


def test_the_others_begin_when_the_warm_up_is_over(tmp_path: Path) -> None:
    strategy = downpour(n_push=1, n_pull=1, warmup_steps=5)
    first, *others = fit(tmp_path, initial(), strategy, devices=3, max_epochs=3, recorder=Ends(tmp_path))
    for other in others:
        assert first["ends"][3] < other["ends"][0]
    assert min(other["ends"][0] for other in others) < first["ends"][-1]


def test_a_gan_under_manual_optimization(tmp_path: Path) -> None:
    ranks = fit(tmp_path, initial(Gan), "downpour_notebook", max_epochs=2)
    assert sum(rank["step"] for rank in ranks) == 24
    before = initial(Gan).state_dict()
    for name in ("generator.weight", "discriminator.weight"):
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name])
        assert 0.001 < (ranks[0]["state"][name] - before[name]).abs().max() < 1


def test_a_registered_name_that_forks_fits_and_tests(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="downpour_fork",
        max_epochs=40,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = initial(Linear)
    trainer.fit(module, DataLoader(regression(), 4))
    [tested] = trainer.test(module, DataLoader(regression(), 4), verbose=False)
    assert tested["test_loss"] < 2, "of 14 at the start"


class Backbone(Constant):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3, dtype=torch.float64)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layer.parameters(), lr=LR)


def test_what_unfreezes_in_mid_training_is_refused_before_a_push_is_due(tmp_path: Path) -> None:
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.001)
    with pytest.raises(Exception, match=r"'backbone\.weight' requires a gradient, but did not when"):
        fit(tmp_path, initial(Backbone), downpour(n_push=1000), max_epochs=3, callbacks=[finetuning])


# -- what is evaluated and what remains -------------------------------------------------------------------------------


class Validated(Recorder):
    """Keeps what was validated, and the model before and after `adopt_consensus`."""

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.setdefault("validated", []).append(copy_of(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.setdefault("trained", []).append(copy_of(pl_module))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["kept"] = copy_of(pl_module)
        self.seen["distance"] = trainer.strategy.consensus_distance
        trainer.save_checkpoint(self.folder / "after_fit.ckpt")
        assert all(torch.equal(value, self.seen["kept"][name]) for name, value in pl_module.state_dict().items())
        trainer.strategy.adopt_consensus()
        super().on_fit_end(trainer, pl_module)


def copy_of(module: pl.LightningModule) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def norm(state: State, minus: State) -> Tensor:
    return torch.cat([(value - minus[name]).flatten() for name, value in state.items()]).norm()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("evaluate", ["consensus", "replica"])
def test_validation_runs_on_the_servers_parameters_or_the_replica(tmp_path: Path, evaluate: str) -> None:
    """Nobody pushes before the end: the server holds the initial model until then."""
    strategy = downpour(n_push=100, n_pull=100, evaluate=evaluate)
    ranks = fit(
        tmp_path,
        initial(),
        strategy,
        max_epochs=2,
        val=DataLoader(regression(), 48),
        recorder=Validated(tmp_path),
        num_sanity_val_steps=0,
    )
    for rank in ranks:
        in_validation = rank["validated"][-1]
        expected = after(0) if evaluate == "consensus" else rank["trained"][-1]
        assert all(torch.equal(value, expected[name]) for name, value in in_validation.items())
        assert_equal(rank["state"], after(2))
        assert_equal(rank["kept"], after(2) if evaluate == "consensus" else rank["trained"][-1])
    assert not torch.equal(ranks[0]["trained"][-1]["layer.weight"], ranks[1]["trained"][-1]["layer.weight"])
    assert_equal(torch.load(tmp_path / "after_fit.ckpt", weights_only=True)["state_dict"], after(2))
    if evaluate == "consensus":
        zero = {name: torch.zeros_like(value) for name, value in after(2).items()}
        squares = sum(norm(rank["trained"][-1], after(2)) ** 2 for rank in ranks)
        expected_distance = (squares / 2) ** 0.5 / norm(after(2), zero)
        assert ranks[0]["distance"] == pytest.approx(float(expected_distance), rel=1e-9)


def test_an_average_that_a_callback_leaves_is_averaged_over_ranks_and_not_pushed(tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.5)
    ranks = fit(tmp_path, initial(), downpour(n_push=1, n_pull=1), max_epochs=2, callbacks=[average])
    assert all(torch.equal(value, ranks[0]["state"][name]) for name, value in ranks[1]["state"].items())
    behind = ranks[0]["state"]["layer.bias"] - after(2)["layer.bias"]
    assert 0 < behind < after(0)["layer.bias"] - after(2)["layer.bias"]


def test_the_monitor_logs_what_downpour_does_and_a_long_warm_up_ends_at_a_validation(tmp_path: Path) -> None:
    ranks = fit(
        tmp_path,
        initial(),
        downpour(n_push=1, n_pull=1, warmup_steps=1000),
        max_epochs=3,
        val=DataLoader(regression(), 24),
        callbacks=[GossipMonitor(every_n_steps=3)],
        logger=CSVLogger(tmp_path, name="run"),
    )
    [path] = tmp_path.rglob("metrics.csv")
    tags = set(path.read_text().splitlines()[0].split(","))
    counts = ("staleness", "pushes", "pulls", "bytes_sent", "wait_seconds")
    assert {"gossip/consensus_distance", *(f"downpour/{name}" for name in counts)} <= tags
    assert_equal(ranks[1]["state"], after(3))


# -- the learning-rate finder -----------------------------------------------------------------------------------------


class Finder(LearningRateFinder):
    """Changes nothing, at the fit's start or at the starts of some epochs, as a finder for finetuning does."""

    def __init__(self, *epochs: int) -> None:
        super().__init__(min_lr=1e-3, num_training_steps=7, update_attr=False)
        self.epochs = epochs

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.epochs:
            self.lr_find(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in self.epochs:
            self.lr_find(trainer, pl_module)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("epochs", "arguments"),
    [((), {"warmup_steps": 5}), ((0, 2), {}), ((0, 2), {"warmup_steps": 100}), ((2,), {"evaluate": "replica"})],
)
def test_the_learning_rate_finder_leaves_no_trace(tmp_path: Path, epochs: tuple[int, ...], arguments: Any) -> None:
    strategy = downpour(n_push=2, n_pull=3, **arguments)
    finder = Finder(*epochs)
    for rank in fit(tmp_path, initial(), strategy, max_epochs=4, callbacks=[finder], recorder=Validated(tmp_path)):
        assert_equal(rank["state"], after(4))
        assert rank["step"] == 24


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Starts(Recorder):
    """Keeps the replica, the clock and the server's state at the first batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if "start" not in self.seen:
            self.seen["start"] = copy_of(pl_module)
            self.seen["start_step"] = trainer.strategy.step
            if trainer.world_size == 1:
                self.seen["server"] = trainer.strategy._client.server_state()


def train(
    folder: Path, epochs: int, path: Any = None, devices: int = 2, callbacks: Any = (), **arguments: Any
) -> tuple[list[dict[str, Any]], Path]:
    folder.mkdir(exist_ok=True)
    saves = ModelCheckpoint(dirpath=folder / "saved", save_last=True)
    ranks = fit(
        folder,
        initial(),
        downpour(**arguments),
        devices=devices,
        max_epochs=epochs,
        callbacks=[saves, *callbacks],
        recorder=Starts(folder),
        ckpt_path=path,
        enable_checkpointing=True,
    )
    return ranks, folder / "saved" / "last.ckpt"


def replica_of(path: Path, rank: int) -> dict[str, Any]:
    save_id = torch.load(path, weights_only=True)[files.KEY]["save_id"]
    return files.load_replica(files.AtomicCheckpointIO(), path, save_id, rank, True)


def test_a_resumed_run_loses_nothing_and_on_another_world_size_begins_from_the_server(tmp_path: Path) -> None:
    _, path = train(tmp_path / "first", 2, n_push=5, n_pull=3)
    server = replica_of(path, 0)[files.KEY]["state"]["server"]
    assert "server" not in replica_of(path, 1)[files.KEY]["state"]
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(server["parameters"][0], torch.cat([saved["layer.weight"].flatten(), saved["layer.bias"]]))
    replicas = [replica_of(path, rank)["state_dict"] for rank in range(2)]
    assert not torch.equal(replicas[0]["layer.weight"], replicas[1]["layer.weight"])

    ranks, _ = train(tmp_path / "same", 4, path, n_push=5, n_pull=3, shards=2)
    for number, rank in enumerate(ranks):
        assert all(torch.equal(rank["start"][name], value) for name, value in replicas[number].items())
        assert (rank["start_step"], rank["step"]) == (12, 24)
        assert_equal(rank["state"], after(4))

    ranks, _ = train(tmp_path / "found", 2, path, callbacks=[Finder()])
    for rank in ranks:
        assert (rank["start_step"], rank["step"]) == (12, 24), "Lightning forgets the epochs done when the finder runs"
        assert_equal(rank["state"], after(4))

    ranks, _ = train(tmp_path / "other", 3, path, devices=3, n_push=100, warmup_steps=100)
    for rank in ranks:
        assert rank["start_step"] == 12
        assert all(torch.equal(rank["start"][name], value) for name, value in saved.items())
        assert all(torch.equal(value, ranks[0]["state"][name]) for name, value in rank["state"].items())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("evaluate", ["consensus", "replica"])
def test_a_training_resumed_at_its_end_gives_the_servers_parameters(tmp_path: Path, evaluate: str) -> None:
    _, path = train(tmp_path / "first", 2, n_push=5, n_pull=3)
    strategy = downpour(n_push=5, n_pull=3, evaluate=evaluate)
    ranks = fit(tmp_path, initial(), strategy, max_epochs=2, recorder=Validated(tmp_path), ckpt_path=path)
    server = torch.load(path, weights_only=True)["state_dict"]
    for number, rank in enumerate(ranks):
        kept = server if evaluate == "consensus" else replica_of(path, number)["state_dict"]
        assert all(torch.equal(rank["kept"][name], value) for name, value in kept.items())
        assert all(torch.equal(rank["state"][name], value) for name, value in server.items())


def test_the_servers_optimizer_goes_on(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "devices": 1,
        "n_push": 1,
        "n_pull": 1,
        "server_optimizer": partial(torch.optim.Adagrad, lr=0.05),
    }
    _, path = train(tmp_path, 1, **arguments)
    saved = replica_of(path, 0)[files.KEY]["state"]["server"]
    [[rank], _] = train(tmp_path, 2, path, **arguments)
    [before], [now] = saved["optimizer"], rank["server"]["optimizer"]
    assert before["sum"].abs().max() > 0
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert torch.equal(saved["parameters"][0], rank["server"]["parameters"][0])


# -- endings ----------------------------------------------------------------------------------------------------------


class Raising(Callback):
    """Raises on one rank, in the middle; rank 0 writes which its shards are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero:
            (self.folder / "pids").write_text(" ".join(str(process.pid) for process in trainer.strategy._processes))
        if trainer.current_epoch == 2 and trainer.global_rank == 1:
            raise ValueError("boom")


@pytest.mark.long
@pytest.mark.faults
def test_an_exception_on_one_worker_leaves_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # processes of their own, as a user's: a fork of a rank with threads may find a lock held, and end late
    monkeypatch.setattr(process, "subprocess", subprocess)
    with pytest.raises(Exception, match="boom"):
        fit(tmp_path, initial(), downpour(shards=2), devices=3, max_epochs=500, callbacks=[Raising(tmp_path)])
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5)


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_push": 0}, "`n_push` must be an integer of at least 1, got 0"),
        ({"n_pull": 1.5}, "`n_pull` must be an integer of at least 1, got 1.5"),
        ({"shards": 0}, "`shards` must be an integer of at least 1, got 0"),
        ({"shard_addresses": ["here"]}, "`shard_addresses` must be a list of distinct strings 'host:port'"),
        ({"shard_addresses": ["a:1", "b:2"], "shards": 3}, "`shards` must be 2, the number of `shard_addresses`"),
        ({"server_optimizer": torch.optim.LBFGS}, "`server_optimizer` must be one of"),
        ({"server_optimizer": partial(torch.optim.SGD, learning=1)}, "`server_optimizer` must take its keywords"),  # type: ignore[call-arg]
        ({"max_staleness": -1}, "`max_staleness` must be an integer of at least 0, got -1"),
        ({"warmup_steps": True}, "`warmup_steps` must be an integer of at least 0, got True"),
        ({"evaluate": "mean"}, "`evaluate` must be one of 'consensus', 'replica'; got 'mean'"),
        ({"timeout": 5}, "`timeout` must be a positive datetime.timedelta, got 5"),
    ],
)
def test_arguments_are_checked_at_construction(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below
        DownpourStrategy(**arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(("node", "address"), [(0, "10.0.0.1"), (1, "10.0.0.2")])
def test_shards_listen_on_the_interface_between_the_nodes(
    node: int, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where node 0 takes its own name for 127.0.1.1, as Debian's /etc/hosts says."""
    leads_to = [{"node0": "127.0.1.1", "10.0.0.2": "10.0.0.1"}, {"node0": "10.0.0.2"}][node]
    monkeypatch.setattr(shards, "own_address", leads_to.__getitem__)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("NODE_RANK", str(node))
    strategy = downpour(cluster_environment=LightningEnvironment())
    strategy.num_nodes = 2
    monkeypatch.setattr(strategy, "gather", lambda own: ["", "", "10.0.0.2", "10.0.0.2"])
    assert shards.host_of(strategy) == address


def test_arguments_in_a_runs_metadata() -> None:
    strategy = DownpourStrategy(
        shard_addresses=["a:1", "b:2"], server_optimizer=partial(torch.optim.Adagrad, lr=0.1), max_staleness=3
    )
    assert strategy.hyperparameters.items() >= {"n_push": 5, "n_pull": 5, "shards": 2, "max_staleness": 3}.items()
    assert strategy.hyperparameters["shard_addresses"] == ["a:1", "b:2"]
    assert strategy.hyperparameters["server_optimizer"] == {"class": "torch.optim.Adagrad", "lr": 0.1}
