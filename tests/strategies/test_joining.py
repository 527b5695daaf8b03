"""Real `Trainer.fit` runs whose ranks come back (design §10)."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from curves import scalars
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_surviving import Fault, History, run, stop_for, surviving
from torch import Tensor, nn
from torch.utils.data import DataLoader
from waiting import until

from lightning_gossip import ElasticGossipStrategy, GossipMonitor, GossipStrategy, RankTensorBoardLogger
from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.member_control import OVER
from lightning_gossip.monitoring import run_folder
from lightning_gossip.strategies import returning
from lightning_gossip.transport import handover

pytestmark = pytest.mark.faults


class Pace(Callback):
    """Lets a step take its time."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


class OnceOnly(Fault):
    """A fault that hits the first process of a rank only."""

    def _hook(self, trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        strategy: Any = trainer.strategy
        if strategy.control.incarnation == 0:
            super()._hook(trainer, *arguments, **named)


class Rich(pl.LightningModule):
    """BatchNorm, AdamW, and a schedule by steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x).squeeze(1), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.layers(x).squeeze(1), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=40, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def snapshot(trainer: pl.Trainer) -> dict[str, Any]:
    """All of a rank's state that training changes."""
    loop: Any = trainer.fit_loop
    return {
        "module": {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()},
        "optimizers": [_cloned(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [dict(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "steps": (
            trainer.global_step,
            loop.epoch_progress.current.processed,
            loop.epoch_loop.batch_progress.total.ready,
        ),
    }


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return [_cloned(item) for item in value] if isinstance(value, list) else value


class Snapshots(History):
    """Records what a donor gave, and with what a joiner begins."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen |= {"given": None, "began": None, "seconds": None}
        self.born = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        if strategy.control.incarnation:
            self.seen["began"] = snapshot(trainer)
            self.seen["donor"] = strategy._joiner.donor
            return
        served = strategy._donor.serve

        def serve(guest: Any, step: int, state: Any) -> None:
            self.seen["given"] = snapshot(trainer)
            served(guest, step, state)

        strategy._donor.serve = serve


CASES: dict[str, Any] = {
    "elastic": lambda **o: ElasticGossipStrategy(**o),
    "elastic, delayed": lambda **o: ElasticGossipStrategy(period=3, delay=2, **o),
    "elastic, outer step": lambda **o: ElasticGossipStrategy(period=2, outer_lr=0.7, outer_momentum=0.9, **o),
    "asynchronous": lambda **o: ElasticGossipStrategy(asynchronous=True, **o),
    "pull over links": lambda **o: GossipStrategy("pull", shared_memory=False, **o),
}


@pytest.mark.parametrize(
    ("rank", "case"),
    [
        (0, "elastic"),
        *(
            pytest.param(2, case, marks=pytest.mark.long)
            for case in ("elastic", "elastic, delayed", "elastic, outer step", "pull over links", "asynchronous")
        ),
    ],
)
def test_a_rank_that_is_killed_comes_back_as_its_donor_is(
    tmp_path: Path, rank: int, case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_handed_on", {})
    options = {"start_method": "fork", "timeout": timedelta(seconds=60), "min_replicas": 1, "restarts": 1}
    strategy = CASES[case](lost_after=timedelta(seconds=20), **options)
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True, every_n_epochs=1)
    with caplog.at_level(logging.WARNING):
        seen = fit(
            tmp_path,
            Rich(),
            strategy,
            devices=4,
            train=DataLoader(regression(480), 4),
            val=DataLoader(regression(), 4),
            max_epochs=4,
            enable_checkpointing=True,
            log_every_n_steps=1,
            logger=RankTensorBoardLogger(tmp_path, name="run"),
            callbacks=[Pace(), OnceOnly(rank, hook="on_train_batch_end", batch=2), GossipMonitor(1), saver],
            recorder=Snapshots(tmp_path),
        )
    joiner = seen[rank]
    donor = seen[joiner["donor"]]
    assert donor["given"] is not None
    assert joiner["donor"] == (1 if rank == 0 else 0)
    torch.testing.assert_close(joiner["began"], donor["given"], rtol=0, atol=0)
    for other in seen:
        torch.testing.assert_close(other["state"], seen[0]["state"], rtol=0, atol=0)
        assert set(other["members"][-1]) == {0, 1, 2, 3}
        assert other["zero"][-1] == (other is donor), "duties stay with who has them"
        assert other["losses"][-1] == seen[0]["losses"][-1]
    assert f"rank {rank} joined at step" in "".join(donor["changes"])
    curve = scalars(tmp_path / "run" / "version_0" / f"rank_{rank}", "train_loss")
    steps = [step for step, _ in curve]
    assert steps == sorted(steps), "one curve goes on"
    lost = [value for _, value in scalars(tmp_path / "run" / "version_0" / f"rank_{joiner['donor']}", "gossip/members")]
    assert (min(lost), lost[-1]) == (3, 4)
    if case == "elastic":
        caplog.clear()
        again = fit(
            tmp_path,
            Rich(),
            CASES[case](lost_after=timedelta(seconds=20), **options),
            devices=4,
            train=DataLoader(regression(480), 4),
            max_epochs=5,
            ckpt_path=tmp_path / "saved" / "last.ckpt",
            recorder=Recorder(tmp_path),
        )
        assert "not from their replicas" not in caplog.text, "it resumes on four"
        assert {other["step"] for other in again} == {again[0]["step"]}
        assert again[0]["step"] >= joiner["step"] + 30


@pytest.mark.long
def test_who_was_declared_lost_joins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fault = OnceOnly(2, hook="on_train_batch_end", batch=2, act=stop_for(6))
    with caplog.at_level(logging.WARNING):
        seen = run(
            tmp_path,
            Pace(0.1),
            fault,
            lost=(),
            strategy=surviving(lost_after=3),
            train=DataLoader(regression(960), 4),
            max_epochs=3,
        )
    assert len(seen) == 4
    for other in seen:
        torch.testing.assert_close(other["state"], seen[0]["state"], rtol=0, atol=0)
    assert set(seen[0]["members"][-1]) == {0, 1, 2, 3}
    changes = seen[0]["changes"]
    assert [change.split(" at ")[0] for change in changes] == ["rank 2 lost", "rank 2 joining", "rank 2 joined"]


class Declares(Callback):
    """Rank 0 declares rank 2 lost, as often as that is there; rank 2 notes what it holds whenever it has joined.

    Args:
        folder: for the notes.
        often: how often; then all end.
    """

    def __init__(self, folder: Path, often: int = 1) -> None:
        self.notes, self.often = folder / "descriptors", often
        self.noted = set[int]()

    def held(self) -> list[int]:
        return [int(line) for line in self.notes.read_text().split()] if self.notes.exists() else []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        control: Any = trainer.strategy.control  # type: ignore[attr-defined]
        if trainer.global_rank == 2 and control.incarnation not in self.noted:
            self.noted.add(control.incarnation)
            with self.notes.open("a") as file:
                file.write(f"{len(os.listdir('/proc/self/fd'))}\n")
        if trainer.global_rank == 0 and trainer.global_step % 10 == 5 and 2 in control.members:
            trainer.should_stop = len(self.held()) > self.often
            if not trainer.should_stop:
                control.declare_lost(2, "a test said so")


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.long)])
def test_one_that_is_lost_and_joins_again_and_again_holds_no_more_each_time(tmp_path: Path, asynchronous: bool) -> None:
    declares = Declares(tmp_path, often=3)
    strategy = surviving(asynchronous=asynchronous)
    run(
        tmp_path,
        Pace(0.02),
        declares,
        lost=(2,),  # it may be on its way once more when the others end
        strategy=strategy,
        train=DataLoader(regression(960), 4),
        max_epochs=40,
    )
    first, *later = declares.held()
    assert len(later) >= 3
    # connections to the run's store, and what links go over: eight or nine each time, if it kept them
    assert max(later) <= first + 6


def test_who_comes_while_the_others_end_is_told_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 has its seat already when the others tell that training is over."""

    def claiming(store: Any, *args: Any) -> int:
        if (incarnation := claim_seat(store, *args)) > 0:
            until(lambda: bool(store.check([OVER])), seconds=60)
        return incarnation

    monkeypatch.setattr(returning, "claim_seat", claiming)
    run(tmp_path, Declares(tmp_path), lost=(2,), max_epochs=2)
    assert "rank 2: the training is over; no checkpoint was saved" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_start"])
def test_the_first_rank_comes_back_whenever_it_was_lost_before_its_first_step(tmp_path: Path, hook: str) -> None:
    """What those that join have to know is told by whoever is left."""
    fault = OnceOnly(0, hook=hook, epoch=0)
    seen = run(tmp_path, Pace(), fault, lost=(), strategy=surviving(restarts=1), train=DataLoader(regression(960), 4))
    assert len(seen) == 4
    for other in seen:
        torch.testing.assert_close(other["state"], seen[0]["state"], rtol=0, atol=0)
        assert set(other["members"][-1]) == {0, 1, 2, 3}
    assert [change.split(" at ")[0] for change in seen[1]["changes"]] == [
        "rank 0 lost",
        "rank 0 joining",
        "rank 0 joined",
    ]


@pytest.mark.long
def test_who_comes_when_the_others_are_through_is_told_so_whoever_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 2 sleeps while the others come to the end, at which rank 0 is lost before it tells."""
    asleep = Fault(2, hook="on_train_batch_end", batch=2, act=stop_for(12))
    killed = Fault(0, hook="on_train_end", epoch=4)
    run(tmp_path, asleep, killed, lost=(0, 2), strategy=surviving(lost_after=3))
    assert "rank 2: the training is over; no checkpoint was saved" in capfd.readouterr().err


@pytest.mark.long
def test_a_torn_state_is_asked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, sent = handover._packed, tmp_path / "sent"

    def tearing(state: Any) -> Tensor:
        payload = packed(state)
        if not sent.exists():
            sent.touch()
            monkeypatch.setattr(handover, "_checksum", lambda _: 7)
        else:
            monkeypatch.undo()
        return payload

    monkeypatch.setattr(handover, "_packed", tearing)
    with caplog.at_level(logging.WARNING):
        seen = run(
            tmp_path,
            Pace(),
            OnceOnly(2, hook="on_train_batch_end", batch=2),
            lost=(),
            strategy=surviving(restarts=1),
            train=DataLoader(regression(480), 4),
        )
    changes = [change.split(" at ")[0] for change in seen[0]["changes"]]
    assert changes == ["rank 2 lost", "rank 2 joining", "rank 2 left", "rank 2 joining", "rank 2 joined"]


class Wider(Linear):
    """Another model in a process that comes back."""

    def setup(self, stage: str) -> None:
        strategy: Any = self.trainer.strategy
        if strategy.control.incarnation:
            self.more = nn.Linear(3, 2)


@pytest.mark.long
def test_who_would_train_another_model_is_told_and_ends_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fault = OnceOnly(2, hook="on_train_batch_end", batch=2)
    with caplog.at_level(logging.WARNING):
        seen = run(
            tmp_path,
            Pace(),
            fault,
            lost=(2,),
            strategy=surviving(restarts=1),
            module=Wider(),
            train=DataLoader(regression(240), 4),
        )
    assert [set(other["members"][-1]) for other in seen] == [{0, 1, 3}] * 3
    assert "rank 2 can not join: it differs from those that train. parameter 'more.weight' is" in caplog.text


def test_bad_restarts_are_named() -> None:
    with pytest.raises(ValueError, match="`restarts` must be an integer of at least 0, got -1"):
        surviving(restarts=-1)
    with pytest.raises(ValueError, match="`restarts` must be 0 without `min_replicas`, got 2"):
        ElasticGossipStrategy(restarts=2)
