"""Hooks during a save: what they see, and what they may put in its place."""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Linear, fit, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy
from lightning_gossip.strategies import checkpoint as files


def elastic(**kwargs: Any) -> ElasticGossipStrategy:
    return ElasticGossipStrategy(start_method="fork", period=10**6, **kwargs)


def train(folder: Path, module: Any, strategy: Any = None, callbacks: Any = (), **kwargs: Any) -> Any:
    checkpoint = ModelCheckpoint(folder / "saved", "last", save_on_train_epoch_end=kwargs.pop("at_epoch_end", True))
    ranks = fit(
        folder, module, strategy or elastic(), max_epochs=kwargs.pop("max_epochs", 1), enable_checkpointing=True,
        callbacks=[*callbacks, checkpoint], **kwargs,
    )  # fmt: skip
    saved = torch.load(folder / "saved" / "last.ckpt", weights_only=True)
    path = str(folder / "saved" / "last.ckpt")
    replicas = [
        torch.load(files.replica_path(path, saved[files.KEY]["save_id"], rank), weights_only=True) for rank in range(2)
    ]
    return ranks, saved, replicas


class Sees(Linear):
    """Writes what its hooks see as a library does that keeps a model of its own beside the checkpoint."""

    @property
    def of_rank(self) -> Seen:
        trainer: Any = self.trainer
        return trainer.callbacks[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        seen = self.of_rank.seen
        seen["given"] = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
        seen["self"] = {name: value.clone() for name, value in self.state_dict().items()}

    def on_train_epoch_end(self) -> None:
        self.of_rank.seen["own"] = {name: value.clone() for name, value in self.state_dict().items()}

    def on_train_end(self) -> None:
        after = {name: value.clone() for name, value in self.state_dict().items()}
        torch.save(self.of_rank.seen | {"after": after}, self.of_rank.file(self.global_rank))


class Seen(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, Any] = {}

    def file(self, rank: int) -> Path:
        return self.folder / f"seen_{rank}.pt"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("at_epoch_end", [True, False])
@pytest.mark.parametrize("scheme", ["elastic", "downpour"])
def test_hooks_see_the_consensus_and_the_replica_file_gets_the_replica(
    tmp_path: Path, scheme: str, at_epoch_end: bool
) -> None:
    strategy = elastic() if scheme == "elastic" else DownpourStrategy(start_method="fork")
    val = None if at_epoch_end else DataLoader(regression(), 8)
    _, saved, replicas = train(
        tmp_path, Sees(), strategy, [Seen(tmp_path)], val=val, at_epoch_end=at_epoch_end, num_sanity_val_steps=0
    )
    for rank, replica in enumerate(replicas):
        seen = torch.load(tmp_path / f"seen_{rank}.pt", weights_only=True)
        for name, value in saved["state_dict"].items():
            assert torch.equal(seen["given"][name], value)
            assert torch.equal(seen["self"][name], value)
            assert torch.equal(seen["own"][name], replica["state_dict"][name])
            assert scheme == "downpour" or torch.equal(seen["own"][name], seen["after"][name]), "and it comes back"
    if scheme == "elastic":
        mean = torch.stack([replica["state_dict"]["layer.weight"] for replica in replicas]).mean(0)
        torch.testing.assert_close(saved["state_dict"]["layer.weight"], mean, rtol=1e-12, atol=1e-12)


def test_replicas_see_themselves_where_replicas_are_evaluated(tmp_path: Path) -> None:
    _, saved, replicas = train(tmp_path, Sees(), elastic(evaluate="replica"), [Seen(tmp_path)])
    for rank, replica in enumerate(replicas):
        seen = torch.load(tmp_path / f"seen_{rank}.pt", weights_only=True)
        assert torch.equal(seen["given"]["layer.weight"], replica["state_dict"]["layer.weight"])
        assert not torch.equal(seen["given"]["layer.weight"], saved["state_dict"]["layer.weight"])


class Halves(Linear):
    """Saves half precision, on the ranks that ``on`` names."""

    def __init__(self, on: tuple[int, ...]) -> None:
        super().__init__()
        self.on = on

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_rank in self.on:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value.half() for name, value in state.items()}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("on", [(0,), (1,), (0, 1)])
def test_a_hook_that_replaces_entries_on_some_ranks_holds_nobody_up(tmp_path: Path, on: tuple[int, ...]) -> None:
    began = time.monotonic()
    _, saved, replicas = train(tmp_path, Halves(on))
    assert time.monotonic() - began < 30
    assert saved["state_dict"]["layer.weight"].dtype == (torch.float16 if 0 in on else torch.float64)
    exact = [r[files.KEY].get("replaced", r["state_dict"])["layer.weight"] for r in replicas]
    assert all(value.dtype == torch.float64 for value in exact)
    mean = torch.stack(exact).mean(0)
    torch.testing.assert_close(saved["state_dict"]["layer.weight"].double(), mean, rtol=2e-3, atol=2e-3)


def test_a_resume_from_a_checkpoint_of_half_precision_is_exact(tmp_path: Path) -> None:
    def run(folder: str, epochs: int, ckpt_path: Any = None) -> Any:
        torch.manual_seed(2)
        (tmp_path / folder).mkdir(exist_ok=True)
        return train(tmp_path / folder, Halves((0, 1)), max_epochs=epochs, ckpt_path=ckpt_path)[2]

    run("first", 1)
    resumed = run("second", 2, tmp_path / "first" / "saved" / "last.ckpt")
    unbroken = run("unbroken", 2)
    for ours, theirs in zip(resumed, unbroken, strict=True):
        for name, value in theirs[files.KEY]["replaced"].items():
            assert torch.equal(ours[files.KEY]["replaced"][name], value)


class Moves(Linear):
    """Renames entries, drops one, and keeps another under a key of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["mine"] = {"deep": OrderedDict(bias=state["layer.bias"])}
        checkpoint["state_dict"] = {"renamed": state["layer.weight"]}


def test_entries_are_told_apart_wherever_a_hook_puts_them(tmp_path: Path) -> None:
    _, saved, replicas = train(tmp_path, Moves())
    for value in (saved, *replicas):
        assert list(value["state_dict"]) == ["renamed"]
    for take in (lambda c: c["state_dict"]["renamed"], lambda c: c["mine"]["deep"]["bias"]):
        own = torch.stack([take(replica) for replica in replicas])
        assert not torch.equal(own[0], own[1])
        torch.testing.assert_close(take(saved), own.mean(0), rtol=1e-12, atol=1e-12)


def test_folders_whose_checkpoint_somebody_removed_go_with_the_next_save(tmp_path: Path) -> None:
    class Removes(Callback):
        """Keeps the last checkpoint by itself, as some libraries do."""

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"own_{trainer.current_epoch}.ckpt")
            if trainer.is_global_zero and trainer.current_epoch:
                (tmp_path / f"own_{trainer.current_epoch - 1}.ckpt").unlink()

    def folders() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("*.replicas"))

    (tmp_path / "alien.replicas").mkdir()  # not of a checkpoint of ours
    fit(tmp_path, Linear(), elastic(), max_epochs=3, callbacks=[Removes()])
    assert folders() == ["alien.replicas", "own_1.ckpt.replicas", "own_2.ckpt.replicas"]
    (tmp_path / "own_2.ckpt").unlink()
    fit(tmp_path, Linear(), elastic(), max_epochs=1, callbacks=[Removes()])
    assert folders() == ["alien.replicas", "own_0.ckpt.replicas"], "those of an earlier run too"


def test_a_folder_of_a_save_that_is_under_way_elsewhere_stays(tmp_path: Path) -> None:
    class Another(Callback):
        """Another run that shares the folder is about to write its checkpoint."""

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero:
                folder = tmp_path / "other.ckpt.replicas" / "0123456789abcdef"
                folder.mkdir(parents=True)
                (folder / "rank_0.pt").write_bytes(b"")
            trainer.save_checkpoint(tmp_path / "own.ckpt")

    fit(tmp_path, Linear(), elastic(), max_epochs=1, callbacks=[Another()])
    assert (tmp_path / "other.ckpt.replicas" / "0123456789abcdef" / "rank_0.pt").exists()
