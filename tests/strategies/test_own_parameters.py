"""Every rank owns its parameters and buffers, however it was started and wherever the module's memory was before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from environments import LEAN
from forked import Linear, Recorder, fit
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy, GossipStrategy
from lightning_gossip.strategies.ownership import own_parameters


class Tied(Linear):
    """Two layers of one weight, a buffer that counts, and a view of one flat parameter."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1, dtype=torch.float64)
        self.head.weight = self.layer.weight
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("first", self.seen[:2])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += self.global_rank + 1
        return super().training_step(batch, batch_idx)


class Teacher(Callback):
    """Keeps a module of its own, as callbacks with averages do."""

    def __init__(self) -> None:
        self.models = {"teacher": nn.Linear(2, 1)}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        with torch.no_grad():
            self.models["teacher"].weight += trainer.global_rank + 1


class Own(Recorder):
    """Records this rank's replica before the end of training, when all take the consensus."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["replica"] = {name: value.clone() for name, value in pl_module.state_dict().items()}
        teachers = [callback for callback in trainer.callbacks if isinstance(callback, Teacher)]
        self.seen["teacher"] = teachers[0].models["teacher"].weight.detach() - self.seen["before"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        teachers = [callback for callback in trainer.callbacks if isinstance(callback, Teacher)]
        self.seen["before"] = teachers[0].models["teacher"].weight.detach().clone()


@pytest.mark.one_in(8)
@pytest.mark.parametrize("shared", [False, True], ids=["private", "share_memory"])
@pytest.mark.parametrize(
    ("name", "start_method"),
    [("elastic", "fork"), ("elastic", "forkserver"), ("elastic", "spawn"), ("downpour", "forkserver")],
)
def test_ranks_train_parameters_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, start_method: Any, shared: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", LEAN["PYTHONPATH"])
    torch.manual_seed(0)
    module, teacher = Tied(), Teacher()
    if shared:
        module.share_memory()
        teacher.models["teacher"].share_memory()
    strategy: Any = ElasticGossipStrategy(probability=1e-9, start_method=start_method)
    if name == "downpour":
        strategy = DownpourStrategy(n_push=1000, n_pull=1000, dealt=False, start_method=start_method)
    results = fit(tmp_path, module, strategy, callbacks=[teacher], recorder=Own(tmp_path), max_epochs=1)
    one, other = (result["replica"] for result in results)
    assert not torch.equal(one["layer.weight"], other["layer.weight"])
    for rank, replica in enumerate((one, other)):
        assert torch.equal(replica["head.weight"], replica["layer.weight"]), "what was tied is tied still"
        assert replica["seen"].tolist() == [6.0 * (rank + 1)] * 4, "batches that this rank saw, and no other"
        assert replica["first"].tolist() == [6.0 * (rank + 1)] * 2
        torch.testing.assert_close(results[rank]["teacher"], torch.full((1, 2), 6.0 * (rank + 1)))


def test_a_resume_into_shared_memory_keeps_replicas_apart(tmp_path: Path) -> None:
    """A checkpoint is loaded before anything else is done to the module."""

    def train(folder: Path, epochs: int, path: Any = None) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        module = Tied()
        module.share_memory()
        return fit(
            folder,
            module,
            GossipStrategy(period=5, start_method="fork"),
            callbacks=[Teacher(), ModelCheckpoint(tmp_path / "saved", filename="at", save_top_k=-1)],
            recorder=Own(folder),
            enable_checkpointing=True,
            max_epochs=epochs,
            ckpt_path=path,
        )

    for name in ("whole", "begun", "resumed"):
        (tmp_path / name).mkdir()
    train(tmp_path / "begun", 2)
    resumed = train(tmp_path / "resumed", 4, tmp_path / "saved" / "at.ckpt")
    unbroken = train(tmp_path / "whole", 4)
    for ours, theirs in zip(resumed, unbroken, strict=True):
        for name, value in theirs["replica"].items():
            assert torch.equal(ours["replica"][name], value), name


def test_what_shares_memory_goes_on_sharing_it() -> None:
    flat = torch.arange(6.0).share_memory_()
    module = nn.Module()
    module.a, module.b = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[2:].view(2, 2).t())
    module.frozen = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    module.private = nn.Parameter(torch.ones(2))
    private = module.private.data_ptr()
    own_parameters([{"trainer": [module]}])
    assert not module.a.is_shared()
    assert not module.b.is_shared()
    assert module.private.data_ptr() == private, "what was its own is left alone"
    with torch.no_grad():
        module.a[1, 0] = 7.0
    assert module.b[0, 0] == 7.0
    assert flat[2] == 2.0
    assert torch.equal(module.b.detach(), torch.tensor([[7.0, 4.0], [3.0, 5.0]]))
