"""One rank's epochs of batches that are dealt on demand, in a ``fit`` (design §11; the protocol is in ``control``)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_gossip.control.deal import Deck
from lightning_gossip.control.dealer import Dealer
from lightning_gossip.strategies import lightning_dealing as reaches
from lightning_gossip.strategies.dealt_batches import (
    DealtBatches,
    deal_in,
    mark_of,
    number_of_batches,
    place_in,
    take_out,
)
from lightning_gossip.strategies.lightning_names import MisconfigurationException, pl

log = logging.getLogger(__name__)


@dataclass
class _Epoch:
    """That is iterated: its number, its batches, those that are there for this rank where that is known."""

    number: int
    batches: list[Any]
    end: int | None = None


class DealtEpochs:
    """Deals the batches of the one loader of training in whose place Lightning has put a sampler.

    Args:
        trainer: in ``fit``.
        dealer: of this rank; it is closed with this.
        rank: of this process.
        members: returns the ranks that take part, the same on all of them at an epoch's beginning.
        joins: returns whether this process joins the others in the middle of an epoch.
        resumed: returns what :meth:`state` did on all ranks, in the checkpoint that is gone on with, if there is one.
        required: whether it is an error where nothing can be dealt.

    Attributes:
        why_not: why nothing is dealt, in words, where that is so.
        evens_out: whether every rank has as many batches as the others, because they meet in every step.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        dealer: Dealer,
        rank: int,
        members: Callable[[], tuple[int, ...]],
        joins: Callable[[], bool],
        resumed: Callable[[], dict[str, Any] | None],
        required: bool = False,
    ) -> None:
        self._trainer = trainer
        self._dealer = dealer
        self._rank = rank
        self._members = members
        self._joins = joins
        self._resumed = resumed
        self._required = required
        self.why_not = "there is no loader of training data"
        self._placed: DistributedSampler[Any] | None = None  # by Lightning, in the loader that it looks at
        self._loaders: list[DataLoader[Any]] = []  # of training, since they were asked for
        self._dealt: DealtBatches | None = None
        self._iterable = False  # whether it is Lightning that iterates the loader
        self._epoch: _Epoch | None = None
        self._begun: DealtBatches | None = None  # with which the present epoch was begun
        self._offset = 0  # batches that count as fetched before this rank's first one of the present iteration
        self._iterations = 0
        self._has_begun = False  # with an epoch of the present loader
        self.evens_out = False
        reaches.note_placed_samplers(trainer, self._note)
        reaches.go_by_last_batch(trainer, lambda: self.active, self._begin_epoch)

    @property
    def active(self) -> bool:
        """Whether the present loader's batches are dealt."""
        return self._dealt is not None

    def close(self) -> None:
        """Give everything back."""
        reaches.restore(self._trainer)
        self._dealer.close()

    # -- loaders ----------------------------------------------------------------------------------------------------

    def begin_loading(self) -> None:
        """Called before Lightning looks at the loaders of training, on all ranks alike."""
        reaches.leave_fetcher(reaches.fetcher_of(self._trainer))
        self._placed = self._dealt = None
        self._has_begun = False
        self._loaders.clear()
        self.why_not = "there is no loader of training data"
        self._dealer.shuffle()

    def _note(self, sampler: DistributedSampler[Any]) -> None:
        place_in(sampler, 1, 0)  # before a batch sampler of the user's is made with it
        self._placed = sampler

    def take(self, loader: Any) -> None:
        """Deal a loader's batches, if it is the only one and Lightning has placed its sampler."""
        placed, self._placed = self._placed, None
        self._loaders.append(loader)
        why_not = self._why_not(loader, placed)
        if why_not is not None:
            self.why_not = why_not
            if placed is not None:
                self._give_share(placed)
            if (dealt := self._dealt) is not None:
                self._dealt = None
                take_out(self._loaders[0], dealt)
                self._give_share(dealt.placed)
        elif placed is not None:
            members = self._members()
            share = math.ceil(number_of_batches(loader) / len(members))
            self._dealt = deal_in(loader, placed, share, self._iterate)
            self._iterable = True  # Lightning iterates a loader that it has just made

    def _why_not(self, loader: Any, placed: DistributedSampler[Any] | None) -> str | None:
        if len(self._loaders) > 1:
            return f"there are {len(self._loaders)} loaders at once, and one can be dealt"
        if not isinstance(loader, DataLoader):
            return f"a {type(loader).__name__} is no torch DataLoader"
        if isinstance(loader.dataset, IterableDataset):
            return f"{type(loader.dataset).__name__} is iterable, and has no samples that could be numbered"
        if placed is None and not reaches.takes_samplers(self._trainer):
            return "`Trainer(use_distributed_sampler=False)` leaves the sampler to you"
        if placed is None:
            return f"the loader has a sampler of its own, a {type(loader.sampler).__name__}"
        if reaches.keeps_its_place(loader):
            return f"a {type(loader).__name__} saves by itself where it stands"
        batches, ranks = number_of_batches(loader), len(self._members())
        if batches < ranks:
            return f"there are {batches} batches for {ranks} ranks"
        return None

    def _give_share(self, placed: DistributedSampler[Any]) -> None:
        members = self._members()
        place_in(placed, len(members), members.index(self._rank))

    def loaded(self) -> None:
        """Called once Lightning has loaded training data, before it begins an epoch.

        Raises:
            MisconfigurationException: where nothing can be dealt, and has to be.
        """
        if self.active:
            reaches.measure_fetcher(reaches.fetcher_of(self._trainer), self._length)
        elif self._required:
            raise nothing_is_dealt(self.why_not)
        else:
            log.info("batches are not dealt on demand: %s", self.why_not)

    # -- epochs -----------------------------------------------------------------------------------------------------

    def _begin_epoch(self, fetcher: Any, start: Callable[[], None]) -> None:
        """Let Lightning begin an epoch; it goes on with an iteration that it began before, or begins another."""
        self._iterable = True
        try:
            start()
            if self._epoch is None or self._epoch.number != reaches.epoch_of(self._trainer):
                iter(fetcher)  # it was resumed at the end of an epoch, whose batches are trained
        finally:
            self._iterable = False
        self._has_begun = True
        self._offset = fetcher.fetched
        reaches.set_length(fetcher, self._length())

    def _length(self) -> int:
        """Return which batch is the last by the fetcher's count."""
        end = None if self._epoch is None else self._epoch.end
        return reaches.UNKNOWN if end is None else self._offset + end

    def _iterate(self, dealt: DealtBatches) -> Iterator[Any]:
        if not self._iterable or dealt is not self._dealt:
            return self._share_of(dealt)
        number = reaches.epoch_of(self._trainer)
        if self._epoch is not None and self._begun is dealt and self._epoch.number == number:
            self._dealer.issue_again(self.trained)
            self._epoch.end = None
        else:
            self._begun, self._epoch = dealt, _Epoch(number, self._open(dealt, number))
        self._offset = 0
        self._iterations += 1
        return self._batches(self._epoch, self._iterations)

    def _open(self, dealt: DealtBatches, epoch: int) -> list[Any]:
        """Open the epoch's deck; return its batches."""
        members, seed = self._members(), dealt.placed.seed
        batches = dealt.all(epoch, seed)
        resumed = self._resumed() or {}
        resumed = resumed if resumed.get("epoch") == epoch else {}
        total = reaches.batches_of(self._trainer, len(batches), len(members))
        first, left = min(total, resumed.get("first", 0)), tuple(resumed.get("left", ()))
        deck = self._dealer.open(epoch, Deck(total, members, first, left, seed, mark_of(batches)), self._joins())
        if deck.seed != seed:
            batches = dealt.all(epoch, deck.seed)
        if deck.mark != (mark := mark_of(batches)):
            raise RuntimeError(
                f"rank {self._rank} has other batches in epoch {epoch} than the rank that came first ({mark:08x},"
                f" {deck.mark:08x}), so that they can not be dealt: data sets and batch samplers have to be the same on"
                " all ranks. Set `dealt=False` to give each rank its share of its own"
            )
        if self.evens_out:
            self._dealer.even_out()
        return batches

    def _batches(self, epoch: _Epoch, iteration: int) -> Iterator[Any]:
        hand = self._dealer.hand
        while iteration == self._iterations and (number := self._dealer.next()) is not None:
            if hand.ended:
                self._end(epoch)
            yield epoch.batches[number]
        if iteration == self._iterations:
            self._end(epoch)

    def _end(self, epoch: _Epoch) -> None:
        """Note that the batch which was issued last is this rank's last one."""
        epoch.end = len(self._dealer.hand.issued)
        if (fetcher := reaches.fetcher_of(self._trainer)) is not None:
            fetcher.length = self._length()

    def _share_of(self, dealt: DealtBatches) -> Iterator[Any]:
        """Return what somebody else than Lightning's loop sees of a loader, in mid-training: an even share."""
        members = self._members()
        batches = dealt.all(reaches.epoch_of(self._trainer), dealt.placed.seed)
        return iter(batches[members.index(self._rank) :: len(members)])

    # -- where it stands --------------------------------------------------------------------------------------------

    @property
    def trained(self) -> int:
        """How many of the batches that were issued in this iteration have been trained."""
        fetcher = reaches.fetcher_of(self._trainer)
        if fetcher is None or self._epoch is None:
            return 0
        fetched = fetcher.fetched - self._offset
        return max(0, fetched - int(reaches.is_in_step(self._trainer)))

    def parts(self, interval: float) -> int:
        """Return how many intervals of the epoch this rank knows to be over, by its last batch; not the last one.

        Args:
            interval: a part of the epoch, in (0, 1].
        """
        issued, trained = self._dealer.hand.issued, self.trained
        if not trained or not 0 < trained <= len(issued):
            return 0
        done = (issued[trained - 1] + 1) / self._dealer.hand.deck.total
        return min(int(done / interval + 1e-9), math.ceil(1 / interval - 1e-9) - 1)

    def even_out(self) -> None:
        """Give every rank as many batches as the others: called where they turn out to go at one pace."""
        if not self._has_begun:
            return  # it is about to load data
        if not self.evens_out:
            log.info(
                "ranks meet in every step of training (`self.log(…, sync_dist=True)`, torchmetrics), so that each has"
                " as many batches of an epoch as the others: up to %d are left out",
                len(self._members()) - 1,
            )
        self.evens_out = True
        self._dealer.even_out()

    def state(self, gather: Callable[[Any, str], list[Any]]) -> dict[str, Any] | None:
        """Return what is left of the epoch, the same on all ranks; None where nothing is dealt. A collective.

        Args:
            gather: returns the value of each rank, for a reason in words.
        """
        own = None if self._epoch is None or not self.active else self._dealer.held(self.trained)
        here = (own, self._dealer.count() if own is not None else 0, self._epoch.number if self._epoch else -1)
        found = gather(here, "what of the epoch is dealt")
        held = [number for numbers, _, _ in found for number in numbers or ()]
        if own is None or self._epoch is None:
            return None
        count = max(count for _, count, _ in found)
        return {"epoch": self._epoch.number} | self._dealer.hand.deck.rest(count, held)


def nothing_is_dealt(why_not: str) -> MisconfigurationException:
    """Return the error where ``dealt=True`` can not be."""
    return MisconfigurationException(
        f"`dealt=True` deals the batches of one loader of a map-style data set whose sampler Lightning places, but"
        f" {why_not}. Leave it out, or set it to None: then each rank has its share where nothing can be dealt"
    )
