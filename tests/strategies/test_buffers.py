"""Which buffers the consensus model has the mean of, and which it takes from rank 0 or leaves to each rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Linear, fit, recorded, regression
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader

from lightning_gossip import DiLoCoStrategy, DownpourStrategy, ElasticGossipStrategy


def elastic(**kwargs: Any) -> ElasticGossipStrategy:
    return ElasticGossipStrategy(start_method="fork", **kwargs)


def loader() -> DataLoader[Any]:
    return DataLoader(regression(), 8)


class Buffers(Linear):
    """Sets its buffers by rank in training; ``validated`` is what validation ran on."""

    def fill(self) -> None:
        """Called at every step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.fill()

    def on_validation_epoch_start(self) -> None:
        recorded(self)["validated"] = {name: b.clone() for name, b in self.named_buffers()}

    def on_validation_end(self) -> None:
        recorded(self)["after"] = {name: b.clone() for name, b in self.named_buffers()}


class Kinds(Buffers):
    averaged_buffers = ("center",)
    mask: Tensor
    bank: Tensor
    scale: Tensor
    center: Tensor
    running_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        for name in ("mask", "bank", "scale", "center"):
            self.register_buffer(name, torch.zeros(2))
        self.register_buffer("running_mean", torch.zeros(2, dtype=torch.int64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.norm(batch[0]), batch[1]), batch_idx)

    def fill(self) -> None:
        for buffer in (self.mask, self.bank, self.scale, self.center, self.running_mean):
            buffer.fill_(1 + 2 * self.global_rank)


def test_running_statistics_and_named_buffers_are_averaged_and_others_are_rank_zeros(tmp_path: Path) -> None:
    ranks = fit(tmp_path, Kinds(), elastic(), max_epochs=1, val=loader(), num_sanity_val_steps=0)
    statistics = torch.stack([rank["after"]["norm.running_mean"] for rank in ranks])
    assert not torch.equal(statistics[0], statistics[1])
    for number, rank in enumerate(ranks):
        validated = rank["validated"]
        for name in ("mask", "bank", "scale", "running_mean"):
            assert validated[name].tolist() == [1, 1], name
            assert rank["after"][name].tolist() == [1 + 2 * number] * 2, name
        assert validated["center"].tolist() == [2, 2]
        torch.testing.assert_close(validated["norm.running_mean"], statistics.mean(0))


@pytest.mark.parametrize("name", ["running_mean", "missing"])
def test_a_name_that_is_no_floating_point_buffer_is_told(tmp_path: Path, name: str) -> None:
    class Wrong(Kinds):
        averaged_buffers = (name,)

    with pytest.raises(Exception, match=f"`averaged_buffers` of Wrong must name.*'{name}' is none"):
        fit(tmp_path, Wrong(), elastic(), max_epochs=1, val=loader())


@pytest.mark.parametrize("how", ["parametrization", "hook"])
def test_under_spectral_norm_the_validated_model_is_sound(tmp_path: Path, how: str) -> None:
    class Spectral(Buffers):
        def __init__(self) -> None:
            super().__init__()
            hidden = nn.Linear(3, 3, dtype=torch.float64)
            norm = parametrizations.spectral_norm if how == "parametrization" else nn.utils.spectral_norm
            self.hidden = norm(hidden)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((self.hidden(batch[0]), batch[1]), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.hidden(batch[0])
            seen = recorded(self)
            seen["largest"] = float(torch.linalg.matrix_norm(self.hidden.weight, 2))
            vectors = [b for name, b in self.named_buffers() if name.endswith(("_u", "_v"))]
            seen["lengths"] = [float(vector.norm()) for vector in vectors]

    ranks = fit(tmp_path, Spectral(), elastic(period=10**6), max_epochs=3, val=loader())
    for rank in ranks:
        assert rank["lengths"] == pytest.approx([1, 1])
        assert 0.9 < rank["largest"] < 1.5


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_grow_unequally_stay_with_each_rank(tmp_path: Path, persistent: bool) -> None:
    class Grows(Buffers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.zeros(0, 3), persistent=persistent)

        def fill(self) -> None:
            self.bank = torch.ones(4 * (self.global_rank + 1), 3)

        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            if "bank" in state_dict:  # the launching process takes rank 0's state over
                self.bank = torch.zeros_like(state_dict["bank"])
            return super().load_state_dict(state_dict, *args, **kwargs)

    handler = logging.FileHandler(tmp_path / "log.txt")
    logging.getLogger("lightning_gossip").addHandler(handler)
    try:
        ranks = fit(tmp_path, Grows(), elastic(), max_epochs=2, val=loader())
    finally:
        logging.getLogger("lightning_gossip").removeHandler(handler)
    assert [len(rank["validated"]["bank"]) for rank in ranks] == [4, 8]
    message = "buffer 'bank' is shape (4, 3), torch.float32 on rank 0 but shape (8, 3), torch.float32 on rank 1"
    assert (tmp_path / "log.txt").read_text().count(message) == 2, "each rank says so once"


def test_what_ddp_is_told_to_ignore_stays_with_each_rank(tmp_path: Path) -> None:
    class Own(Buffers):
        mine: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mine", torch.zeros(2))
            self.head = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self._ddp_params_and_buffers_to_ignore = ["mine", "head"]

        def setup(self, stage: str) -> None:
            self.head.data = torch.full((2 + self.global_rank,), 10.0 * self.global_rank, dtype=torch.float64)

        def fill(self) -> None:
            self.mine.fill_(self.global_rank)

    for strategy in (elastic(), DownpourStrategy(start_method="fork"), DiLoCoStrategy(period=2, start_method="fork")):
        ranks = fit(tmp_path, Own(), strategy, max_epochs=2, val=loader())
        for number, rank in enumerate(ranks):
            assert rank["validated"]["mine"].tolist() == [number] * 2
            assert rank["state"]["mine"].tolist() == [number] * 2
            assert rank["state"]["head"].tolist() == [10.0 * number] * (2 + number)
        assert torch.equal(ranks[0]["state"]["layer.weight"], ranks[1]["state"]["layer.weight"])


class Renames(Buffers):
    """Prunes, or parametrizes, its layer in mid-training, on the ranks that ``on`` names."""

    def __init__(self, how: str, on: tuple[int, ...]) -> None:
        super().__init__()
        self.how, self.on = how, on

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1 and self.global_rank in self.on:
            if self.how == "prune":
                prune.l1_unstructured(self.layer, "weight", amount=1)
            else:
                nn.utils.parametrize.register_parametrization(self.layer, "weight", nn.Identity())


@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_parameters_that_are_renamed_travel_on(tmp_path: Path, how: str) -> None:
    ranks = fit(tmp_path, Renames(how, (0, 1)), elastic(alpha=0.5), max_epochs=3, val=loader())
    name = "layer.weight_orig" if how == "prune" else "layer.parametrizations.weight.original"
    assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name])
    if how == "prune":
        assert ranks[0]["validated"]["layer.weight_mask"].sum() == 2


@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_parameters_that_are_renamed_on_one_rank_are_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(Exception, match=r"parameter 'layer.*missing on rank.*renamed in training"):
        fit(tmp_path, Renames(how, (1,)), elastic(period=10**6), max_epochs=3, val=loader())


def test_a_momentum_encoder_is_averaged_however_it_is_written(tmp_path: Path) -> None:
    """``.data`` and in-place writes leave no trace in a tensor's version."""

    class Momentum(Buffers):
        def __init__(self) -> None:
            super().__init__()
            self.slow = nn.Linear(3, 1, dtype=torch.float64).requires_grad_(False)

        def on_train_batch_end(self, *_: Any) -> None:
            self.slow.weight.data.mul_(0.9).add_(self.layer.weight.data, alpha=0.1)
            self.slow.bias.data.lerp_(self.layer.bias.data, 0.1)

        def on_train_epoch_end(self) -> None:
            recorded(self)["own"] = self.slow.weight.data.clone()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            recorded(self)["slow"] = self.slow.weight.data.clone()

    ranks = fit(tmp_path, Momentum(), elastic(period=10**6), max_epochs=2, val=loader())
    mean = torch.stack([rank["own"] for rank in ranks]).mean(0)
    for rank in ranks:
        torch.testing.assert_close(rank["slow"], mean, rtol=1e-12, atol=1e-12)
