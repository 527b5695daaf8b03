"""Ranks that count unequal numbers of batches, or at paces of their own, come to one decision (design §7, §11).

Whether to validate, to save, to end follows from what a rank counts.

* While ranks go together and have batches, their counts agree. One that has none left *follows* those that have: at an
  epoch's end it waits for all, and takes part in whatever they meet for.
* Where each has a pace of its own, the first whose count says so goes to that meeting, and thereby *calls* the others
  (:mod:`~lightning_gossip.control.lookout`): they come at the end of their present step, and do it with its counts. Who
  counts to the same later does not call again.

At its last batch a rank first waits until all are at theirs, and counts from then on what the one with the most counts;
what is decided there is decided by all together, and one rank's count is enough.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning_gossip.strategies import lightning_compat, lightning_dealing
from lightning_gossip.strategies import lightning_counts as counts
from lightning_gossip.strategies.dealt_epochs import DealtEpochs
from lightning_gossip.strategies.lightning_names import pl

log = logging.getLogger(__name__)

LAST_BATCHES = "the last batches of an epoch"
END_OF_EPOCH = "the end of an epoch"
LAST_STEP = "the last step"
VALIDATION = "validation"

LONG = 0.1
"""Part of an epoch that ranks wait for others, above which a line says so."""


@dataclass
class Meetings:
    """How ranks of a strategy meet.

    Attributes:
        gather: returns a value of each rank, after a meeting for the given reason.
        await_all: waits for all ranks, for the given reason, and calls a function with what others meet for meanwhile.
        called_to: returns for what others wait at the next meeting, as far as is known.
        is_awaited: whether others wait for all, for the given reason, as far as is known.
        also: what else ranks may meet for while some are out of batches, and how to take part.
    """

    gather: Callable[[Any, str], list[Any]]
    await_all: Callable[[str, Callable[[str], None]], None]
    called_to: Callable[[], str | None]
    is_awaited: Callable[[str], bool]
    also: Mapping[str, Callable[[], None]] = field(default_factory=dict)


class Counting:
    """One rank's part in decisions by counts, in a ``fit``.

    Args:
        trainer: of the fit.
        strategy: its name, for messages.
        rank: of this process.
        meetings: how ranks meet.
        refuse: called with the lengths where they are unequal or unknown, and nothing is dealt.
        together: whether the ranks' steps go at one pace.
        ends_first: whether an epoch with fixed shares ends for all once one rank is through.
        dealing: deals batches on demand; None where none are.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        strategy: str,
        rank: int,
        meetings: Meetings,
        refuse: Callable[[list[float]], None],
        together: bool = True,
        ends_first: bool = False,
        dealing: DealtEpochs | None = None,
    ) -> None:
        self._trainer = trainer
        self._strategy = strategy
        self._rank = rank
        self._meetings = meetings
        self._refuse = refuse
        self._together = together or trainer.world_size == 1
        self._ends_first = ends_first
        self._dealing = dealing
        self._unequal = False
        self._all_are_last = False  # in this epoch
        self._done: dict[str, counts.Counts] = {}  # counts at which each thing was done last
        self._wanted: dict[str, counts.Counts] = {}  # by this rank's count at that time
        self._parts = 0  # of the epoch that were validated
        self._began = time.monotonic()  # the epoch
        self._waited = 0.0  # seconds, for the last batches of others
        self.taking_part = dict(meetings.also)
        self.taking_part[VALIDATION] = partial(self._act, VALIDATION, self._validate)
        self.taking_part[LAST_STEP] = self._end_by_steps
        for index, callback in enumerate(counts.step_checkpoints(trainer)):
            save = partial(counts.save_at_step, trainer, callback)
            what = f"checkpoint {index}"
            self.taking_part[what] = partial(self._act, what, save)

    def install(self, after_batch: Callable[[], None]) -> None:
        """Begin; ``after_batch`` is called at the end of every batch, the validation after it included."""

        def after() -> None:
            if not self._together:
                self._answer_calls()
            after_batch()

        counts.after_loading(self._trainer, self._agree_on_lengths)
        counts.decide_batch_ends(self._trainer, self._decide, after, self._part_is_over)
        lightning_compat.after_each_epoch(self._trainer, self._end_epoch)

    def before_batch(self) -> None:
        """Called before every batch: it may be this rank's last one, because others are through."""
        if self._unequal and self._ends_first and not self._is_dealt and self._meetings.is_awaited(LAST_BATCHES):
            lightning_dealing.end_with_next_batch(self._trainer)

    @property
    def parts_validated(self) -> int:
        """How many parts of the present epoch were validated, where ``val_check_interval`` is a part of one."""
        return self._parts

    def resume(self, parts_validated: int) -> None:
        """Go on within an epoch."""
        self._parts = parts_validated

    @property
    def _is_dealt(self) -> bool:
        return self._dealing is not None and self._dealing.active

    # -- lengths --------------------------------------------------------------------------------------------------

    def _agree_on_lengths(self) -> None:
        trainer = self._trainer
        if self._dealing is not None:
            self._dealing.loaded()
        values = self._meetings.gather(
            (counts.number_of_batches(trainer), trainer.val_check_batch), "the lengths of an epoch"
        )
        lengths = [length for length, _ in values]
        differ = len(set(lengths)) > 1 or lengths[0] == float("inf")
        apart = trainer.world_size > 1 and (self._is_dealt or not self._together or self._ends_first)
        self._unequal = differ or apart
        self._began = time.monotonic()
        self._done.clear()
        self._wanted.clear()
        if self._is_dealt:
            if isinstance(trainer.val_check_interval, float) and self._validates_by_parts:
                trainer.val_check_batch = lightning_dealing.UNKNOWN
            return
        if not differ:
            return
        self._refuse(lengths)
        if len(set(lengths)) > 1:
            counts.refuse_times(trainer, self._strategy, lengths)
        checks = [check for length, check in values if length and check is not None]
        if checks:
            trainer.val_check_batch = max(checks)
        if not counts.number_of_batches(trainer):
            counts.begin_without_batches(trainer)

    @property
    def _validates_by_parts(self) -> bool:
        """Whether it is not by a count of batches that validations fall due within an epoch."""
        interval = self._trainer.val_check_interval
        return self._is_dealt and isinstance(interval, float) and (not self._together or interval >= 1)

    def _part_is_over(self) -> bool:
        """Whether a part of a dealt epoch, of the size of ``val_check_interval``, is over and was not validated."""
        interval = self._trainer.val_check_interval
        if not self._validates_by_parts or self._dealing is None or not isinstance(interval, float):
            return False
        if self._dealing.evens_out:  # ranks meet in every step, and have to come to it at the same one
            every = max(1, int(counts.number_of_batches(self._trainer) * interval))
            over = counts.counts_of(self._trainer).batches % every == 0
        else:
            over = self._dealing.parts(interval) > self._parts
        return over or counts.is_last_batch(self._trainer)

    # -- decisions ------------------------------------------------------------------------------------------------

    def _decide(self, what: str, own: Callable[[], bool]) -> bool:
        """Return whether all do ``what`` now; ``own`` says what this rank's count does."""
        if not self._unequal:
            return own()
        if counts.is_last_batch(self._trainer):
            self._await_last_batches()
        here, done = counts.counts_of(self._trainer), self._done.get(what)
        if self._all_are_last:
            # a rank that has ended its epoch in its middle may have called for it at this count
            again = done is not None and (done.batches, done.steps) == (here.batches, here.steps)
            return self._ask(what, here if own() and not again else None) is not None
        if self._together:
            return own() and self._ask(what, here) is not None
        if own() and what not in self._wanted and self._is_news(what, here, done):
            self._wanted[what] = here
        return False

    def _is_news(self, what: str, here: counts.Counts, done: counts.Counts | None) -> bool:
        """Whether no rank has counted so far before."""
        if done is None or (what == VALIDATION and self._validates_by_parts):
            return True
        return here.batches > done.batches if what == VALIDATION else here.steps > done.steps

    def _answer_calls(self) -> None:
        """Call the others for what this rank's count says, and take part in what they call for; after a batch."""
        if not self._unequal or self._all_are_last:
            return
        for what in tuple(self._wanted):
            if what in self._wanted:
                self.taking_part[what]()
        if counts.is_last_step(self._trainer):
            self._end_by_steps()
        elif not counts.is_accumulating(self._trainer):
            while (called := self._meetings.called_to()) is not None and called in self.taking_part:
                self.taking_part[called]()

    def _ask(self, what: str, own: counts.Counts | None) -> tuple[counts.Counts, bool] | None:
        """Return the counts of the first rank that does ``what``, and whether its batch is the last; None for none.

        Args:
            what: to do.
            own: counts by which this rank does; None if it does not by them.
        """
        here = own or counts.counts_of(self._trainer)
        is_last = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        parts = 0
        if own is not None and self._dealing is not None and self._validates_by_parts:
            parts = self._dealing.parts(float(self._trainer.val_check_interval))
        votes = self._meetings.gather((own is not None, (here, is_last), parts), what)
        agreed = next((there for wants, there, _ in votes if wants), None)
        if agreed is not None:
            self._done[what] = agreed[0]
            self._wanted.pop(what, None)
            if what == VALIDATION:
                self._parts = max(self._parts, *(parts for _, _, parts in votes))
        return agreed

    def _follow(self, what: str) -> None:
        if what not in self.taking_part:
            dealt = "; with `dealt=False` each rank has as many as the others" if self._is_dealt else ""
            raise RuntimeError(
                f"this rank is out of batches in this epoch, and waits for the others, which now meet for '{what}':"
                f" that takes all ranks. With unequal numbers of batches nothing in a training step may{dealt}"
            )
        self.taking_part[what]()

    def _act(self, what: str, act: Callable[[], None]) -> None:
        """Meet for ``what``, and do it with the counts of the first rank whose count says so."""
        if (there := self._ask(what, self._wanted.get(what))) is not None:
            with counts.counting_as(self._trainer, *there):
                act()

    def _validate(self) -> None:
        counts.run_validation(self._trainer)

    def _end_by_steps(self) -> None:
        """End training for all, at the number of steps that one of them has made."""
        self._count_most(counts.counts_of(self._trainer), logged=True, reason=LAST_STEP)

    # -- an epoch's end ---------------------------------------------------------------------------------------------

    def _await_last_batches(self) -> None:
        if not self._all_are_last:
            through = time.monotonic()
            self._meetings.await_all(LAST_BATCHES, self._follow)
            self._waited = time.monotonic() - through
            self._all_are_last = True
            own = counts.counts_of(self._trainer)
            self._count_most(own, logged=False)

    def _end_epoch(self) -> None:
        if self._unequal:
            if self._is_dealt:
                lightning_dealing.end_without_batch(self._trainer)
            self._await_last_batches()
            lasted = time.monotonic() - self._began
            self._meetings.await_all(END_OF_EPOCH, self._follow)
            self._all_are_last = False
            self._done.clear()
            self._wanted.clear()
            self._parts = 0
            self._count_most(counts.counts_of(self._trainer), logged=True, lasted=lasted)
            self._began = time.monotonic()

    def _count_most(
        self, own: counts.Counts, logged: bool, reason: str = "the counts of all ranks", lasted: float = 0.0
    ) -> None:
        """Count what the rank does that counts most; where an epoch has ``lasted`` some seconds, say who waited."""
        everybody = self._meetings.gather((own, self._rank, self._waited), reason)
        most = counts.Counts(
            max(c.batches for c, _, _ in everybody),
            max(c.steps for c, _, _ in everybody),
            max(c.logged for c, _, _ in everybody) if logged else own.logged,
        )
        counts.set_counts(self._trainer, most)
        if lasted and not self._is_dealt and not self._ends_first:
            line = who_waited({rank: waited for _, rank, waited in everybody}, lasted)
            if line and self._trainer.is_global_zero:
                log.warning("epoch %d: %s", self._trainer.current_epoch, line)


def who_waited(waited: Mapping[int, float], lasted: float) -> str | None:
    """Return a line on who waited for whom at an epoch's end; None where it was not long.

    What all waited, the last too, is what their meeting took, and not for anybody.

    Args:
        waited: seconds, by rank.
        lasted: the epoch, in seconds.
    """
    last = min(waited, key=lambda rank: waited[rank])
    for_it = {rank: seconds - waited[last] for rank, seconds in waited.items()}
    longest = max(for_it.values())
    if lasted <= 0 or longest <= LONG * lasted:
        return None
    waiting = sorted(rank for rank, seconds in for_it.items() if seconds > longest / 2)
    who = f"rank {waiting[0]}" if len(waiting) == 1 else f"ranks {', '.join(map(str, waiting))}"
    return (
        f"{who} waited up to {longest:.1f} s for rank {last}, {longest / lasted:.0%} of the epoch: `dealt=True` gives"
        " ranks as many batches as they have time for, `epoch_ends='first'` ends epochs with the first that is through"
    )
