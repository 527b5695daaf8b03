"""The training data of a rank that joins in the middle of an epoch: from where its donor stands, as far as that goes.

Ranks whose steps go together have to be through with an epoch at the same step, or agree beforehand that they are not.
The others have agreed; who joins draws its own seat's share, but as many batches of it as its donor has still.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_gossip.strategies.dealt_batches import put_source, source_of


@dataclass(frozen=True)
class Stand:
    """Where a rank stands in an epoch.

    Attributes:
        taken: batches that it has begun.
        lengths: how many batches each of its loaders has; None where that is not known.
    """

    taken: int
    lengths: tuple[int | None, ...]


class RestOfEpoch:
    """Batches, or what batches are made of, from a position on; begun again where they do not last.

    Args:
        own: that; in all else this is like it.
        taken: how many of ``length`` are gone by: so many of ``own`` are skipped.
        length: in all.
    """

    def __init__(self, own: Iterable[Any], taken: int, length: int) -> None:
        self.own = own
        self._taken = taken % max(length, 1)  # a shorter one of several loaders is iterated more than once
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return islice(_around(self.own), self._taken, self._length)

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # of a copy in the making
            raise AttributeError(name)
        return getattr(self.own, name)


class TrainingData:
    """The loaders of training that a rank has, and how long they are."""

    def __init__(self) -> None:
        self._lengths: list[int | None] = []
        self._changed: list[tuple[DataLoader[Any], Any]] = []

    def begin_loading(self) -> None:
        """Called before loaders are looked at anew; gives those back as they were that were looked at before."""
        self._lengths.clear()
        for loader, own in self._changed:
            put_source(loader, own)
        self._changed.clear()

    def take(self, loader: Any, donors: Stand | None) -> Any:
        """Note the next of the loaders, and return it; where it stands as the donor's does, if there is one."""
        length = _length(loader)
        index = len(self._lengths)
        wanted = donors.lengths[index] if donors is not None and index < len(donors.lengths) else None
        if donors is not None and length is not None and wanted is not None:
            loader, length = self._from(loader, donors.taken, wanted), wanted
        self._lengths.append(length)
        return loader

    def _from(self, loader: Any, taken: int, length: int) -> Any:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return RestOfEpoch(loader, taken, length)
        own = source_of(loader)
        self._changed.append((loader, own))
        put_source(loader, RestOfEpoch(own, taken, length))
        return loader

    def lengths(self) -> tuple[int | None, ...]:
        """Return how many batches each loader has."""
        return tuple(self._lengths)


def place_among(rank: int, dealt: Sequence[int]) -> tuple[int, ...]:
    """Return among whom data is dealt for ``rank``: it stands in the place of another, where it is not one of them."""
    places = list(dealt)
    if rank not in places:
        places[rank % len(places)] = rank
    return tuple(places)


def _around(batches: Iterable[Any]) -> Iterator[Any]:
    found = True
    while found:
        found = False
        for batch in batches:
            found = True
            yield batch


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
