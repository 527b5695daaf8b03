"""MNIST and CIFAR-10 as tensors of pixels: where they are looked for, download, and image folders decoded once.

Two layouts are understood: torchvision's own files, and image folders ``train/<class>/*`` and ``test/<class>/*``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tensor_data import Labelled, Sets, TensorData
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning-gossip"
"""Holds downloads, and image folders as decoded (one file a folder, made again when the folder has changed)."""


class DataNotFoundError(Exception):
    """Data are missing, or not as they should be; the message says what was looked for, and where."""


@dataclass(frozen=True)
class Source:
    """A data set of torchvision: its class, a folder that shows that it is there, and Pillow's mode of its images."""

    dataset: Any
    mark: str
    mode: str

    @property
    def name(self) -> str:
        """Under which torchvision knows it."""
        return str(self.dataset.__name__)


SOURCES = {
    "mnist": Source(MNIST, "MNIST/raw", "L"),
    "cifar10": Source(CIFAR10, "cifar-10-batches-py", "RGB"),
}


class ImageData(TensorData):
    """A data set of images, uint8, of shape ``(samples, channels, height, width)``.

    Args:
        args: as for :class:`TensorData`, and ``data_dir``, ``validation`` (images of the training set that are held
            out, drawn at random) and ``validate_on``: ``"test"`` holds nothing out and validates on the test set.
        source: a key of ``SOURCES``.
    """

    def __init__(self, args: argparse.Namespace, source: str) -> None:
        super().__init__(args)
        self.source = SOURCES[source]

    def prepare_data(self) -> None:
        """Make the data ready on this machine; Lightning lets rank 0 of each node do it while the others wait."""
        prepare(self.source, self.args.data_dir)

    def load(self) -> Sets:
        train, test = read(self.source, self.args.data_dir)
        if self.args.validate_on == "test":
            return Sets(train, test, test)
        held_out = self.args.validation
        if not 0 < held_out < len(train.labels):
            raise ValueError(
                f"--validation must be from 1 to {len(train.labels) - 1}: there are {len(train.labels)} training"
                f" images; got {held_out}"
            )
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(self.args.seed))
        return Sets(train.part(order[held_out:]), train.part(order[:held_out]), test)


def prepare(source: Source, data_dir: Path | None) -> None:
    """Download or decode where that is needed; once on each machine, before :func:`read`.

    Raises:
        DataNotFoundError: if there is nothing to read.
    """
    if data_dir is None:
        _download(source, CACHE)  # completes what is there
    elif not (data_dir / source.mark).is_dir():
        _decoded(source, data_dir)


def read(source: Source, data_dir: Path | None) -> tuple[Labelled, Labelled]:
    """Return training and test set, after :func:`prepare`.

    Raises:
        DataNotFoundError: if torchvision cannot read its files, or there is nothing to read.
    """
    folder = data_dir or CACHE
    if data_dir is not None and not (folder / source.mark).is_dir():
        return _decoded(source, folder)
    try:
        train, test = (source.dataset(folder, train=train) for train in (True, False))
    except RuntimeError as error:  # incomplete, or torn
        raise DataNotFoundError(f"{source.name} in {folder / source.mark}: {error}") from error
    return _tensors(train), _tensors(test)


def _tensors(dataset: Any) -> Labelled:
    """Return the data of a torchvision data set, which has them whole."""
    pixels = torch.as_tensor(dataset.data)  # MNIST (samples, 28, 28), CIFAR-10 (samples, 32, 32, 3)
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return Labelled(pixels.contiguous(), torch.as_tensor(dataset.targets))


def _download(source: Source, folder: Path) -> None:
    try:
        source.dataset(folder, download=True)
    except (OSError, RuntimeError) as error:  # no network; torchvision raises RuntimeError after its last mirror
        raise DataNotFoundError(f"{_not_found(source, None)} The download failed: {error}") from error


def _not_found(source: Source, data_dir: Path | None) -> str:
    name, mark = source.name, source.mark
    advice = "" if data_dir is None else " Without --data-dir, torchvision downloads it."
    return (
        f"No {name} in {(data_dir or CACHE).resolve()}. Point --data-dir at a folder DIR with torchvision's files"
        f" (DIR/{mark}, as torchvision.datasets.{name}(root=DIR) opens them), or with image folders"
        f" (DIR/train/<class>/* and DIR/test/<class>/*).{advice}"
    )


def _decoded(source: Source, folder: Path) -> tuple[Labelled, Labelled]:
    """Return the image folders' pixels from the cache, which is written first if the folders have changed."""
    if not all((folder / part).is_dir() for part in ("train", "test")):
        raise DataNotFoundError(_not_found(source, folder))
    files = {part: list(_images(folder / part)) for part in ("train", "test")}
    state = _state(files)
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    cache = CACHE / f"{source.name}-{key}.pt"
    if cache.exists() and (saved := torch.load(cache, mmap=True, weights_only=True))["state"] == state:
        return Labelled(*saved["train"]), Labelled(*saved["test"])
    classes = {part: sorted({file.label for file in found}) for part, found in files.items()}
    if not classes["train"] or classes["train"] != classes["test"]:
        raise DataNotFoundError(
            f"{folder}/train and {folder}/test must hold images of the same classes; found {classes['train']} and"
            f" {classes['test']}"
        )
    decoded = {part: _decode(found, classes["train"], source.mode) for part, found in files.items()}
    _save_atomically({"state": state} | {part: tuple(labelled) for part, labelled in decoded.items()}, cache)
    return decoded["train"], decoded["test"]


class ImageFile(NamedTuple):
    """A file of an image folder: its class, name, path, size in bytes and time of change in ns."""

    label: str
    name: str
    path: str
    size: int
    changed: int


def _images(folder: Path) -> Iterator[ImageFile]:
    """Yield the files of all classes, in order."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir():
            for file in sorted(os.scandir(entry.path), key=lambda e: e.name):
                if file.is_file() and not file.name.startswith("."):
                    stat = file.stat()
                    yield ImageFile(entry.name, file.name, file.path, stat.st_size, stat.st_mtime_ns)


def _state(files: dict[str, list[ImageFile]]) -> str:
    """Return a digest that changes with any file's part, class, name, size or time of change."""
    listed = [(part, [(f.label, f.name, f.size, f.changed) for f in found]) for part, found in files.items()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _decode(files: list[ImageFile], classes: list[str], mode: str) -> Labelled:
    print(f"Decoding {len(files):,} images, once; the pixels are kept in {CACHE}", flush=True)
    pixels: Tensor | None = None
    for i, path in enumerate(file.path for file in files):
        try:
            with Image.open(path) as opened:
                image = torch.from_numpy(np.array(opened.convert(mode)))  # (height, width), or with channels at the end
        except OSError as error:
            raise DataNotFoundError(f"{path} is not an image that Pillow can decode: {error}") from error
        image = image.unsqueeze(0) if image.dim() == 2 else image.permute(2, 0, 1)
        if pixels is None:
            pixels = torch.empty((len(files), *image.shape), dtype=torch.uint8)
        if image.shape != pixels.shape[1:]:
            raise DataNotFoundError(
                f"all images must have one size: {path} is {tuple(image.shape)} (channels, height, width), and others"
                f" are {tuple(pixels.shape[1:])}"
            )
        pixels[i] = image
    if pixels is None:
        raise DataNotFoundError("there are no images")
    number = {name: i for i, name in enumerate(classes)}
    return Labelled(pixels, torch.tensor([number[file.label] for file in files]))


def _save_atomically(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
