"""GossipMonitor in real `Trainer.fit` runs: what it logs is what the ranks saw, and costs no message."""

from __future__ import annotations

import csv
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from curves import scalars
from forked import Linear, Recorder, fit, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader
from witness import Memory, Model, Witness, logged

from lightning_gossip import ElasticGossipStrategy, GossipMonitor, GossipStrategy, RankTensorBoardLogger
from lightning_gossip.monitoring import run_folder

LAUNCH: dict[str, Any] = {"start_method": "fork", "timeout": timedelta(seconds=30)}
STEP_TAGS = {f"gossip/{name}" for name in ("exchanges", "bytes_sent", "wait_seconds", "mix_seconds", "partner")}
PAYLOAD = 64  # bytes: 4 float64, padded to a cache line


@pytest.fixture(autouse=True)
def _run_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_GOSSIP_RUN_FOLDERS", "{}")
    monkeypatch.setattr(run_folder, "_handed_on", {})


def consensus_distance(replicas: list[np.ndarray]) -> float:
    mean = np.mean(replicas, axis=0)
    return float(np.sqrt(np.mean([np.sum((x - mean) ** 2) for x in replicas])) / np.linalg.norm(mean))


def partners(strategy: Any, step: int, rank: int, world_size: int) -> list[int]:
    choices = strategy.schedule.choices(step, world_size).tolist()
    return sorted({choices[rank], *(k for k in range(world_size) if choices[k] == rank)} - {-1})


@pytest.mark.parametrize("shared_memory", [True, False])
def test_every_rank_of_a_run_logs_what_it_saw_and_no_message_more(tmp_path: Path, shared_memory: bool) -> None:
    strategy = ElasticGossipStrategy(alpha=0.3, peers="uniform", seed=4, shared_memory=shared_memory, **LAUNCH)
    ranks = fit(
        tmp_path,
        Model(),
        strategy,
        devices=4,
        max_epochs=4,
        val=DataLoader(regression(), 12),
        recorder=Witness(tmp_path),
        callbacks=[GossipMonitor(every_n_steps=2)],
        logger=RankTensorBoardLogger(tmp_path, name="run"),
        log_every_n_steps=1,
    )
    version = tmp_path / "run" / "version_0"
    assert [entry.name for entry in version.parent.iterdir()] == ["version_0"]
    folders = sorted(entry.name for entry in version.iterdir() if entry.is_dir())
    assert folders == [f"rank_{rank}" for rank in range(4)]
    for rank, seen in enumerate(ranks):
        folder = version / f"rank_{rank}"
        stats = seen["stats"]
        assert len(stats) == 12
        assert scalars(folder, "loss") == list(enumerate(map(np.float32, seen["loss"])))
        for tag in STEP_TAGS:
            values = [step[tag.removeprefix("gossip/")] for step in stats]
            if tag.endswith("_seconds"):  # averaged over the two steps since they were logged
                values = [(before + now) / 2 for before, now in zip([0, *values], values, strict=False)]
            of_the_process = [np.float32(values[i]) for i in range(1, 12, 2)]
            assert scalars(folder, tag) == list(zip(range(1, 12, 2), of_the_process, strict=True)), tag

        every = [partners(strategy, step, rank, 4) for step in range(1, 13)]
        assert stats[-1]["bytes_sent"] == PAYLOAD * sum(map(len, every))
        assert [s["partner"] for s in stats] == [min(found, default=-1) for found in every]

        distances = scalars(folder, "gossip/partner_distance")
        snapshots = [np.array(other["snapshots"]) for other in ranks]
        assert [step for step, _ in distances] == [1, 3, 5, 7, 9, 11]
        for step, value in distances:
            own = snapshots[rank][step]
            each = [np.linalg.norm(own - snapshots[k][step]) / np.linalg.norm(own) for k in every[step]]
            assert value == pytest.approx(np.mean(each), rel=1e-6)

        direct = [consensus_distance([other["at_consensus"][i] for other in ranks]) for i in range(1, 6)]
        # the sanity check comes first; the end has the abscissa of the last validation
        assert scalars(folder, "gossip/consensus_distance") == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in zip((2, 5, 8, 11, 11), direct, strict=True)
        ]
        assert [step for step, _ in scalars(folder, "val_loss")] == [2, 5, 8, 11]

        met = len(set().union(*map(set, every)))
        headers, payloads = (seen["calls_in_steps"].pop(name, 0) for name in ("send", "swap"))
        assert payloads == (0 if shared_memory else sum(map(len, every)))
        assert headers == payloads + 2 * met, "a message a payload, and two to get to know a partner"
        assert not seen["calls_in_steps"], "no collective in a step"
        assert seen["shown"] == {
            "partner_distance": pytest.approx(distances[-1][1], rel=1e-6),
            "exchanges": stats[-1]["exchanges"],
        }
        assert set(seen["metrics"]) == {"loss", "val_loss"}


def test_a_partner_that_is_slowed_makes_waiting_grow_by_what_was_added(tmp_path: Path) -> None:
    class Slow(Callback):
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_rank == 1:
                time.sleep(self.seconds)

    def waited_and_mixed(late: float) -> list[list[np.ndarray]]:
        folder = tmp_path / str(late)
        folder.mkdir()
        callbacks = [Slow(late), GossipMonitor(every_n_steps=1)]
        options: dict[str, Any] = {"recorder": Witness(folder), "logger": Memory(), "max_steps": 9, "max_epochs": -1}
        ranks = fit(folder, Model(), ElasticGossipStrategy(**LAUNCH), callbacks=callbacks, **options)
        tags = ("gossip/wait_seconds", "gossip/mix_seconds")
        # without the first step, which makes the link
        return [[np.array([value for _, value in logged(rank, tag)[1:]]) for tag in tags] for rank in ranks]

    (wait, mix), (wait_of_late, _) = waited_and_mixed(0.0)
    (slowed, slowed_mix), (slowed_of_late, _) = waited_and_mixed(0.12)
    assert len(wait) == len(slowed) == 8
    assert slowed.sum() - wait.sum() == pytest.approx(8 * 0.12, rel=0.25)
    assert np.median(slowed) - np.median(wait) == pytest.approx(0.12, rel=0.25)
    assert slowed_of_late.sum() - wait_of_late.sum() < 0.12, "who is late waits for nobody"
    assert abs(slowed_mix.sum() - mix.sum()) < 0.12, "waiting is no part of mixing"


def test_rare_rounds_are_reported_when_they_happen_and_totals_at_the_end(tmp_path: Path) -> None:
    strategy = GossipStrategy(variant="push", period=5, delay=1, seed=1, **LAUNCH)
    [first, _] = fit(
        tmp_path,
        Model(),
        strategy,
        max_epochs=5,
        train=DataLoader(regression(), 4),
        recorder=Witness(tmp_path),
        callbacks=[GossipMonitor(every_n_steps=8)],
        logger=Memory(),
    )
    # 30 steps; due at 8, 16, 24; posted at 5, 10, …, 30 and applied a step later, the last one at the end
    assert [step + 1 for step, _ in logged(first, "gossip/partner_distance")] == [11, 16, 26]
    measured = [i + 1 for i, stats in enumerate(first["stats"]) if stats["partner_distance"] is not None]
    assert measured == [11, 16, 26]
    assert logged(first, "gossip/exchanges") == [(7, 1), (15, 3), (23, 4), (29, 6)]
    assert logged(first, "gossip/bytes_sent") == [(7, PAYLOAD), (15, 3 * PAYLOAD), (23, 4 * PAYLOAD), (29, 6 * PAYLOAD)]
    assert [step for step, _ in logged(first, "gossip/partner")] == [7, 15, 23]


def test_the_abscissa_is_that_of_lightnings_own_metrics(tmp_path: Path) -> None:
    [first, _] = fit(
        tmp_path,
        Model(),
        ElasticGossipStrategy(evaluate="replica", **LAUNCH),
        max_epochs=2,
        train=DataLoader(regression(), 2),
        accumulate_grad_batches=3,
        enable_checkpointing=True,
        recorder=Witness(tmp_path),
        callbacks=[GossipMonitor(every_n_steps=1), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)],
        logger=Memory(),
        log_every_n_steps=1,
    )
    # 12 batches an epoch: 4 windows
    for tag in ("loss", "gossip/partner_distance", *STEP_TAGS):
        assert [step for step, _ in logged(first, tag)] == list(range(8)), tag
    assert [value for _, value in logged(first, "gossip/exchanges")] == list(range(1, 9))
    # validation runs on replicas, and they remain: the consensus model is built for checkpoints only
    distances = logged(first, "gossip/consensus_distance")
    assert [step for step, _ in distances] == [2, 5]
    assert all(0 < value < 1 for _, value in distances)


def test_lightnings_loggers_get_the_tags_on_rank_0(tmp_path: Path) -> None:
    fit(
        tmp_path,
        Model(),
        GossipStrategy(wire_dtype=torch.bfloat16, **LAUNCH),
        max_epochs=1,
        val=DataLoader(regression(), 24),
        callbacks=[GossipMonitor(every_n_steps=2)],
        logger=[CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")],
    )
    tags = STEP_TAGS | {"gossip/partner_distance", "gossip/consensus_distance"}
    [file] = (tmp_path / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    assert tags <= set(rows[0])
    assert [(row["step"], row["gossip/bytes_sent"]) for row in rows if row["gossip/bytes_sent"]] == [
        (str(step), str(64 * (step + 1))) for step in (1, 3, 5)
    ]
    folder = tmp_path / "tensorboard" / "version_0"
    assert {tag: len(scalars(folder, tag)) for tag in tags} == dict.fromkeys(tags, 3) | {"gossip/consensus_distance": 2}


@dataclass
class ServerStats:
    """As the parameter server's client counts."""

    pushes: int = 3
    pulls: int = 2
    bytes_sent: int = 640
    wait_seconds: float = 0.25
    staleness: int | None = None


class Served(ElasticGossipStrategy):
    """Stands for a strategy with a parameter server and no exchanges."""

    exchange = None

    @property
    def downpour_stats(self) -> ServerStats:
        return ServerStats(pushes=3 * self.step, staleness=None if self.step < 4 else 7)


def test_a_parameter_servers_counts_are_logged_under_its_own_tags(tmp_path: Path) -> None:
    logger = Memory()

    class Keep(Recorder):
        def on_fit_end(self, *args: Any) -> None:
            self.seen["logged"] = logger.logged
            super().on_fit_end(*args)

    options: dict[str, Any] = {
        "recorder": Keep(tmp_path),
        "logger": logger,
        "callbacks": [GossipMonitor(every_n_steps=2)],
    }
    [alone] = fit(tmp_path, Linear(), Served(**LAUNCH), devices=1, max_steps=5, **options)
    others = {"downpour/pulls": 2, "downpour/bytes_sent": 640}
    wait = {"downpour/wait_seconds": 0.25}
    assert [(step, m) for step, m in alone["logged"] if "downpour/pulls" in m] == [
        (1, {"downpour/pushes": 6, **others, **wait}),
        (3, {"downpour/pushes": 12, **others, **wait, "downpour/staleness": 7}),
        (4, {"downpour/pushes": 15, **others}),
    ]
    assert not any(tag.startswith("gossip/") and "consensus" not in tag for _, m in alone["logged"] for tag in m)


def test_other_strategies_get_one_warning_and_nothing_logged(tmp_path: Path) -> None:
    logger, monitor = Memory(), GossipMonitor(every_n_steps=1)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": logger,
        "callbacks": [monitor],
        "max_epochs": 1,
    }
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    data = DataLoader(regression(), 12)
    trainer = pl.Trainer(**options, **quiet, default_root_dir=tmp_path, num_sanity_val_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Linear(), data, data)
        trainer.test(Linear(), data, verbose=False)
    [message] = [str(w.message) for w in caught if "GossipMonitor" in str(w.message)]
    assert message.startswith("GossipMonitor logs nothing with SingleDeviceStrategy: ")
    assert {tag for _, metrics in logger.logged for tag in metrics} <= {"val_loss", "test_loss", "epoch"}


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "50", None])
def test_a_bad_interval_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`every_n_steps` must be an integer of at least 1, got "):
        GossipMonitor(every_n_steps=value)
