"""The batches of a loader, dealt over the ranks: what stands in the place of its batch sampler."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from typing_extensions import override

from lightning_gossip.strategies.lightning_names import isolate_rng

_MARKED = 100
"""Batches by which those of two ranks are compared."""


class DealtBatches(Sampler[Any]):
    """Stands in a loader where its batch sampler was, or its sampler where it makes no batches.

    Args:
        batches: that, over the whole data set.
        placed: the sampler that Lightning has placed in it, of the whole data set too.
        share: how many batches are a rank's fair share.
        iterate: begins to iterate what is dealt to this rank.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        placed: DistributedSampler[Any],
        share: int,
        iterate: Callable[[DealtBatches], Iterator[Any]],
    ) -> None:
        self.batches = batches
        self.placed = placed
        self.share = share
        self._iterate = iterate

    @property
    def sampler(self) -> Any:
        """What a batch sampler takes samples from; Lightning tells it the epoch."""
        return getattr(self.batches, "sampler", self.placed)

    def all(self, epoch: int, seed: int) -> list[Any]:
        """Return all batches of an epoch, in an order that is the same on all ranks.

        A batch sampler that draws random numbers of its own draws them from ``seed`` and ``epoch``.
        """
        self.placed.seed = seed
        self.placed.set_epoch(epoch)
        with _seeded(seed + epoch):
            return list(self.batches)

    @override
    def __iter__(self) -> Iterator[Any]:
        return self._iterate(self)

    def __len__(self) -> int:
        return self.share


def deal_in(
    loader: DataLoader[Any],
    placed: DistributedSampler[Any],
    share: int,
    iterate: Callable[[DealtBatches], Iterator[Any]],
) -> DealtBatches:
    """Put :class:`DealtBatches` into a loader that Lightning has made, in place of what it takes batches from.

    Which of its batches this rank has trained is known where they come in order: so they do.
    """
    dealt = DealtBatches(source_of(loader), placed, share, iterate)
    put_source(loader, dealt)
    if hasattr(loader, "in_order"):
        loader.in_order = True
    return dealt


def take_out(loader: DataLoader[Any], dealt: DealtBatches) -> None:
    """Undo :func:`deal_in`."""
    put_source(loader, dealt.batches)


def source_of(loader: DataLoader[Any]) -> Any:
    """Return what a loader takes its batches from: its batch sampler, or its sampler where it makes no batches."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def put_source(loader: DataLoader[Any], source: Any) -> None:
    """Let a loader take its batches from ``source``, in place of :func:`source_of`."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    vars(loader)[name] = source  # a loader lets nobody set it


def number_of_batches(loader: DataLoader[Any]) -> int:
    """Return how many batches a loader makes of its sampler's samples."""
    batches = source_of(loader)
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return sum(1 for _ in batches)


def place_in(sampler: DistributedSampler[Any], ranks: int, rank: int) -> None:
    """Let ``sampler`` give one of ``ranks`` even shares: the whole data set where there is one."""
    samples = len(sampler.dataset)  # type: ignore[arg-type]
    sampler.num_replicas, sampler.rank = ranks, rank
    sampler.num_samples = -(-samples // ranks)
    sampler.total_size = sampler.num_samples * ranks


def mark_of(batches: list[Any]) -> int:
    """Return a number that tells batches apart that ought to be the same on all ranks."""
    return zlib.crc32(repr((len(batches), batches[:_MARKED])).encode())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with isolate_rng(include_cuda=False):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
