"""The byte-level GPT: its network, its text, and runs from the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fake_images import EXAMPLES
from processes import run_program

sys.path.insert(0, str(EXAMPLES))

import command_line
import text_data
from language_model import GPT, SIZES, LanguageModel
from shares import make_sampler


@pytest.mark.parametrize(("name", "millions"), [("nano", 0.17), ("micro", 0.84), ("small", 4.9)])
def test_sizes_are_what_they_say(name: str, millions: float) -> None:
    network = GPT(SIZES[name])
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_byte_is_told_from_those_before_it_alone() -> None:
    torch.manual_seed(0)
    network = GPT(SIZES["nano"])
    data = torch.randint(256, (2, 64))
    other = data.clone()
    other[:, 40] = (other[:, 40] + 1) % 256
    one, two = network(data), network(other)
    assert one.shape == (2, 64, 256)
    torch.testing.assert_close(one[:, :40], two[:, :40])
    assert (one[:, 40:] - two[:, 40:]).abs().amax(dim=(0, 2)).min() > 1e-4, "all that follow see it"


def test_the_first_and_the_last_layer_are_one() -> None:
    network = GPT(SIZES["nano"])
    assert sum(p.shape[0] == 256 for p in network.parameters() if p.dim() == 2 and p.shape[1] == 64) == 3 + 1
    loss = torch.nn.functional.cross_entropy(
        network(torch.randint(256, (8, 64))).flatten(0, 1), torch.zeros(512).long()
    )
    assert float(loss.detach()) == pytest.approx(math.log(256), abs=0.3), "it knows nothing yet"
    loss.backward()
    assert network.embedding.weight.grad is not None
    assert (network.embedding.weight.grad.abs().sum(dim=1) > 0).all(), "bytes that it did not read too"


def books(folder: Path, count: int = 40) -> Path:
    """Of three words in random order: 0.2 nats a byte are in them, and letters by themselves have 2.6."""
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, size=5, dtype=np.uint8)) for _ in range(3)]
    for number in range(count):
        text = b" ".join(words[k] for k in generator.integers(3, size=1000))
        (folder / f"{number:02}.txt").write_bytes(text)
    (folder / "image.bin").write_bytes(bytes(100))
    return folder


def data_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> text_data.TextData:
    monkeypatch.setattr(text_data.corpus, "__defaults__", (folder / "cache",))
    args = {"data_dir": folder / "books", "text_bytes": None, "batch_size": 8, "data_shares": "fixed", "seed": 0}
    (folder / "books").mkdir(exist_ok=True)
    books(folder / "books")
    data = text_data.TextData(Namespace(**(args | options)), context=64)
    data.setup("fit")
    return data


def test_text_is_mapped_and_every_window_is_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(tmp_path, monkeypatch)
    assert isinstance(data.data, np.memmap)
    whole = b"".join(path.read_bytes() for path in sorted((tmp_path / "books").glob("*.txt")))
    assert data.data.tobytes() == whole
    windows = torch.cat(data.split)
    assert windows.sort().values.tolist() == list(range((len(whole) - 1) // 64))
    assert len(data.split.validation) == pytest.approx(len(windows) / 20, rel=0.2)
    inputs, following = next(iter(data.val_dataloader()))
    begin = int(data.split.validation[0]) * 64
    assert bytes(inputs[0].tolist()) == whole[begin : begin + 64]
    assert bytes(following[0].tolist()) == whole[begin + 1 : begin + 65]
    limited = data_of(tmp_path, monkeypatch, text_bytes=5000)
    assert limited.data.tobytes() == whole[:5000]


def test_the_standard_library_is_there_by_default() -> None:
    files = text_data.source_files(None)
    assert len(files) > 100
    assert all(path.suffix == ".py" and "site-packages" not in path.parts for path in files)


def test_contiguous_shares_are_disjoint_stretches() -> None:
    samplers = [make_sampler("contiguous", torch.empty(103), rank, 4, 0) for rank in range(4)]
    for rank, sampler in enumerate(samplers):
        assert sorted(sampler) == list(range(25 * rank, 25 * (rank + 1)))
        assert list(sampler) != sorted(sampler), "in an order of its own"


def test_a_text_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(text_data.DataNotFoundError, match="there is no text in"):
        text_data.source_files(tmp_path)


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pl.seed_everything(0, verbose=False)
    data = data_of(tmp_path, monkeypatch)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=150,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = LanguageModel(SIZES["nano"], lr=3e-3)
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    assert tested["test_loss"] < 1.0
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-4, rel=0.05), "the cosine's end"


def strategy_of(*options: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["example.py", *options])
    return command_line.parse(command_line.make_parser("An example.")).strategy_object


def test_outer_steps_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = ("--period", "32", "--delay", "5")
    diloco = strategy_of("--strategy", "diloco", "--fragments", "4", *rounds, monkeypatch=monkeypatch)
    assert (
        diloco.hyperparameters.items() >= {"outer_lr": 0.7, "outer_momentum": 0.9, "fragments": 4, "period": 32}.items()
    )
    local = strategy_of("--strategy", "local-sgd", *rounds, monkeypatch=monkeypatch)
    assert local.hyperparameters.items() >= {"period": 32, "delay": 5, "evaluate": "replica"}.items()
    gossip = strategy_of("--outer-lr", "0.5", "--outer-momentum", "0.8", *rounds, monkeypatch=monkeypatch)
    assert gossip.hyperparameters.items() >= {"outer_lr": 0.5, "outer_momentum": 0.8, "alpha": 0.5}.items()
    assert strategy_of(monkeypatch=monkeypatch).outer is None


@pytest.mark.parametrize(
    ("strategy", "as_a_user"),
    [
        ("diloco", False),
        pytest.param("diloco", True, marks=pytest.mark.long),
        pytest.param("elastic-gossip", True, marks=pytest.mark.long),
    ],
)
def test_a_run_from_the_command_line(
    tmp_path: Path, strategy: str, as_a_user: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / ".cache" / "lightning-gossip"
    monkeypatch.setattr(text_data.corpus, "__defaults__", (cache,))  # this process' home is the user's
    (tmp_path / "books").mkdir()
    books(tmp_path / "books")
    arguments = f"--devices 2 --batch-size 16 --strategy {strategy} --outer-momentum 0.9 --period 25"
    arguments += f" --data-dir {tmp_path}/books --log-dir {tmp_path}/logs --summary {tmp_path}/summary.json"
    program, environment = EXAMPLES / "gpt.py", {"HOME": str(tmp_path), "PYTHONPATH": f"{EXAMPLES.parent}"}
    if as_a_user:
        command = [sys.executable, str(program), *arguments.split()]
        whole = os.environ | environment
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=whole, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        printed = done.stdout
    else:
        printed = "\n".join(run_program(tmp_path, program, arguments.split(), 2, **environment))
    assert "val_loss" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["strategy_arguments"]["outer_momentum"] == 0.9
    assert max(summary["test_loss"]) < 1.0
    assert summary["consensus_test_loss"] < 1.0
    rounds = summary["updates"] // 25
    parameters = 4 * sum(p.numel() for p in GPT(SIZES["nano"]).parameters())
    assert summary["bytes_sent_per_rank"] == pytest.approx(rounds * parameters, rel=0.01), "two ranks send N each"
    assert list(cache.glob("text-*.bin"))
