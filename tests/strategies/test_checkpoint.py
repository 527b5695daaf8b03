"""Checkpoints: a resumed run equals an unbroken one bit for bit, and what happens where it can not."""

# a Trainer gets its attributes at run time, and what is an attribute of a module torch declares Tensor | Module
# mypy: disable-error-code="attr-defined, union-attr, operator"

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from environments import LEAN
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gossip import ElasticGossipStrategy, GossipStrategy
from lightning_gossip.strategies import checkpoint as files
from lightning_gossip.strategies.saved_state import completed

STRATEGIES: dict[str, Any] = {
    "elastic": lambda **kwargs: ElasticGossipStrategy(alpha=0.3, **kwargs),
    "pull": lambda **kwargs: GossipStrategy("pull", **kwargs),
    "push": lambda **kwargs: GossipStrategy("push", **kwargs),
}


def make(name: str, **kwargs: Any) -> Any:
    return STRATEGIES[name](start_method="fork", timeout=timedelta(seconds=30), peers="uniform", seed=4, **kwargs)


class Noisy(Linear):
    """Dropout, momentum, a scheduler, and noise from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = random.random() + float(np.random.random())
        return nn.functional.mse_loss(self.layer(self.dropout(self.norm(x))).squeeze(1), y + 0.01 * noise)

    def on_train_start(self) -> None:
        if self.trainer.current_epoch == 0:
            torch.manual_seed(100 + self.global_rank)
            random.seed(self.global_rank)
            np.random.seed(self.global_rank)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"}]


def train(
    folder: Path,
    name: str,
    epochs: int,
    ckpt_path: Any = None,
    devices: int = 4,
    ema: bool = False,
    module: type[pl.LightningModule] = Noisy,
    evaluate: str = "replica",
    **kwargs: Any,
) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    pl.seed_everything(5, verbose=False)
    checkpoint = ModelCheckpoint(dirpath=folder / "saved", filename="{epoch}", save_top_k=-1, save_last=True)
    callbacks = [checkpoint, EMAWeightAveraging(decay=0.8)] if ema else [checkpoint]
    return fit(
        folder,
        module(),  # after the seed
        make(name, evaluate=evaluate, **kwargs),
        devices=devices,
        train=DataLoader(regression(), 4, shuffle=True),
        val=DataLoader(regression(), 24),
        callbacks=callbacks,
        ckpt_path=ckpt_path,
        enable_checkpointing=True,
        max_epochs=epochs,
    )


@pytest.mark.one_in(6)
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path, name: str, delay: int, ema: bool) -> None:
    schedule = {"period": 4, "delay": delay} if delay else {"probability": 0.7}
    unbroken = train(tmp_path / "unbroken", name, 4, ema=ema, **schedule)
    train(tmp_path / "broken", name, 2, ema=ema, **schedule)
    resumed = train(tmp_path / "broken", name, 4, tmp_path / "broken" / "saved" / "last.ckpt", ema=ema, **schedule)
    for rank in range(4):
        assert resumed[rank]["step"] == unbroken[rank]["step"] == 12
        for key, value in unbroken[rank]["state"].items():
            assert torch.equal(resumed[rank]["state"][key], value), (rank, key)
    assert not torch.equal(unbroken[0]["state"]["layer.weight"], unbroken[1]["state"]["layer.weight"])


class Counting(Noisy):
    """Asks for the number of steps, as warm-up schedules do: Lightning makes the training loader then, and iterates."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.long
def test_a_resumed_run_equals_an_unbroken_one_where_the_loader_was_made_early(tmp_path: Path) -> None:
    unbroken = train(tmp_path / "unbroken", "elastic", 3, module=Counting)
    train(tmp_path / "broken", "elastic", 2, module=Counting)
    last = tmp_path / "broken" / "saved" / "last.ckpt"
    resumed = train(tmp_path / "broken", "elastic", 3, last, module=Counting)
    for rank in range(4):
        assert torch.equal(resumed[rank]["state"]["layer.weight"], unbroken[rank]["state"]["layer.weight"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ema", [False, True])
def test_resuming_a_training_that_was_at_its_end_gives_the_consensus_that_was_saved(tmp_path: Path, ema: bool) -> None:
    train(tmp_path, "elastic", 2, evaluate="consensus", ema=ema)
    last = tmp_path / "saved" / "last.ckpt"
    resumed = train(tmp_path, "elastic", 2, last, evaluate="consensus", ema=ema)
    for name, value in torch.load(last, weights_only=True)["state_dict"].items():
        assert all(torch.equal(rank["state"][name], value) for rank in resumed), name
    for rank, kept in enumerate(train(tmp_path, "elastic", 2, last, ema=ema)):
        replica = replica_of(last, rank)
        replica = replica["current_model_state" if ema else "state_dict"]
        assert torch.equal(kept["state"]["layer.weight"], replica["layer.weight"])


@pytest.mark.long
def test_a_rank_with_other_generators_would_be_noticed(tmp_path: Path, monkeypatch: Any) -> None:
    unbroken = train(tmp_path / "unbroken", "elastic", 4)
    train(tmp_path / "broken", "elastic", 2)
    monkeypatch.setattr(files, "restore_rng_state", lambda state: None)
    resumed = train(tmp_path / "broken", "elastic", 4, tmp_path / "broken" / "saved" / "last.ckpt")
    assert not torch.equal(resumed[0]["state"]["layer.weight"], unbroken[0]["state"]["layer.weight"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two epochs of elastic gossip on 4 ranks saved; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, "elastic", 2)
    return folder / "saved"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("devices", [2, 6])
def test_resuming_on_another_world_size_warns_and_starts_from_the_consensus(
    tmp_path: Path, saved: Path, devices: int, monkeypatch: Any
) -> None:
    path = saved / "last.ckpt"
    consensus = torch.load(path, weights_only=True)["state_dict"]
    warned = tmp_path / "warned"
    monkeypatch.setattr("lightning_gossip.strategies.saving.rank_zero_warn", warned.write_text)
    ranks = fit(tmp_path, Start(), make("elastic"), devices=devices, ckpt_path=path, max_epochs=3)
    assert f"it was saved by 4 ranks, and there are {devices} now" in warned.read_text()
    assert ranks[0]["step"] == 6 + 12 // devices, "the clock goes on: 3 steps an epoch before, then 12 batches"
    for rank in ranks:
        for name, value in consensus.items():
            assert torch.equal(rank["start"][name], value), name
        assert rank["momentum"], "rank 0's optimizer state"


class Start(Noisy):
    """Keeps what it starts from."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        recorder = self.trainer.callbacks[-1]
        if "start" not in recorder.seen:
            recorder.seen["start"] = {name: value.clone() for name, value in self.state_dict().items()}
            recorder.seen["momentum"] = len(self.optimizers().state) > 0


def test_the_checkpoint_holds_the_mean_and_the_replica_files_the_replicas(saved: Path) -> None:
    path = saved / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    replicas = [replica_of(path, rank) for rank in range(4)]
    for name, value in checkpoint["state_dict"].items():
        stacked = torch.stack([replica["state_dict"][name] for replica in replicas])
        if value.is_floating_point():
            torch.testing.assert_close(value, stacked.mean(0), rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(value, stacked[0])
    assert not torch.equal(replicas[0]["state_dict"]["layer.weight"], replicas[1]["state_dict"]["layer.weight"])


def replica_of(path: Path, rank: int) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    save_id = checkpoint[files.KEY]["save_id"]
    replica = torch.load(files.replica_path(path.resolve(), save_id, rank), weights_only=True)
    return completed(replica, replica[files.KEY]["shared"], checkpoint)


def test_averages_of_a_callback_are_averaged_over_ranks_and_restored_per_rank(tmp_path: Path) -> None:
    train(tmp_path, "elastic", 1, ema=True)
    path = tmp_path / "saved" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    replicas = [replica_of(path, rank) for rank in range(4)]
    for key in ("state_dict", "current_model_state"):
        mean = torch.stack([replica[key]["layer.weight"] for replica in replicas]).mean(0)
        torch.testing.assert_close(checkpoint[key]["layer.weight"], mean, rtol=1e-12, atol=1e-12)
    assert not torch.equal(checkpoint["state_dict"]["layer.weight"], checkpoint["current_model_state"]["layer.weight"])


LOAD = """
import sys
sys.modules["lightning_gossip"] = None  # importing it fails
import torch
from forked import Linear, regression
x, y = regression().tensors
for path in sys.argv[1:]:
    module = Linear.load_from_checkpoint(path, weights_only=True)
    print(repr(float(torch.nn.functional.mse_loss(module.layer(x).squeeze(1), y))))
"""


def test_the_checkpoint_loads_without_this_package_and_gives_the_validated_metric(tmp_path: Path) -> None:
    """Also where a callback keeps an average of its own."""
    validated = []
    for name, averages in (("plain", []), ("averaged", [EMAWeightAveraging(decay=0.5)])):
        ranks = fit(
            tmp_path,
            Linear(),
            make("elastic"),
            devices=3,
            max_epochs=2,
            val=DataLoader(regression(), 16),
            callbacks=[ModelCheckpoint(dirpath=tmp_path, filename=name, monitor="val_loss"), *averages],
            enable_checkpointing=True,
        )
        assert len({rank["metrics"]["val_loss"] for rank in ranks}) == 1
        validated.append(ranks[0]["metrics"]["val_loss"])
    command = [sys.executable, "-c", LOAD, str(tmp_path / "plain.ckpt"), str(tmp_path / "averaged.ckpt")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=LEAN, capture_output=True, text=True, check=True)
    printed = done.stdout
    assert list(map(float, printed.split())) == pytest.approx(validated, rel=1e-9)
    assert validated[0] != validated[1]


def damaged(tmp_path: Path, saved: Path, damage: Any, monkeypatch: Any) -> str:
    """Damage a copy of what was saved, and resume from it; return the warning. All have to start from the consensus."""
    path = shutil.copytree(saved, tmp_path / "saved") / "last.ckpt"
    save_id = torch.load(path, weights_only=True)[files.KEY]["save_id"]
    damage(Path(files.replica_path(path, save_id, 1)))
    warned = tmp_path / "warned"
    monkeypatch.setattr("lightning_gossip.strategies.saving.rank_zero_warn", warned.write_text)
    ranks = fit(tmp_path, Start(), make("elastic"), devices=4, ckpt_path=path, max_epochs=3)
    consensus = torch.load(path, weights_only=True)["state_dict"]
    for rank in ranks:
        assert all(torch.equal(rank["start"][name], value) for name, value in consensus.items())
    return warned.read_text()


def test_a_missing_replica_file_is_named(tmp_path: Path, saved: Path, monkeypatch: Any) -> None:
    assert "rank_1.pt is missing" in damaged(tmp_path, saved, Path.unlink, monkeypatch)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_a_torn_replica_file_is_named(tmp_path: Path, saved: Path, monkeypatch: Any, part: float) -> None:
    def tear(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])

    assert "rank_1.pt is torn or unreadable" in damaged(tmp_path, saved, tear, monkeypatch)


def test_a_replica_file_of_another_save_is_named(tmp_path: Path, saved: Path, monkeypatch: Any) -> None:
    def swap(file: Path) -> None:
        checkpoint = torch.load(file, weights_only=True)
        checkpoint[files.KEY]["save_id"] = "another"
        torch.save(checkpoint, file)

    assert "rank_1.pt is of save 'another' and rank 1, not of save" in damaged(tmp_path, saved, swap, monkeypatch)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_nothing_that_is_loaded_runs_code(tmp_path: Path, saved: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def poison(file: Path) -> None:
        torch.save({"evil": Evil()}, file)

    assert "rank_1.pt is torn or unreadable" in damaged(tmp_path, saved, poison, monkeypatch)
    assert not (tmp_path / "evil").exists()


def saves(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_removal_takes_the_replica_files_along(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{epoch}", save_top_k=1, monitor="worse")
    fit(tmp_path, Worse(), make("elastic"), max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True)
    assert saves(tmp_path / "saved") == {"epoch=2.ckpt", "epoch=2.ckpt.replicas"}
    assert len(saves(tmp_path / "saved" / "epoch=2.ckpt.replicas")) == 1


class Worse(Linear):
    """Logs a metric that falls from epoch to epoch, and that ranks do not agree on."""

    def on_train_epoch_end(self) -> None:
        self.log("worse", -float(self.current_epoch) + (0.5 * self.global_rank) * (-1) ** self.current_epoch)


def test_a_symbolic_link_is_followed_to_load_and_not_to_remove(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{epoch}", save_top_k=-1, save_last="link")
    fit(tmp_path, Noisy(), make("elastic"), max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True)
    link = tmp_path / "saved" / "last.ckpt"
    assert link.is_symlink()
    ranks = fit(tmp_path, Start(), make("elastic"), max_epochs=3, ckpt_path=link)
    assert [rank["step"] for rank in ranks] == [18, 18]
    for rank in range(2):
        assert torch.equal(ranks[rank]["start"]["layer.weight"], replica_of(link, rank)["state_dict"]["layer.weight"])
    strategy = make("elastic")
    strategy.remove_checkpoint(str(link))
    assert saves(tmp_path / "saved") >= {"epoch=1.ckpt", "epoch=1.ckpt.replicas"}
    assert not link.exists()


def test_ranks_that_disagree_on_a_metric_make_one_decision_and_one_file(tmp_path: Path) -> None:
    class Paths(Recorder):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            callback = trainer.checkpoint_callback
            self.seen["best"] = (callback.best_model_path, float(callback.best_model_score))
            super().on_fit_end(trainer, pl_module)

    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{worse:.2f}", save_top_k=2, monitor="worse")
    ranks = fit(
        tmp_path,
        Worse(),
        make("elastic"),
        devices=3,
        max_epochs=4,
        callbacks=[checkpoint],
        recorder=Paths(tmp_path),
        enable_checkpointing=True,
    )
    assert len({rank["best"] for rank in ranks}) == 1
    assert Path(ranks[0]["best"][0]).name == "worse=-3.00.ckpt"
    assert {name for name in saves(tmp_path / "saved") if name.endswith(".ckpt")} == {
        "worse=-3.00.ckpt",
        "worse=-2.00.ckpt",
    }


@pytest.mark.parametrize("plugin", [TorchCheckpointIO, AsyncCheckpointIO])
def test_checkpoint_plugins_keep_working(tmp_path: Path, plugin: Any) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", filename="last")
    fit(
        tmp_path, Noisy(), make("elastic"), max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True,
        plugins=[plugin()],
    )  # fmt: skip
    path = tmp_path / "saved" / "last.ckpt"
    ranks = fit(tmp_path, Start(), make("elastic"), max_epochs=3, ckpt_path=path)
    for rank in range(2):
        assert torch.equal(ranks[rank]["start"]["layer.weight"], replica_of(path, rank)["state_dict"]["layer.weight"])


def test_save_weights_only_writes_no_replicas(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", filename="weights", save_weights_only=True)
    fit(tmp_path, Noisy(), make("elastic"), max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True)
    assert saves(tmp_path / "saved") == {"weights.ckpt"}


class SlowIO(TorchCheckpointIO):
    """Takes longer to write a ``.ckpt`` than the steps from one to the next."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if str(path).endswith(".ckpt"):
            time.sleep(0.2)
        super().save_checkpoint(checkpoint, path, storage_options)


class LooksAtDisk(Recorder):
    """Loads what is on the disk after every step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        path = self.folder / "saved" / "last.ckpt"
        if path.exists():
            time.sleep(0.02)
            self.seen.setdefault("steps", []).append(self._replica(path, trainer.global_rank)["global_step"])

    def _replica(self, path: Path, rank: int) -> dict[str, Any]:
        before = path.stat().st_mtime_ns
        try:
            return replica_of(path, rank)
        except FileNotFoundError:
            if path.stat().st_mtime_ns == before:
                raise
            return self._replica(path, rank)  # the next one came between the two files


@pytest.mark.long
def test_with_a_backlog_of_writes_the_files_of_the_checkpoint_on_disk_stay(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "last", every_n_train_steps=1, enable_version_counter=False)
    ranks = fit(
        tmp_path, Noisy(), make("elastic"), max_epochs=1, callbacks=[saving], recorder=LooksAtDisk(tmp_path),
        enable_checkpointing=True, plugins=[AsyncCheckpointIO(SlowIO())], limit_train_batches=20,
        train=DataLoader(regression(120), 3),
    )  # fmt: skip
    assert 0 < ranks[0]["steps"][-1] < 20, "writes lag behind"
    assert len(saves(tmp_path / "saved" / "last.ckpt.replicas")) == 1, "at the end only those that are named remain"


class SavesAfterFit(Recorder):
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_end(trainer, pl_module)
        trainer.save_checkpoint(self.folder / "after.ckpt")
        assert torch.equal(pl_module.layer.weight, self.seen["state"]["layer.weight"]), "replicas come back"


@pytest.mark.parametrize("evaluate", ["consensus", "replica"])
def test_a_checkpoint_saved_after_fit_holds_the_consensus_and_the_clock(
    tmp_path: Path, evaluate: str, monkeypatch: Any
) -> None:
    strategy = make("elastic", evaluate=evaluate)
    replicas = fit(tmp_path, Noisy(), strategy, max_epochs=1, recorder=SavesAfterFit(tmp_path))
    path = tmp_path / "after.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    mean = torch.stack([rank["state"]["layer.weight"] for rank in replicas]).mean(0)
    torch.testing.assert_close(state["layer.weight"], mean, rtol=1e-12, atol=1e-12)
    warned = tmp_path / "warned"
    monkeypatch.setattr("lightning_gossip.strategies.saving.rank_zero_warn", warned.write_text)
    resumed = fit(tmp_path, Start(), make("elastic"), ckpt_path=path, max_epochs=2)
    assert "it was saved after `fit`" in warned.read_text()
    for rank in resumed:
        assert rank["step"] == 12
        assert torch.equal(rank["start"]["layer.weight"], state["layer.weight"])


@pytest.mark.parametrize("prefix", ["~", "file://{home}"])
def test_paths_mean_what_they_mean_to_lightning(tmp_path: Path, monkeypatch: Any, prefix: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = prefix.format(home=tmp_path) + "/saved/it.ckpt"
    io = files.AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 3}, path)
    assert io.load_checkpoint(path) == {"epoch": 3}
    assert saves(tmp_path) == {"saved"}
    assert saves(tmp_path / "saved") == {"it.ckpt"}
    assert files.followed(path) == str(tmp_path / "saved" / "it.ckpt")


class SavesOnOwnDisk(Recorder):
    """Each rank is the first of a node with a folder of its own, in which the path is another file."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        type(trainer.strategy).local_rank = 0
        self.disk = self.folder / f"disk_{trainer.global_rank}"
        self.disk.mkdir(exist_ok=True)
        os.chdir(self.disk)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint("saved/last.ckpt")
        self.seen.setdefault("there", []).append(len(saves(self.disk / "saved" / "last.ckpt.replicas")))
        trainer.save_checkpoint(f"saved/{trainer.current_epoch}.ckpt")
        if trainer.current_epoch:
            trainer.strategy.remove_checkpoint(f"saved/{trainer.current_epoch - 1}.ckpt")


def test_nodes_with_disks_of_their_own_keep_no_files_of_old_saves(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Linear(), make("elastic"), max_epochs=4, recorder=SavesOnOwnDisk(tmp_path))
    assert [rank["there"] for rank in ranks] == [[1, 1, 1, 1], [1, 2, 2, 2]]
    assert saves(tmp_path / "disk_1" / "saved") == {"last.ckpt.replicas", "3.ckpt.replicas"}
