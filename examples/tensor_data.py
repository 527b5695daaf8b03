"""Whole data sets as tensors in memory, and batches cut from them by indexing: no worker processes, no collating."""

from __future__ import annotations

import argparse
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from shares import IndexSampler, dealt_loader, make_sampler, place_of
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler

EVALUATION_BATCH = 256


class Labelled(NamedTuple):
    """Inputs of shape ``(samples, …)`` and labels of shape ``(samples,)``."""

    inputs: Tensor
    labels: Tensor

    def part(self, indices: Tensor) -> Labelled:
        """Return copies of the samples at ``indices``."""
        return Labelled(self.inputs[indices], self.labels[indices])


class Sets(NamedTuple):
    """The three parts of a data set."""

    train: Labelled
    validation: Labelled
    test: Labelled


class TensorLoader:
    """Batches of ``data`` by a sampler, or in order; Lightning takes it like a ``DataLoader``.

    Args:
        data: whole.
        batch_size: of every batch where there is a sampler; without, the last may be smaller.
        sampler: gives the epoch's indices; None for all, in order. An incomplete last batch is left out.

    Raises:
        ValueError: if there is no batch.
    """

    def __init__(self, data: Labelled, batch_size: int, sampler: Sampler[int] | None = None) -> None:
        self.data, self.batch_size = data, batch_size
        self.sampler = SequentialSampler(data.labels) if sampler is None else sampler  # Lightning sets its epoch
        self.batch_sampler = None  # Lightning asks whether it shuffles
        self.in_order = sampler is None
        if len(self) == 0:
            raise ValueError(
                f"{len(self.sampler)} samples a worker are less than its batch of {batch_size}: lower --batch-size"  # type: ignore[arg-type]
            )

    def __len__(self) -> int:
        samples = len(self.sampler)  # type: ignore[arg-type]
        return -(-samples // self.batch_size) if self.in_order else samples // self.batch_size

    def __iter__(self) -> Iterator[Labelled]:
        inputs, labels = self.data
        if self.in_order:
            yield from map(Labelled, inputs.split(self.batch_size), labels.split(self.batch_size))
            return
        sampler = self.sampler
        order = sampler.order() if isinstance(sampler, IndexSampler) else torch.tensor(list(sampler))
        for indices in order[: len(self) * self.batch_size].split(self.batch_size):
            yield self.data.part(indices)


class TensorData(pl.LightningDataModule):
    """Gives each rank its part of the training set, and the whole sets for validation and test.

    Args:
        args: the options ``batch_size`` (over all ranks), ``data_shares``, ``non_iid`` and ``seed``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args
        self.sets: Sets | None = None

    @abstractmethod
    def load(self) -> Sets:
        """Return the data; called once in each process."""

    def setup(self, stage: str) -> None:
        if self.sets is None:
            self.sets = self.load()

    def _loaded(self) -> Sets:
        if self.sets is None:
            raise RuntimeError("call setup() first")
        return self.sets

    def train_dataloader(self) -> Any:
        args, train = self.args, self._loaded().train
        share, shares, workers = place_of(self.trainer)
        if args.data_shares == "dealt":
            return dealt_loader(len(train.labels), args.batch_size // workers, train.part)
        sampler = make_sampler(args.data_shares, train.labels, share, shares, args.seed, args.non_iid)
        return TensorLoader(train, args.batch_size // workers, sampler)

    def val_dataloader(self) -> Any:
        return TensorLoader(self._loaded().validation, EVALUATION_BATCH)

    def test_dataloader(self) -> Any:
        return TensorLoader(self._loaded().test, EVALUATION_BATCH)
