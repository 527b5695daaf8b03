"""Real `Trainer.fit` runs under LocalSGD and DiLoCo that lose ranks, or a replica to NaN, and go on (design §12)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, Recorder, fit, recorded, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_surviving import Fault
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gossip import DiLoCoStrategy, LocalSGDStrategy
from lightning_gossip.strategies import checkpoint as files

pytestmark = pytest.mark.faults

ROUNDS: dict[str, Any] = {"period": 4, "delay": 3}  # 6 steps an epoch of four ranks, 8 of three: rounds cross epochs


def diloco(**options: Any) -> DiLoCoStrategy:
    options = {**ROUNDS, "start_method": "fork", "timeout": timedelta(seconds=60), **options}
    return DiLoCoStrategy(**options)


class Starts(Callback):
    """Records starts and momenta after every epoch, and what the clock counted."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        state = strategy.exchange._state.state_dict()
        kept = state["starts"] | {f"momentum of {name}": value for name, value in state["velocities"].items()}
        recorded(pl_module).setdefault("kept", []).append(kept)
        recorded(pl_module).setdefault("members", []).append(strategy.members)
        recorded(pl_module)["exchanges"] = strategy.exchange.stats.exchanges
        recorded(pl_module)["healed"] = strategy.exchange.stats.healed


def run(folder: Path, strategy: Any, *callbacks: Callback, lost: int = -1, **options: Any) -> list[Any]:
    """Train for four epochs; return what those have seen that are not lost."""
    folder.mkdir(exist_ok=True)
    pl.seed_everything(3, verbose=False)
    if lost >= 0:
        torch.save(None, folder / f"rank_{lost}.pt")
    seen = fit(
        folder,
        options.pop("module", None) or Linear(),
        strategy,
        devices=options.pop("devices", 4),
        train=DataLoader(regression(96), 4),
        val=DataLoader(regression(), 4),
        max_epochs=4,
        callbacks=[Starts(), *callbacks],
        recorder=Recorder(folder),
        **options,
    )
    return [ranks for rank, ranks in enumerate(seen) if rank != lost]


def check_common(survivors: list[Any]) -> None:
    """All have the same starts and momenta after every epoch, one consensus, and one validation loss."""
    for seen in survivors:
        for mine, theirs in zip(seen["kept"], survivors[0]["kept"], strict=True):
            assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
        torch.testing.assert_close(seen["state"], survivors[0]["state"], rtol=0, atol=0)
        assert seen["metrics"] == survivors[0]["metrics"]
        assert seen["exchanges"] == survivors[0]["exchanges"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("rank", [0, 2])
def test_diloco_goes_on_without_a_rank_and_resumes_on_those_that_were_left(tmp_path: Path, rank: int) -> None:
    left = tuple(k for k in range(4) if k != rank)
    saving = ModelCheckpoint(tmp_path / "whole", filename="{epoch}", save_top_k=-1)
    survivors = run(
        tmp_path / "whole",
        diloco(min_replicas=2),
        Fault(rank, hook="on_train_batch_end", batch=2),
        saving,
        lost=rank,
        enable_checkpointing=True,
    )
    assert len(survivors) == 3
    check_common(survivors)
    assert [seen["members"] for seen in survivors] == [[(0, 1, 2, 3), left, left, left]] * 3
    assert survivors[0]["step"] == 6 + 6 + 8 + 8
    assert survivors[0]["exchanges"] >= 4, "of rounds 4, 8, 12 … 28, but for those in which one was lost"
    for after in (2, 3):
        entry = torch.load(tmp_path / "whole" / f"epoch={after}.ckpt", weights_only=True)[files.KEY]
        assert entry["ranks"] == list(left)
    again = run(tmp_path / "again", diloco(), devices=3, ckpt_path=str(tmp_path / "whole" / "epoch=2.ckpt"))
    for seen, other in zip(survivors, again, strict=True):
        torch.testing.assert_close(seen["state"], other["state"], rtol=0, atol=0)
        assert all(torch.equal(value, other["kept"][-1][name]) for name, value in seen["kept"][-1].items())
        assert (seen["step"], seen["exchanges"]) == (other["step"], other["exchanges"])


@pytest.mark.long
def test_where_nobody_is_lost_nothing_changes(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", diloco())
    surviving = run(tmp_path / "surviving", diloco(min_replicas=1))
    for one, other in zip(plain, surviving, strict=True):
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
        assert one["exchanges"] == other["exchanges"] == 5, "and one is in flight"


class Diverging(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and self.global_step == 9 else loss


@pytest.mark.parametrize("strategy", [DiLoCoStrategy, LocalSGDStrategy])
def test_a_replica_that_is_not_finite_goes_back_to_the_start(tmp_path: Path, strategy: Any) -> None:
    options: dict[str, Any] = {**ROUNDS, "start_method": "fork", "nonfinite": "heal", "evaluate": "replica"}
    seen = run(tmp_path, strategy(**options), module=Diverging())
    assert [rank["healed"] for rank in seen] == [0, 1, 0, 0]
    assert all(torch.isfinite(value).all() for rank in seen for value in rank["state"].values())
    assert all(torch.isfinite(value).all() for rank in seen for kept in rank["kept"] for value in kept.values())


def test_a_replica_that_is_not_finite_ends_the_run_by_default(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"NotFinite: .*rank 1"):
        run(tmp_path, diloco(), module=Diverging())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_replicas": 0}, "`min_replicas` must be an integer of at least 1, got 0"),
        ({"lost_after": timedelta(seconds=2)}, "`lost_after` must be more than 2 s, two heartbeats, got 2 s"),
        ({"nonfinite": "ignore"}, "`nonfinite` must be one of None, 'heal', 'error'; got 'ignore'"),
        ({"min_replicas": 2, "process_group_backend": "nccl"}, "`min_replicas` needs gloo"),
    ],
)
@pytest.mark.parametrize("strategy", [DiLoCoStrategy, LocalSGDStrategy])
def test_bad_arguments_are_named(strategy: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**options)


def test_arguments_are_told_for_the_run_s_metadata() -> None:
    told = DiLoCoStrategy(min_replicas=2).hyperparameters
    assert told.items() >= {"min_replicas": 2, "lost_after": 30.0, "nonfinite": "heal"}.items()
    assert LocalSGDStrategy().hyperparameters["nonfinite"] == "error"
