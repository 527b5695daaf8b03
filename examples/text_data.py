"""Text as bytes in one memory-mapped file, cut into windows; a worker walks through those of its share."""

from __future__ import annotations

import argparse
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from image_data import DataNotFoundError
from numpy.typing import NDArray
from shares import IndexSampler, dealt_loader, make_sampler, place_of
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler

CACHE = Path("~/.cache/lightning-gossip").expanduser()
EVALUATION_BATCH = 64
BLOCK = 16  # windows in a row that are held out together, so that few of them continue what was trained on
PARTS = 20  # of 20 blocks one is validated on, and one is tested on


class Split(NamedTuple):
    """Numbers of windows, each ascending, 1-D."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(windows: int) -> Split:
    """Return which of ``windows`` are trained on, and which are held out."""
    numbers = torch.arange(windows)
    block = numbers // BLOCK % PARTS
    return Split(numbers[block < PARTS - 2], numbers[block == PARTS - 2], numbers[block == PARTS - 1])


def source_files(folder: Path | None) -> list[Path]:
    """Return the text files of a folder, sorted; of Python's standard library, without its tests, where it is None.

    Raises:
        DataNotFoundError: if there is none.
    """
    if folder is None:
        library = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        found = (p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts))
    else:
        found = (p for p in folder.expanduser().rglob("*") if p.is_file() and is_text(p))
    if not (files := sorted(found)):
        raise DataNotFoundError(f"there is no text in {folder or library}: give a folder of text files by --data-dir")
    return files


def is_text(path: Path) -> bool:
    """Whether a file has no zero in its first bytes."""
    with path.open("rb") as file:
        return b"\0" not in file.read(1024)


def corpus(folder: Path | None, limit: int | None, cache: Path = CACHE) -> Path:
    """Return a file with all text in one; it is written when first asked for.

    Args:
        folder: see :func:`source_files`.
        limit: bytes at most; None for all.
        cache: folder in which it is kept.
    """
    files = source_files(folder)
    described = repr([(str(p), (stat := p.stat()).st_size, stat.st_mtime_ns) for p in files] + [limit])
    target = cache / f"text-{hashlib.sha256(described.encode()).hexdigest()[:16]}.bin"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        left = float("inf") if limit is None else limit
        with temporary.open("wb") as out:
            for path in files:
                text = path.read_bytes()
                out.write(text[: int(min(left, len(text)))])
                left -= len(text)
                if left <= 0:
                    break
        os.replace(temporary, target)
    return target


class WindowLoader:
    """Batches of windows, as inputs and the bytes that follow them, each shape ``(batch, context)``, uint8.

    Args:
        data: all bytes, 1-D.
        windows: numbers of those to be had, 1-D.
        context: bytes of a window.
        batch_size: of every batch where there is a sampler; without, the last may be smaller.
        sampler: gives places in ``windows``; None for all, in order.

    Raises:
        ValueError: if there is no batch.
    """

    def __init__(
        self,
        data: NDArray[np.uint8],
        windows: Tensor,
        context: int,
        batch_size: int,
        sampler: Sampler[int] | None = None,
    ) -> None:
        self.data, self.windows, self.context, self.batch_size = data, windows, context, batch_size
        self.in_order = sampler is None
        self.sampler = SequentialSampler(windows) if sampler is None else sampler
        self.batch_sampler = None  # Lightning asks whether it shuffles
        if len(self) == 0:
            raise ValueError(
                f"{len(self.sampler)} windows of {context} bytes are less than a batch of {batch_size}:"  # type: ignore[arg-type]
                " give more text, or lower --batch-size"
            )

    def __len__(self) -> int:
        samples = len(self.sampler)  # type: ignore[arg-type]
        return -(-samples // self.batch_size) if self.in_order else samples // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        sampler = self.sampler
        order = sampler.order() if isinstance(sampler, IndexSampler) else torch.tensor(list(sampler))
        yield from map(self.cut, order[: len(self) * self.batch_size].split(self.batch_size))

    def cut(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch of the windows at these places, 1-D."""
        begins = self.windows[places].numpy()[:, None] * self.context
        window = torch.from_numpy(self.data[begins + np.arange(self.context + 1)])
        return window[:, :-1], window[:, 1:]


class TextData(pl.LightningDataModule):
    """Gives each rank its part of the training text, and all that is held out for validation and test.

    Args:
        args: the options ``data_dir``, ``text_bytes``, ``batch_size`` (over all ranks), ``data_shares`` and ``seed``.
        context: bytes of a window.
    """

    def __init__(self, args: argparse.Namespace, context: int) -> None:
        super().__init__()
        self.args, self.context = args, context
        self.data: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.split = split(0)

    def prepare_data(self) -> None:
        corpus(self.args.data_dir, self.args.text_bytes)

    def setup(self, stage: str) -> None:
        if not len(self.data):
            self.data = np.memmap(corpus(self.args.data_dir, self.args.text_bytes), np.uint8, mode="r")
            self.split = split((len(self.data) - 1) // self.context)

    def train_dataloader(self) -> Any:
        args, windows = self.args, self.split.train
        share, shares, workers = place_of(self.trainer)
        if args.data_shares == "dealt":
            cut = WindowLoader(self.data, windows, self.context, EVALUATION_BATCH).cut
            return dealt_loader(len(windows), args.batch_size // workers, cut)
        sampler = make_sampler(args.data_shares, windows, share, shares, args.seed)
        return WindowLoader(self.data, windows, self.context, args.batch_size // workers, sampler)

    def val_dataloader(self) -> Any:
        return WindowLoader(self.data, self.split.validation, self.context, EVALUATION_BATCH)

    def test_dataloader(self) -> Any:
        return WindowLoader(self.data, self.split.test, self.context, EVALUATION_BATCH)
