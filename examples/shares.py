"""Which samples of the training set a worker walks through in an epoch, and in which order: samplers, one a scheme.

All are pure functions of (seed, epoch, rank, world size), so a resumed run goes on with the order of an unbroken one;
but for ``"dealt"``, where a worker takes the next batch of the epoch whenever it has need of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

DATA_SHARES = ("fixed", "reshuffled", "whole", "contiguous", "dealt")


def place_of(trainer: pl.Trainer | None) -> tuple[int, int, int]:
    """Return which of how many shares is this worker's, among those that take part, and how many workers there were."""
    if trainer is None:
        return 0, 1, 1
    members: tuple[int, ...] = getattr(trainer.strategy, "members", tuple(range(trainer.world_size)))
    return members.index(trainer.global_rank), len(members), trainer.world_size


class IndexSampler(Sampler[int]):
    """Walks through ``indices`` in an order of its own in each epoch.

    Args:
        indices: of the samples, 1-D.
        seed: of the order.
        rank: ranks with the same indices and seed have different orders.
    """

    def __init__(self, indices: Tensor, seed: int, rank: int) -> None:
        self.indices = indices
        self._seed, self._rank = seed, rank
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls it before every epoch."""
        self._epoch = epoch

    def order(self) -> Tensor:
        """Return this epoch's indices, 1-D."""
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, self._epoch, self._rank, "order"))
        return self.indices[torch.randperm(len(self.indices), generator=generator)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def __len__(self) -> int:
        return len(self.indices)


class Whole(Dataset[Any]):
    """A training set of which whole batches are cut.

    Args:
        samples: their number.
        cut: returns the batch of the samples at these indices, 1-D.
    """

    def __init__(self, samples: int, cut: Callable[[Tensor], Any]) -> None:
        self.samples, self.cut = samples, cut

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, indices: list[int]) -> Any:
        return self.cut(torch.tensor(indices))


def dealt_loader(samples: int, batch_size: int, cut: Callable[[Tensor], Any]) -> DataLoader[Any]:
    """Return a loader in which Lightning places the sampler, so that the strategy can deal its batches.

    Args:
        samples, cut: see :class:`Whole`.
        batch_size: of every batch.

    Raises:
        ValueError: if there is no batch.
    """
    if samples < batch_size:
        raise ValueError(f"{samples} samples are less than a worker's batch of {batch_size}: lower --batch-size")
    return DataLoader(Whole(samples, cut), batch_size, shuffle=True, drop_last=True, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def mixed_seed(seed: int, epoch: int, rank: int, purpose: str) -> int:
    """Return a seed (63 bits) that differs between epochs, ranks and purposes."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{rank}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_sampler(
    scheme: str, labels: Tensor, rank: int, world_size: int, seed: int, non_iid: float | None = None
) -> Sampler[int]:
    """Return what a worker trains on.

    Args:
        scheme: ``"fixed"``: one disjoint, even share for the whole training; ``"reshuffled"``: a new one in each epoch,
            by torch's ``DistributedSampler``; ``"whole"``: all samples, in an order of its own; ``"contiguous"``: as
            fixed, of samples that stand beside each other.
        labels: of the training set, shape ``(samples,)``.
        rank, world_size: of the worker.
        seed: the same on all ranks.
        non_iid: for ``"fixed"``: the concentration of :func:`deal_unevenly`; None deals at random.
    """
    if scheme == "reshuffled":
        dataset: Any = labels  # it asks for the length only
        return DistributedSampler(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)
    if scheme == "whole":
        return IndexSampler(torch.arange(len(labels)), seed, rank)
    if scheme == "contiguous":
        size = len(labels) // world_size
        return IndexSampler(torch.arange(rank * size, (rank + 1) * size), seed, rank)
    shares = (
        deal(len(labels), world_size, seed) if non_iid is None else deal_unevenly(labels, world_size, seed, non_iid)
    )
    return IndexSampler(shares[rank], seed, rank)


def deal(samples: int, world_size: int, seed: int) -> list[Tensor]:
    """Return disjoint shares of equal size, drawn at random; up to ``world_size - 1`` samples stay out."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return list(order[: samples // world_size * world_size].chunk(world_size))


def deal_unevenly(labels: Tensor, world_size: int, seed: int, alpha: float) -> list[Tensor]:
    """Return disjoint shares of equal size with uneven classes: each worker's mixture is a draw from Dirichlet(α).

    Small α gives a worker few classes, large α all of them alike (Hsu et al. 2019, arXiv:1909.06335, §3). A worker that
    asks for more of a class than is left takes the rest from the others, by its own mixture of them.

    Args:
        labels: shape ``(samples,)``, integers.
        world_size: number of shares.
        seed: of the draws.
        alpha: α > 0, the same for all classes.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique()
    pools = [nonzero[torch.randperm(len(nonzero), generator=generator)] for nonzero in _positions(labels, classes)]
    left = torch.tensor([len(pool) for pool in pools])
    size = len(labels) // world_size
    shares: list[Tensor] = [torch.empty(0, dtype=torch.long)] * world_size
    for worker in torch.randperm(world_size, generator=generator).tolist():  # the last one takes what is left
        mixture = log_dirichlet(len(classes), alpha, generator)
        taken = torch.zeros_like(left)
        while missing := size - int(taken.sum()):
            weights = mixture.masked_fill(left == taken, -torch.inf).softmax(dim=0)  # the mixture of what is left
            drawn = torch.multinomial(weights, missing, replacement=True, generator=generator)
            taken = (taken + drawn.bincount(minlength=len(classes))).minimum(left)
        begins = [len(pool) - int(rest) for pool, rest in zip(pools, left, strict=True)]
        parts = [pool[b : b + int(n)] for pool, b, n in zip(pools, begins, taken, strict=True)]
        shares[worker] = torch.cat(parts)
        left = left - taken
    return shares


def _positions(labels: Tensor, classes: Tensor) -> list[Tensor]:
    return [(labels == label).nonzero().flatten() for label in classes]


def log_dirichlet(size: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Return the logarithm of a draw from the symmetric Dirichlet(α), shape ``(size,)``: small α would underflow."""
    above = torch._standard_gamma(torch.full((size,), alpha + 1, dtype=torch.float64), generator=generator)
    # Gamma(α) = Gamma(α + 1) · U^(1/α)
    uniform = 1 - torch.rand(size, dtype=torch.float64, generator=generator)  # in (0, 1]
    return (above.log() + uniform.log() / alpha).log_softmax(dim=0)
