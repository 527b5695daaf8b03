"""RankTensorBoardLogger: one version folder for all ranks, each rank's own curves, whatever started them."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import HashStore
from torch.utils.data import DataLoader, TensorDataset

from lightning_gossip import loggers, run_folder
from lightning_gossip.loggers import RankTensorBoardLogger
from lightning_gossip.run_folder import GroupStore

AsProcess = Callable[..., None]


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> AsProcess:
    """Make this process look like one that has just started as a rank, with the environment that it inherited."""
    monkeypatch.setenv("LIGHTNING_GOSSIP_RUN_FOLDERS", "{}")
    for variable in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PL_GLOBAL_SEED", "SLURM_LOCALID"):
        monkeypatch.delenv(variable, raising=False)

    def become(rank: int) -> None:
        monkeypatch.setattr(run_folder, "_handed_on", {})
        monkeypatch.setattr(loggers, "_constructed", count())
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        monkeypatch.setattr(fabric_rank_zero_only, "rank", rank)
        monkeypatch.setattr(run_folder, "group_store", lambda: None)

    become(0)
    return become


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int, int], None]:
    """Make the present process a rank of a process group, as Lightning does when a training starts."""

    def join(store: Any, rank: int, world_size: int) -> None:
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        monkeypatch.setattr(fabric_rank_zero_only, "rank", rank)
        monkeypatch.setattr(run_folder, "group_store", lambda: GroupStore(store, rank, world_size))

    return join


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) of a tag over all event files of a folder."""
    events = []
    for file in sorted(folder.glob("*tfevents*")):
        reader = EventAccumulator(str(file)).Reload()
        if tag in reader.Tags()["scalars"]:
            events += [(event.step, event.value) for event in reader.Scalars(tag)]
    return sorted(events)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 3})
        self.layer = torch.nn.Linear(3, 1)
        self.example_input_array = torch.zeros(2, 3)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = self(batch[0]).pow(2).mean()
        self.log("loss", loss)
        return loss

    def test_step(self, batch: list[torch.Tensor]) -> None:
        self.log("test_loss", self(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


# One version folder


def test_children_of_the_launching_process_write_to_its_version(as_process: AsProcess, tmp_path: Path) -> None:
    (tmp_path / "run" / "version_4").mkdir(parents=True)
    launching = RankTensorBoardLogger(tmp_path, name="run")
    assert launching.log_dir == str(tmp_path / "run" / "version_5")
    for rank in (1, 2):
        as_process(rank)
        child = RankTensorBoardLogger(tmp_path, name="run")
        assert child.log_dir == launching.log_dir
        assert child.rank_dir == os.path.join(launching.log_dir, f"rank_{rank}")


def test_loggers_of_one_script_do_not_collide(as_process: AsProcess, tmp_path: Path) -> None:
    def script() -> list[str]:
        named = [RankTensorBoardLogger(tmp_path / d, name=n) for d, n in (("a", "x"), ("a", "y"), ("b", "x"))]
        again = RankTensorBoardLogger(tmp_path / "a", name="x")
        return [logger.log_dir for logger in (*named, again)]

    of_rank_zero = script()
    assert [os.path.relpath(folder, tmp_path) for folder in of_rank_zero] == [
        "a/x/version_0",
        "a/y/version_0",
        "b/x/version_0",
        "a/x/version_1",
    ]
    as_process(1)
    assert script() == of_rank_zero


def test_what_an_outer_run_handed_on_is_not_taken_over(as_process: AsProcess, tmp_path: Path) -> None:
    RankTensorBoardLogger(tmp_path / "outer")
    as_process(0)
    inner = RankTensorBoardLogger(tmp_path / "inner")
    as_process(1)
    assert RankTensorBoardLogger(tmp_path / "inner").log_dir == inner.log_dir


def test_a_rank_with_another_save_dir_follows_rank_zero_and_says_so(as_process: AsProcess, tmp_path: Path) -> None:
    first = RankTensorBoardLogger(tmp_path / "12:00:00")
    as_process(1)
    with pytest.warns(UserWarning, match=r"rank 1 was given save_dir=.*12:00:01.*follows rank 0.*12:00:00"):
        second = RankTensorBoardLogger(tmp_path / "12:00:01")
    second.log_metrics({"x": 1.0}, step=0)
    second.save()
    assert scalars(Path(first.log_dir) / "rank_1", "x") == [(0, 1.0)]
    assert not (tmp_path / "12:00:01").exists()


def test_ranks_started_from_outside_learn_the_version_from_the_store(
    as_process: AsProcess, connect: Any, tmp_path: Path
) -> None:
    store = HashStore()
    as_process(0)
    first = RankTensorBoardLogger(tmp_path)
    second_run_of_rank_zero = RankTensorBoardLogger(tmp_path)
    as_process(3)
    os.environ.pop("LIGHTNING_GOSSIP_RUN_FOLDERS")  # the fixture restores it
    follower = RankTensorBoardLogger(tmp_path)
    with pytest.raises(RuntimeError, match="Rank 3 does not know yet which version"):
        _ = follower.version
    connect(store, 0, 4)
    assert (first.version, second_run_of_rank_zero.version) == (0, 1)
    connect(store, 3, 4)
    assert follower.rank_dir == os.path.join(first.log_dir, "rank_3")
    # constructed while connected, as the second run of a script is
    assert RankTensorBoardLogger(tmp_path).log_dir == second_run_of_rank_zero.log_dir


def test_another_machines_launching_process_gives_up_its_own_choice(
    as_process: AsProcess, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk_1" / "lightning_logs" / "version_6").mkdir(parents=True)
    store = HashStore()
    monkeypatch.setenv("DISK", str(tmp_path / "disk_0"))
    first = RankTensorBoardLogger("$DISK")
    connect(store, 0, 8)
    assert first.version == 0
    as_process(0)  # before it is connected, the process takes itself for rank 0
    monkeypatch.setenv("DISK", str(tmp_path / "disk_1"))
    other = RankTensorBoardLogger("$DISK")
    own_choice = tmp_path / "disk_1" / "lightning_logs" / "version_7"
    assert own_choice.is_dir()
    connect(store, 4, 8)
    assert other.rank_dir == str(tmp_path / "disk_1" / "lightning_logs" / "version_0" / "rank_4")
    assert not own_choice.exists()


@pytest.mark.parametrize(("version", "folder"), [(7, "version_7"), ("final", "final")])
def test_a_given_version_is_appended_to(as_process: AsProcess, tmp_path: Path, version: int | str, folder: str) -> None:
    for step in (1, 2):
        as_process(0)
        logger = RankTensorBoardLogger(tmp_path, name="run", version=version)
        logger.log_metrics({"x": 10.0 * step}, step=step)
        logger.finalize("success")
    assert scalars(tmp_path / "run" / folder / "rank_0", "x") == [(1, 10.0), (2, 20.0)]


def test_a_logger_that_was_never_used_leaves_no_folder(as_process: AsProcess, tmp_path: Path) -> None:
    used, unused = RankTensorBoardLogger(tmp_path), RankTensorBoardLogger(tmp_path)
    used.log_metrics({"x": 1.0}, step=0)
    used.finalize("success")
    assert unused.version == 1
    del used, unused
    gc.collect()
    assert [folder.name for folder in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


def test_versions_are_counted_where_the_files_go(
    as_process: AsProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGS", str(tmp_path))
    for name in ("version_2", "version_10", "version_x", "other_11"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "version_99").touch()
    assert RankTensorBoardLogger("$LOGS", name="run").log_dir == str(tmp_path / "run" / "version_11")


# What each rank writes


def test_each_rank_writes_its_own_values(as_process: AsProcess, tmp_path: Path) -> None:
    for rank in range(3):
        as_process(rank)
        logger = RankTensorBoardLogger(tmp_path, prefix="p", version="v")
        logger.log_metrics({"x": torch.tensor(rank + 0.5), "pair": {"a": 1.0, "b": rank}}, step=4)
        logger.log_hyperparams({"lr": 0.1}, {"hp": 1.0})
        logger.finalize("success")
    version = tmp_path / "lightning_logs" / "v"
    assert sorted(entry.name for entry in version.iterdir()) == ["hparams.yaml", "rank_0", "rank_1", "rank_2"]
    assert [scalars(version / f"rank_{rank}", "p-x") for rank in range(3)] == [
        [(4, 0.5)],
        [(4, 1.5)],
        [(4, 2.5)],
    ]
    assert scalars(version / "rank_2" / "p-pair_b", "p-pair") == [(4, 2.0)]
    assert [len(scalars(version / f"rank_{rank}", "p-hp")) for rank in range(3)] == [1, 0, 0]
    assert (version / "hparams.yaml").read_text() == "lr: 0.1\n"


def test_a_metric_that_is_no_scalar_is_refused(as_process: AsProcess, tmp_path: Path) -> None:
    logger = RankTensorBoardLogger(tmp_path)
    for value in ("high", torch.ones(2), None):
        with pytest.raises(ValueError, match="metric 'x' must be a scalar"):
            logger.log_metrics({"x": value}, step=0)
    logger.finalize("failed")


def test_a_pickled_logger_writes_for_the_rank_that_it_reaches(as_process: AsProcess, tmp_path: Path) -> None:
    logger = RankTensorBoardLogger(tmp_path)
    logger.log_metrics({"x": 0.0}, step=0)
    data = pickle.dumps(logger)
    as_process(1)
    copy = pickle.loads(data)
    copy.log_metrics({"x": 1.0}, step=0)
    copy.finalize("success")
    logger_dir = Path(logger.log_dir)
    assert copy.log_dir == logger.log_dir
    assert scalars(logger_dir / "rank_1", "x") == [(0, 1.0)]
    logger.finalize("success")


def test_a_writer_opened_before_the_rank_was_known_is_replaced(
    as_process: AsProcess, connect: Any, tmp_path: Path
) -> None:
    store = HashStore()
    logger = RankTensorBoardLogger(tmp_path)
    connect(store, 0, 2)
    assert logger.experiment.log_dir.endswith("rank_0")
    connect(store, 1, 2)
    assert logger.experiment.log_dir.endswith("rank_1")
    logger.finalize("success")


def test_a_remote_folder_is_written_to(as_process: AsProcess) -> None:
    for rank in (0, 1):
        as_process(rank)
        logger = RankTensorBoardLogger("memory://gossip-logs", name="run")
        logger.log_hyperparams({"lr": 0.1})
        logger.log_metrics({"x": float(rank)}, step=1)
        logger.log_metadata({"world_size": 2})
        logger.finalize("success")
    memory = fsspec.filesystem("memory")
    try:
        files = [name.partition("/version_0/")[2] for name in memory.find("/gossip-logs/run")]
        assert sorted(re.sub(r"events\..*", "events", name) for name in files) == [
            "hparams.yaml",
            "metadata.json",
            "rank_0/events",
            "rank_1/events",
        ]
        as_process(0)
        assert RankTensorBoardLogger("memory://gossip-logs", name="run").version == 1
    finally:
        memory.rm("/gossip-logs", recursive=True)


def test_fit_and_test_of_a_trainer_share_the_folder(as_process: AsProcess, tmp_path: Path) -> None:
    logger = RankTensorBoardLogger(tmp_path, log_graph=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=logger,
        max_steps=3,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = DataLoader(TensorDataset(torch.randn(6, 3)), batch_size=2)
    trainer.fit(Net(), data)
    trainer.test(Net(), data, verbose=False)
    version = tmp_path / "lightning_logs" / "version_0"
    assert trainer.log_dir == str(version)
    assert sorted(entry.name for entry in version.iterdir()) == ["hparams.yaml", "metadata.json", "rank_0"]
    assert len(scalars(version / "rank_0", "loss")) == 3
    assert len(scalars(version / "rank_0", "test_loss")) == 1
    graphs = [EventAccumulator(str(f)).Reload().Tags()["graph"] for f in (version / "rank_0").iterdir()]
    assert any(graphs)
    strategy = json.loads((version / "metadata.json").read_text())["strategy"]
    assert strategy == {"class": "lightning.pytorch.strategies.single_device.SingleDeviceStrategy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_dir": 3}, "`save_dir` must be a path or a URL, got 3"),
        ({"name": 3}, "`name` must be a string or None, got 3"),
        ({"version": -1}, "`version` must be None, an integer of at least 0 or a folder's name, got -1"),
        ({"version": ""}, "`version` must be"),
        ({"version": True}, "`version` must be"),
        ({"prefix": None}, "`prefix` must be a string, got None"),
        ({"max_queue": 0}, "`max_queue` must be an integer of at least 1"),
        ({"flush_secs": "1"}, "`flush_secs` must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankTensorBoardLogger(**{"save_dir": tmp_path, **arguments})
    assert not list(tmp_path.iterdir())


# metadata.json


def test_metadata_holds_the_strategy_and_the_environment(
    as_process: AsProcess, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    store = HashStore()
    logger = RankTensorBoardLogger(tmp_path)
    for rank, host in ((1, "node-b"), (2, "node-a"), (0, "node-a")):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        connect(store, rank, 3)
        run_folder.publish_host(run_folder.group_store())
    arguments = {"alpha": 0.5, "wire_dtype": None}
    before = datetime.now(UTC)
    logger.log_metadata({"world_size": 3, "strategy": {"class": "x.Gossip", "arguments": arguments}})
    record = json.loads((tmp_path / "lightning_logs" / "version_0" / "metadata.json").read_text())
    assert datetime.fromisoformat(record.pop("start_time")) < before
    versions = record.pop("versions")
    assert versions["torch"] == torch.__version__
    assert set(versions) == {"python", "torch", "lightning", "lightning_gossip"}
    assert record == {
        "world_size": 3,
        "strategy": {"class": "x.Gossip", "arguments": arguments},
        "seed": 12,
        "hosts": ["node-a", "node-b"],
    }


def test_metadata_reads_the_strategys_hyperparameters(as_process: AsProcess, tmp_path: Path) -> None:
    class Attached(Net):
        trainer = SimpleNamespace(strategy=SimpleNamespace(hyperparameters={"period": 32}), world_size=4)

    logger = RankTensorBoardLogger(tmp_path)
    logger.log_graph(Attached())
    record = run_folder.read_metadata(logger.log_dir)
    assert record["strategy"] == {"class": "types.SimpleNamespace", "arguments": {"period": 32}}
    assert record["world_size"] == 4


def test_only_rank_zero_and_the_first_rank_of_another_disk_write_metadata(
    as_process: AsProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lightning_logs" / "v" / "metadata.json"
    as_process(1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    RankTensorBoardLogger(tmp_path, version="v").log_metadata({"by": 1})
    assert not file.exists()
    as_process(4)
    monkeypatch.setenv("LOCAL_RANK", "0")
    RankTensorBoardLogger(tmp_path, version="v").log_metadata({"by": 4})
    assert json.loads(file.read_text())["by"] == 4
    file.write_text('{"by": 0}')
    RankTensorBoardLogger(tmp_path, version="v").log_metadata({"by": 4})
    assert json.loads(file.read_text())["by"] == 0


def test_a_resumed_run_keeps_the_record_of_its_first_start(as_process: AsProcess, tmp_path: Path) -> None:
    for alpha in (0.1, 0.2, 0.3):
        logger = RankTensorBoardLogger(tmp_path, version=0)
        logger.log_metadata({"alpha": alpha})
        logger.log_metadata({"stage": "test"})
    record = run_folder.read_metadata(logger.log_dir)
    assert (record["alpha"], record["stage"]) == (0.3, "test")
    assert [earlier["alpha"] for earlier in record["earlier"]] == [0.1, 0.2]
    starts = [*(earlier["start_time"] for earlier in record["earlier"]), record["start_time"]]
    assert starts == sorted(set(starts))
