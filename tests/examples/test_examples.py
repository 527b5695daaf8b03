"""The examples' command line, networks, augmentation and reports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from curves import scalars
from fake_images import EXAMPLES, idx_files
from torch import nn
from torchvision.transforms.functional import crop, hflip, normalize, pad

sys.path.insert(0, str(EXAMPLES))

import cifar10
import command_line
import iris
import mnist
import models
import training


def parsed(monkeypatch: pytest.MonkeyPatch, *options: str, fill_in: Callable[..., None] | None = None) -> Any:
    monkeypatch.setattr(sys, "argv", ["example.py", *options])
    parser = command_line.make_parser(
        "An example.", **({"lr": None, "momentum": None, "epochs": None} if fill_in else {})
    )
    command_line.add_image_options(parser, validation=10, models=("alexnet", "preact_resnet18"))
    if fill_in is not None:
        parser.set_defaults(schedule=None, augment=None)
    return command_line.parse(parser, fill_in)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--devices 0", "--devices must be at least 1, got 0"),
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--batch-size 30", "30 is not divisible by 4"),
        ("--log-every 0", "--log-every must be at least 1, got 0"),
        ("--lr -1", "--lr must be a finite number above 0, got -1.0"),
        ("--lr nan", "--lr must be a finite number above 0, got nan"),
        ("--momentum 1", "--momentum must be at least 0 and below 1, got 1.0"),
        ("--timeout 0", "--timeout must be a finite number above 0, got 0.0"),
        ("--seed -1", "--seed must be from 0 to 4294967295, got -1"),
        ("--non-iid 0", "--non-iid must be a finite number above 0, got 0.0"),
        ("--non-iid 1 --data-shares whole", "--non-iid deals out fixed shares, and --data-shares is whole"),
        ("--strategy all-reduce --data-shares dealt", "--data-shares dealt is of replicas with steps of their own"),
        ("--resume", "--resume needs --run-id"),
        ("--alpha 2", "`alpha` must be a number in (0, 1], got 2.0"),
        ("--strategy downpour --n-push 0", "`n_push` must be an integer of at least 1, got 0"),
        ("--strategy downpour --asynchronous", "--asynchronous is of gossip and elastic-gossip"),
        ("--asynchronous --period 4 --delay 2", "`delay` must be 0 with `asynchronous=True`, got 2"),
        ("--strategy ring", "invalid choice: 'ring'"),
        ("--data-shares even", "invalid choice: 'even'"),
        ("--model mlp", "invalid choice: 'mlp'"),
    ],
)
def test_options_that_do_not_fit_end_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(monkeypatch, *options.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_cifar10_takes_its_defaults_from_model_and_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*options: str) -> Any:
        return parsed(monkeypatch, *options, fill_in=cifar10.default_to_model)

    alexnet, resnet = of(), of("--model", "preact_resnet18")
    assert (alexnet.lr, alexnet.momentum, alexnet.schedule, alexnet.augment) == (0.1, 0.0, "plateau", False)
    assert (resnet.lr, resnet.momentum, resnet.schedule, resnet.augment) == (0.01, 0.9, "milestones", True)
    assert of("--strategy", "downpour", "--n-push", "4").lr == 0.025
    assert of("--strategy", "downpour", "--lr", "0.3").lr == 0.3


@pytest.mark.parametrize(
    ("fill_in", "usual", "downpour"),
    [(mnist.default_to_strategy, (0.001, 0.99), (0.02, 0.0)), (iris.default_to_strategy, (0.01, 0.99), (0.006, 0.9))],
)
def test_mnist_and_iris_take_their_defaults_from_the_strategy(
    monkeypatch: pytest.MonkeyPatch,
    fill_in: Callable[..., None],
    usual: tuple[float, float],
    downpour: tuple[float, float],
) -> None:
    def of(*options: str) -> Any:
        args = parsed(monkeypatch, "--epochs", "1", *options, fill_in=fill_in)
        return args.lr, args.momentum

    assert of() == of("--strategy", "all-reduce") == usual
    assert of("--strategy", "downpour") == downpour
    assert of("--strategy", "downpour", "--lr", "0.3", "--momentum", "0.5") == (0.3, 0.5)


@pytest.mark.parametrize("fill_in", [mnist.default_to_strategy, iris.default_to_strategy, cifar10.default_to_model])
def test_defaults_that_can_not_be_computed_end_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fill_in: Callable[..., None]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(monkeypatch, "--strategy", "downpour", "--n-push", "0", fill_in=fill_in)
    assert ended.value.code == 2
    assert "--n-push must be at least 1, got 0" in capsys.readouterr().err


def test_schedules_follow_their_papers() -> None:
    def rates(name: str, lr: float, losses: list[float]) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        make = cifar10.make_schedule(name)
        assert make is not None
        scheduler, found = make(optimizer), []
        for loss in losses:
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step(*[loss] * (name == "plateau"))
        return found

    halved = rates("milestones", 0.01, [1.0] * 50)
    assert [halved[epoch] for epoch in (0, 14, 15, 29, 30, 39, 40, 49)] == pytest.approx(
        [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025, 0.00125, 0.00125]
    )
    assert rates("plateau", 0.1, [1.0] * 8) == pytest.approx([0.1] * 3 + [0.01] * 2 + [0.001] * 3)


@pytest.mark.parametrize(
    ("network", "pixels", "parameters"),
    [
        (models.mlp, (1, 28, 28), 784 * 1024 + 2 * 1024**2 + 1024 * 10 + 3 * 1024 + 10),
        (models.alexnet, (3, 32, 32), 2_472_266),
        (models.preact_resnet18, (3, 32, 32), 11_172_170),
    ],
)
def test_networks_have_the_papers_sizes(
    network: Callable[[], nn.Module], pixels: tuple[int, ...], parameters: int
) -> None:
    module = network().eval()
    images = torch.randint(256, (2, *pixels), dtype=torch.uint8)
    assert module(images).shape == (2, 10)
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_pixels_are_normalized_like_torchvision_does() -> None:
    images = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    torch.testing.assert_close(models.Normalize(mean, std)(images), normalize(images / 255, list(mean), list(std)))


def test_a_batch_is_cropped_and_flipped_like_its_images_one_by_one() -> None:
    images = torch.randint(256, (64, 3, 8, 6), dtype=torch.uint8)
    top, left = torch.randint(9, (2, 64, 1))
    flip = torch.rand(64, 1) < 0.5
    expected = [
        hflip(one) if flipped else one
        for image, t, le, flipped in zip(images, top, left, flip, strict=True)
        for one in [crop(pad(image, [4]), int(t), int(le), 8, 6)]
    ]
    assert torch.equal(models.crop_at(images, 4, top, left, flip), torch.stack(expected))


def test_crops_and_flips_are_uniform() -> None:
    torch.manual_seed(0)
    ramp = torch.zeros(20000, 2, 9, 9, dtype=torch.uint8)  # each pixel tells its row and column
    ramp[:, 0], ramp[:, 1] = torch.arange(1, 10).view(9, 1), torch.arange(1, 10)
    middle = models.crop_and_flip(ramp)[:, :, 4, 4]  # of the image's rows and columns 1 to 9
    for axis in range(2):
        counts = middle[:, axis].long().bincount(minlength=10)[1:]
        assert (counts - 20000 / 9).abs().max() < 5 * (20000 / 9) ** 0.5
    sign = (models.crop_and_flip(ramp)[:, 1, 4, 5].int() - models.crop_and_flip(ramp)[:, 1, 4, 3].int()).sign()
    flipped = int((sign < 0).sum()) / int((sign != 0).sum())  # columns of the border have no direction
    assert flipped == pytest.approx(0.5, abs=0.02)


def test_a_summary_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "summary.json"
    training.write_summary(file, {"seconds": 1.5, "folder": Path("logs")})
    assert json.loads(file.read_text()) == {"seconds": 1.5, "folder": "logs"}
    assert [path.name for path in file.parent.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("strategy", "part"), [("elastic-gossip", "exchange"), ("downpour", "downpour_stats"), ("all-reduce", "")]
)
def test_costs_of_a_run_that_is_resumed_at_its_end_are_those_of_its_checkpoint(strategy: str, part: str) -> None:
    """It then trains no more: Lightning calls ``on_fit_end`` alone."""
    module: Any = nn.Linear(3, 5)
    stats = SimpleNamespace(bytes_sent=600)
    of_strategy = {"exchange": SimpleNamespace(stats=stats)} if part == "exchange" else {part: stats}
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(**of_strategy if part else {}), world_size=4, global_step=5)
    costs = training.Costs(strategy)
    costs.on_train_start(trainer, module)
    costs.on_train_epoch_end(trainer, module)
    saved = costs.state_dict()
    resumed = training.Costs(strategy)
    resumed.load_state_dict(saved)
    resumed.on_fit_end(trainer, module)
    assert resumed.seconds == saved["seconds"] > 0
    assert resumed.bytes_sent == 600  # by all-reduce 2 · 80 · ¾ in each of 5 steps


def mnist_options(folder: Path, run_id: str, epochs: int) -> list[str]:
    options = ["--data-dir", str(folder), "--validation", "20", "--batch-size", "20", "--log-dir", "$LOGS"]
    return [*options, "--run-id", run_id, "--epochs", str(epochs), "--summary", str(folder / f"{run_id}.json")]


def test_a_resumed_run_equals_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LOGS", str(tmp_path / "logs"))
    idx_files(tmp_path)

    def run(run_id: str, epochs: int, *options: str) -> tuple[Any, Any]:
        given = [*mnist_options(tmp_path, run_id, epochs), "--strategy", "local", *options]
        monkeypatch.setattr(sys, "argv", ["mnist.py", *given])
        mnist.main()
        checkpoint = torch.load(tmp_path / "logs" / "mnist" / run_id / "checkpoints" / "last.ckpt", weights_only=True)
        return json.loads((tmp_path / f"{run_id}.json").read_text()), checkpoint

    def seconds_in(checkpoint: Any) -> float:
        [seconds] = [state["seconds"] for state in checkpoint["callbacks"].values() if "seconds" in state]
        return float(seconds)

    whole, unbroken = run("whole", 2)
    first, begun = run("parts", 1)
    capsys.readouterr()
    resumed, ended = run("parts", 2, "--resume")
    assert re.findall(r"epoch \d/\d", capsys.readouterr().out) == ["epoch 2/2"]
    assert (first["updates"], resumed["updates"], whole["updates"]) == (5, 10, 10)  # 120 - 20 images
    assert first["seconds"] > seconds_in(begun) > 0
    assert resumed["seconds"] > seconds_in(ended) > seconds_in(begun), "the parts' times add up"
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    assert all(torch.equal(ended["state_dict"][name], value) for name, value in unbroken["state_dict"].items())
    assert not all(torch.equal(begun["state_dict"][name], value) for name, value in unbroken["state_dict"].items())

    with pytest.raises(SystemExit) as refused:
        run("parts", 2)
    assert refused.value.code == 2
    assert f"there is a run parts in {tmp_path}/logs/mnist/parts: go on with it by --resume" in capsys.readouterr().err
    run("new", 1, "--resume")
    assert f"Nothing to resume: there is no {tmp_path}/logs/mnist/new/checkpoints/last.ckpt" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.timeout(400)
def test_replicas_are_launched_and_summed_up(tmp_path: Path) -> None:
    """Real processes, as how a script launches its ranks, and what they tell rank 0, is what is tested."""
    idx_files(tmp_path)
    command = [sys.executable, str(EXAMPLES / "mnist.py"), *mnist_options(tmp_path, "run", 2), "--devices", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOGS": str(tmp_path / "logs")}
    ended = subprocess.run(
        [*command, "--period", "2"], capture_output=True, text=True, timeout=350, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "replica of rank 1" in ended.stdout
    summary = json.loads((tmp_path / "run.json").read_text())
    assert (summary["updates"], summary["world_size"], summary["seed"]) == (2 * 5, 2, 1234)
    parameters = 4 * sum(p.numel() for p in models.mlp().parameters())
    assert summary["bytes_sent_per_rank"] == pytest.approx(5 * parameters, rel=1e-3)  # every other step; padded
    assert len(summary["test_accuracy"]) == 2
    for rank, accuracy in enumerate(summary["test_accuracy"]):
        logged = tmp_path / "logs" / "mnist" / "run" / f"rank_{rank}"
        assert scalars(logged, "test_accuracy") == [(10, pytest.approx(accuracy))]
        assert scalars(logged, "consensus/test_accuracy") == [(10, pytest.approx(summary["consensus_test_accuracy"]))]
    assert summary["strategy_arguments"]["period"] == 2


@pytest.mark.long
@pytest.mark.faults
def test_ranks_are_killed_and_come_back(tmp_path: Path) -> None:
    """`make demo-faults`."""
    command = [sys.executable, str(EXAMPLES / "faults.py"), "--log-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert ended.returncode == 0, ended.stderr
    _, _, events = ended.stdout.partition("What happened:\n")
    told = [re.sub(r" at step [\d,]+", "", line.strip()) for line in events.splitlines()]
    assert told == [
        "rank 2 lost (its process is gone); 3 of 4 go on",
        "rank 2 joined from rank 0; 4 of 4 go on",
        "rank 0 lost (its process is gone); 3 of 4 go on",
        "rank 1 takes over the duties of rank 0",
        "rank 0 joined from rank 1; 4 of 4 go on",
    ]
    assert len(re.findall(r"replica of rank \d", ended.stdout)) == 4
    assert [folder.name for folder in (tmp_path / "faults").iterdir()] == ["version_0"], "one run, one folder"
