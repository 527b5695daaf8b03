"""What RankTensorBoardLogger writes: each rank's own values, and a record of the run beside them."""

from __future__ import annotations

import json
import pickle
import re
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from curves import AsProcess, Connect, scalars
from lightning.pytorch import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import HashStore
from torch.utils.data import DataLoader, TensorDataset

from lightning_gossip.monitoring import run_folder
from lightning_gossip.monitoring.loggers import RankTensorBoardLogger


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
    as_process: AsProcess, connect: Connect, tmp_path: Path
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


# metadata.json


def test_metadata_holds_the_strategy_and_the_environment(
    as_process: AsProcess, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    store = HashStore()
    logger = RankTensorBoardLogger(tmp_path)
    for rank, host in ((1, "node-b"), (2, "node-a"), (0, "node-a")):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        connect(store, rank, 3)
        group = run_folder.group_store()
        assert group is not None
        run_folder.publish_host(group)
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
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(hyperparameters={"period": 32}), world_size=4)

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
