"""Which samples each worker gets, and how image data are found, decoded and cut into batches."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_images import EXAMPLES, idx_files, image_folders, random_images

sys.path.insert(0, str(EXAMPLES))

import image_data
import shares
import training
from image_data import SOURCES, DataNotFoundError, ImageData
from tensor_data import Labelled, TensorLoader

LABELS = torch.arange(1000) % 10


def walked(scheme: str, rank: int, epoch: int = 0, world_size: int = 3, **options: Any) -> list[int]:
    sampler = shares.make_sampler(scheme, LABELS, rank, world_size, seed=5, **options)
    sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(sampler)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(image_data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("options", [{}, {"non_iid": 0.3}])
def test_fixed_shares_are_disjoint_even_and_stay(options: dict[str, Any]) -> None:
    own = [walked("fixed", rank, **options) for rank in range(3)]
    assert [len(set(share)) for share in own] == [333, 333, 333]
    assert len(set().union(*own)) == 999
    for rank, share in enumerate(own):
        later = walked("fixed", rank, epoch=1, **options)
        assert set(later) == set(share)
        assert later != share
        assert walked("fixed", rank, **options) == share


def test_reshuffled_shares_are_disjoint_even_and_new_in_each_epoch() -> None:
    for epoch in range(2):
        own = [walked("reshuffled", rank, epoch) for rank in range(3)]
        assert [len(share) for share in own] == [333, 333, 333]
        assert len(set().union(*own)) == 999
    assert set(walked("reshuffled", 0, 0)) != set(walked("reshuffled", 0, 1))


def test_the_whole_set_is_walked_by_each_in_its_own_order() -> None:
    orders = [walked("whole", rank, epoch) for rank in range(3) for epoch in range(2)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


def test_mixtures_follow_the_dirichlet_distribution() -> None:
    """Mean 1/10 and variance 0.09 / (10 α + 1) of each of 10 classes."""
    generator = torch.Generator().manual_seed(0)
    for alpha in (0.5, 2.0, 50.0):
        drawn = torch.stack([shares.log_dirichlet(10, alpha, generator).exp() for _ in range(2000)])
        assert drawn.mean().item() == pytest.approx(0.1)
        assert drawn.var(0).mean().item() == pytest.approx(0.09 / (10 * alpha + 1), rel=0.06)


def test_shares_are_the_more_uneven_the_smaller_alpha_is() -> None:
    def largest_class(alpha: float) -> float:
        """Return the mean over workers of the proportion of its most frequent class."""
        dealt = [share for seed in range(5) for share in shares.deal_unevenly(LABELS, 4, seed, alpha)]
        return float(torch.stack([LABELS[share].bincount().max() / len(share) for share in dealt]).mean())

    found = [largest_class(alpha) for alpha in (0.01, 0.1, 1.0, 10.0, 1e4)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.38  # a class of 100 samples is at most 0.4 of a share of 250
    assert found[-1] < 0.15  # equal proportions would be 0.1, of a sample of 250


def test_uneven_shares_of_the_smallest_alpha_still_fill() -> None:
    for seed in range(20):
        dealt = shares.deal_unevenly(LABELS, 4, seed, 1e-4)
        assert sorted(torch.cat(dealt).tolist()) == list(range(1000))
        assert [len(share) for share in dealt] == [250] * 4


def test_batches_hold_what_the_sampler_names() -> None:
    data = Labelled(torch.arange(1000).view(-1, 1), LABELS)
    sampler = shares.make_sampler("fixed", LABELS, 1, 3, seed=5)
    loader = TensorLoader(data, 50, sampler)
    batches = list(loader)
    assert len(loader) == len(batches) == 333 // 50
    assert torch.cat([b.inputs for b in batches]).flatten().tolist() == list(sampler)[:300]
    assert all(torch.equal(b.labels, b.inputs.flatten() % 10) for b in batches)
    whole = TensorLoader(data, 300)
    assert [len(b.labels) for b in whole] == [300, 300, 300, 100]
    assert len(whole) == 4


def test_a_loader_that_can_be_dealt_cuts_whole_batches() -> None:
    loader = shares.dealt_loader(25, 4, Labelled(LABELS, LABELS).part)
    batches = list(loader)
    assert len(batches) == len(loader) == 6, "the incomplete one is left out"
    assert all(isinstance(batch, Labelled) and torch.equal(batch.inputs, batch.labels) for batch in batches)
    with pytest.raises(ValueError, match="3 samples are less than a worker's batch of 4"):
        shares.dealt_loader(3, 4, Labelled(LABELS, LABELS).part)


def test_a_share_without_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="10 samples a worker are less than its batch of 11"):
        TensorLoader(Labelled(LABELS, LABELS), 11, shares.IndexSampler(torch.arange(10), 0, 0))


def options(data_dir: Path | None, **changed: Any) -> argparse.Namespace:
    common = {"batch_size": 10, "data_shares": "fixed", "non_iid": None, "seed": 1, "validate_on": "held-out"}
    return argparse.Namespace(**(common | {"data_dir": data_dir, "validation": 20} | changed))


def test_torchvisions_files_are_read_whole(tmp_path: Path) -> None:
    idx_files(tmp_path)
    data = ImageData(options(tmp_path), "mnist")
    data.prepare_data()
    train, validation, test = data.load()
    pixels, labels = random_images(120, 1, 28, 0)
    together = torch.cat([train.inputs, validation.inputs])
    assert len(validation.labels) == 20
    assert sorted(together.sum((1, 2, 3)).tolist()) == sorted(pixels.sum((1, 2, 3)).tolist())
    assert torch.equal(test.inputs, random_images(40, 1, 28, 1)[0])
    where = (pixels.flatten(1) == train.inputs[3].flatten()).all(1).nonzero()
    assert train.labels[3] == labels[where]
    whole = ImageData(options(tmp_path, validate_on="test"), "mnist").load()
    assert torch.equal(whole.train.inputs, pixels)
    assert torch.equal(whole.validation.inputs, whole.test.inputs)


def test_image_folders_are_decoded_once_and_again_when_they_change(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folders(tmp_path)
    pixels, labels = random_images(30, 3, 8, 0)
    by_class = labels.argsort(stable=True)
    for _ in range(2):
        image_data.prepare(SOURCES["cifar10"], tmp_path)
        train, test = image_data.read(SOURCES["cifar10"], tmp_path)
        assert torch.equal(train.inputs, pixels[by_class])
        assert torch.equal(train.labels, labels[by_class])
        assert len(test.labels) == 10
    assert capsys.readouterr().out.count("Decoding 30 images") == 1
    assert [file.suffix for file in cache.iterdir()] == [".pt"]
    (tmp_path / "train" / "c0" / "0000.png").rename(tmp_path / "train" / "c1" / "0000.png")
    assert image_data.read(SOURCES["cifar10"], tmp_path)[0].labels.bincount()[:3].tolist() == [2, 4, 3]
    (tmp_path / "train" / "c1" / "0000.png").unlink()
    assert len(image_data.read(SOURCES["cifar10"], tmp_path)[0].labels) == 29


@pytest.mark.parametrize("damage", ["text", "size", "class"])
def test_broken_image_folders_are_named(tmp_path: Path, damage: str) -> None:
    image_folders(tmp_path)
    if damage == "text":
        (tmp_path / "train" / "c3" / "note.txt").write_text("not an image")
    elif damage == "size":
        image_folders(tmp_path, size=9, train=1, test=0)
    else:
        (tmp_path / "train" / "c3").rename(tmp_path / "train" / "d3")
    message = {"text": r"c3/note.txt is not an image", "size": r"\(3, 8, 8\)", "class": "same classes"}[damage]
    with pytest.raises(DataNotFoundError, match=message):
        image_data.prepare(SOURCES["cifar10"], tmp_path)


def test_without_data_one_message_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit) as ended:
        training.prepare_before_launch(ImageData(options(tmp_path), "mnist"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    for part in (f"No MNIST in {tmp_path}", "MNIST/raw", "torchvision.datasets.MNIST(root=DIR)", "DIR/train/<class>/*"):
        assert part in said


def test_without_network_the_download_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for name in ("mnist", "cifar10"):
        with pytest.raises(DataNotFoundError, match=f"(?s)in {cache}.*DIR/train/<class>.*The download failed"):
            image_data.prepare(SOURCES[name], None)


@pytest.mark.parametrize("held_out", [0, 120, -3])
def test_a_validation_set_leaves_something_to_train_on(tmp_path: Path, held_out: int) -> None:
    idx_files(tmp_path)
    with pytest.raises(ValueError, match=f"--validation must be from 1 to 119: .* got {held_out}"):
        ImageData(options(tmp_path, validation=held_out), "mnist").load()
