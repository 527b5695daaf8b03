"""Tensors of unusual kinds in a model, and trust in what a replica file holds."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Linear, fit, recorded, regression
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy
from lightning_gossip.exchange.tensors import digest
from lightning_gossip.strategies import saving


def elastic(**kwargs: Any) -> ElasticGossipStrategy:
    return ElasticGossipStrategy(start_method="fork", timeout=timedelta(seconds=30), **kwargs)


def loader() -> DataLoader[Any]:
    return DataLoader(regression(), 8)


KINDS: dict[str, Any] = {
    "float8_e4m3fn": lambda: torch.arange(6.0).to(torch.float8_e4m3fn),
    "float8_e5m2": lambda: torch.arange(6.0).to(torch.float8_e5m2),
    "float8_e8m0fnu": lambda: torch.tensor([1.0, 2.0, 4.0]).to(torch.float8_e8m0fnu),
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "overlapping": lambda: torch.arange(6.0).unfold(0, 3, 1),
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(3.0), 0.1, 0, torch.qint8),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)).conj(),
    "bool": lambda: torch.tensor([True, False]),
    "uint4": lambda: torch.arange(4, dtype=torch.uint8).view(torch.uint4) if hasattr(torch, "uint4") else torch.ones(1),
}


class Unusual(Linear):
    def __init__(self, kind: str, parameter: bool, persistent: bool = True) -> None:
        super().__init__()
        if parameter:
            self.unusual = nn.Parameter(KINDS[kind](), requires_grad=False)
        else:
            self.register_buffer("unusual", KINDS[kind](), persistent=persistent)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        recorded(self)["validated"] = digest(self.unusual)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("scheme", ["elastic", "downpour"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_of_any_kind_that_all_ranks_share_is_left_alone(tmp_path: Path, kind: str, scheme: str) -> None:
    strategy = elastic() if scheme == "elastic" else DownpourStrategy(start_method="fork")
    persistent = kind not in ("expanded", "overlapping", "quantized", "uint4", "csr", "csc", "bsr", "conjugate")
    module = Unusual(kind, parameter=False, persistent=persistent)  # others do not load in place, with DDP either
    ranks = fit(tmp_path, module, strategy, max_epochs=2, val=loader())
    assert all(rank["validated"] == digest(KINDS[kind]()) for rank in ranks)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "expanded", "coo", "bool"])
def test_a_frozen_parameter_of_any_kind_is_left_alone(tmp_path: Path, kind: str) -> None:
    class Hidden(Unusual):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            state = super().state_dict(*args, **kwargs)
            state.pop("unusual", None)
            return state

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    ranks = fit(tmp_path, Hidden(kind, parameter=True), elastic(), max_epochs=1, val=loader())
    assert all(rank["validated"] == digest(KINDS[kind]()) for rank in ranks)


def test_unusual_buffers_that_differ_are_rank_zeros_where_they_can_be_written(tmp_path: Path) -> None:
    class Differs(Linear):
        eight: Tensor
        expanded: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("eight", torch.zeros(3, dtype=torch.float8_e4m3fn), persistent=False)
            self.register_buffer("expanded", torch.zeros(1, 3).expand(4, 3), persistent=False)
            self.register_buffer("graph", torch.eye(3).to_sparse(), persistent=False)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.eight.copy_(torch.full((3,), 1.0 + self.global_rank).to(torch.float8_e4m3fn))
            self.expanded[:1].fill_(1.0 + self.global_rank)
            self.graph = (torch.eye(3) * (1.0 + self.global_rank)).to_sparse()

        def look(self) -> list[float]:
            return [float(self.eight[0]), float(self.expanded[3, 2]), float(self.graph.to_dense()[0, 0])]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            recorded(self)["validated"] = self.look()

        def on_validation_end(self) -> None:
            recorded(self)["after"] = self.look()

    ranks = fit(tmp_path, Differs(), elastic(), max_epochs=1, val=loader(), num_sanity_val_steps=0)
    assert [rank["validated"] for rank in ranks] == [[1, 1, 1], [1, 1, 2]], "a sparse one stays with each rank"
    assert [rank["after"] for rank in ranks] == [[1, 1, 1], [2, 2, 2]]


# -- trust ----------------------------------------------------------------------------------------------------------


class Recipe:
    """A class of one's own in the hyperparameters."""

    def __init__(self, name: str) -> None:
        self.name = name


class Cooks(Linear):
    def __init__(self, recipe: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.global_rank)


def save(folder: Path, module: Any) -> Path:
    checkpoint = ModelCheckpoint(folder / "saved", "last")
    fit(folder, module, elastic(period=10**6), max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True)
    return folder / "saved" / "last.ckpt"


def resumed_apart(ranks: list[dict[str, Any]]) -> bool:
    return not torch.equal(ranks[0]["first"], ranks[1]["first"])


class Goes(Cooks):
    def on_train_start(self) -> None:
        recorded(self)["first"] = self.layer.weight.detach().clone()


@pytest.mark.parametrize("trust", ["argument", "environment", "safe globals"])
def test_trust_in_the_checkpoint_holds_for_its_replica_files(
    tmp_path: Path, trust: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, Goes(Recipe("soup")))
    kwargs: dict[str, Any] = {}
    if trust == "environment":
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    elif trust == "argument":
        kwargs = {"weights_only": False}
    else:
        torch.serialization.add_safe_globals([Recipe])
    own: Any = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, *a, **k: own(self, *a, **k, **kwargs))
    ranks = fit(tmp_path, Goes(Recipe("soup")), elastic(period=10**6), max_epochs=2, ckpt_path=path)
    torch.serialization.clear_safe_globals()
    assert resumed_apart(ranks)


def test_what_is_refused_is_not_called_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Adds(Goes):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.global_rank == 1:
                checkpoint["recipe"] = Recipe("salad")

    path = save(tmp_path, Adds())

    def tell(message: str) -> None:
        (tmp_path / "warnings.txt").open("a").write(message)

    monkeypatch.setattr(saving, "rank_zero_warn", tell)
    ranks = fit(tmp_path, Goes(), elastic(period=10**6), max_epochs=2, ckpt_path=path)
    assert not resumed_apart(ranks)
    text = (tmp_path / "warnings.txt").read_text()
    for expected in ("test_unusual_tensors.Recipe", "add_safe_globals([Recipe])", "weights_only=False"):
        assert expected in text
    assert "torn" not in text


# -- what is trained ------------------------------------------------------------------------------------------------


class Unfreezes(Linear):
    """One rank trains its bias, the other does not, by a flag of its own from the third step on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.change()

    def change(self) -> None:
        self.layer.bias.requires_grad_(self.global_rank == 0)


class Wider(Unfreezes):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(2))

    def change(self) -> None:
        if self.global_rank == 1:
            self.spare = nn.Parameter(torch.zeros(3))


class Renamed(Unfreezes):
    def change(self) -> None:
        if self.global_rank == 1:
            nn.utils.parametrize.register_parametrization(self.layer, "weight", nn.Identity())


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Unfreezes, r"'layer.bias' \(shape \(1,\), torch.float64\) is trained on rank 0 only"),
        (Wider, r"'spare' is shape \(2,\), torch.float32 on rank 0 but shape \(3,\), torch.float32 on rank 1"),
        (Renamed, r"'layer.parametrizations.weight.original' \(.*\) is trained on rank 1 only.*renamed"),
    ],
)
def test_ranks_that_train_other_parameters_are_told_which(
    tmp_path: Path, module: Any, message: str, shared_memory: bool
) -> None:
    with pytest.raises(Exception, match=r"the ranks' trainable parameters differ.*" + message):
        fit(tmp_path, module(), elastic(shared_memory=shared_memory), max_epochs=1)
