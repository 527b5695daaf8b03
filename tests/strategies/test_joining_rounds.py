"""Real `Trainer.fit` runs under DiLoCo whose ranks come back: no two ever have different starts (design §10, §12)."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Linear, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_joining import OnceOnly, Pace
from test_surviving import run
from torch import nn
from torch.utils.data import DataLoader

from lightning_gossip import DiLoCoStrategy
from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.strategies import checkpoint as files

pytestmark = pytest.mark.faults


class Deep(Linear):
    """Least squares by more layers than one: as many parts as there are layers can travel at different times."""

    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
        self.layer = nn.Sequential(*hidden, nn.Linear(4, 1, dtype=torch.float64))  # type: ignore[assignment]


def _kept(strategy: Any) -> dict[str, Any]:
    state = strategy.exchange._state.state_dict()
    return {f"{kind} {name}": value for kind in ("starts", "velocities") for name, value in state[kind].items()}


class Witnessed(DiLoCoStrategy):
    """Writes what a donor serves, and what a joiner is when it begins its first step."""

    folder: Path

    def _whole(self) -> dict[str, Any]:
        parameters = {name: p.detach().clone() for name, p in self._module.named_parameters()}
        moments = {
            f"{index} {name}": value.clone()
            for index, state in self.optimizers[0].state_dict()["state"].items()
            for name, value in state.items()
        }
        return {"whole": parameters | _kept(self) | moments, "clock": self.step, "steps": self._module.global_step}

    def state_to_join(self) -> dict[str, Any]:
        state = super().state_to_join()
        torch.save(self._whole() | {"rank": self.global_rank}, self.folder / f"donor_{self.step}.pt")
        return state

    def become_whole(self, control: MemberControl, donor: int) -> None:
        super().become_whole(control, donor)
        torch.save(self._whole() | {"donor": donor}, self.folder / f"joiner_{self.global_rank}.pt")


class Starts(Callback):
    """Records starts and momenta after every step, by the clock."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, Any]] = {}
        self.incarnation = 0
        self.ended, self.longest = 0.0, (0.0, 0)  # seconds between the ends of two steps, and the second's clock

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        strategy: Any = trainer.strategy
        self.kept[strategy.step] = _kept(strategy)
        now = time.monotonic()
        if self.ended:
            self.longest = max(self.longest, (now - self.ended, strategy.step))
        self.ended = now
        self.incarnation = strategy.control.incarnation

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seen = next(callback.seen for callback in trainer.callbacks if hasattr(callback, "seen"))  # type: ignore[attr-defined]
        seen |= {"kept": self.kept, "incarnation": self.incarnation, "longest": self.longest}


def diloco(folder: Path, **options: Any) -> Witnessed:
    options = {"period": 4, "min_replicas": 1, "restarts": 1, "start_method": "fork", **options}
    strategy = Witnessed(timeout=timedelta(seconds=60), lost_after=timedelta(seconds=20), **options)
    strategy.folder = folder
    return strategy


@pytest.mark.long
@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (2, {}),
        (0, {"delay": 3}),
        (2, {"delay": 2, "fragments": 3}),
        (0, {"fragments": 2, "outer_momentum": 0.5, "wire_dtype": "float32"}),
    ],
    ids=["plain", "delay", "delay and fragments", "fragments"],
)
def test_a_rank_that_is_killed_comes_back_with_the_common_start(
    tmp_path: Path, rank: int, options: dict[str, Any]
) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    seen = run(
        tmp_path,
        Starts(),
        Pace(),
        OnceOnly(rank, hook="on_train_batch_end", batch=2),
        saving,
        lost=(),
        strategy=diloco(tmp_path, **options),
        module=Deep(),
        train=DataLoader(regression(480), 4),
        max_epochs=4,
        enable_checkpointing=True,
    )
    assert [ranks["incarnation"] for ranks in seen] == [int(k == rank) for k in range(4)]
    last = max(seen[1]["kept"])
    for other in seen:
        torch.testing.assert_close(other["state"], seen[1]["state"], rtol=0, atol=0)
        assert set(other["members"][-1]) == {0, 1, 2, 3}
        assert max(other["kept"]) == last
        for step, kept in other["kept"].items():
            theirs = seen[1]["kept"][step]
            assert kept.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[name]) for name, value in kept.items()), f"starts differ after {step}"
    joiner = torch.load(tmp_path / f"joiner_{rank}.pt", weights_only=True)
    donor = torch.load(tmp_path / f"donor_{joiner['clock']}.pt", weights_only=True)
    assert joiner["donor"] == donor["rank"] == (1 if rank == 0 else 0)
    assert joiner["steps"] == donor["steps"]
    assert joiner["whole"].keys() == donor["whole"].keys()
    assert all(torch.equal(value, donor["whole"][name]) for name, value in joiner["whole"].items())
    assert min(seen[rank]["kept"]) == joiner["clock"] + 1, "its first step is the one after the snapshot"
    assert len(seen[rank]["kept"]) == last - joiner["clock"], "it makes all steps from there on"
    entry = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)[files.KEY]
    assert sorted(entry["ranks"]) == [0, 1, 2, 3]
