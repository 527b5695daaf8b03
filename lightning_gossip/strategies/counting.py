"""Ranks that count unequal numbers of batches come to one decision (design §7).

Whether to validate, to save, to end follows from what a rank counts. While ranks have batches, their counts agree; one
that has none left *follows* those that have: at an epoch's end it waits for all, and takes part in whatever they meet
for. At its last batch a rank first waits until all are at theirs, and counts from then on what the one with the most
counts; what is decided there is decided by all together, and one rank's count is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning_gossip.strategies import lightning_compat
from lightning_gossip.strategies import lightning_counts as counts
from lightning_gossip.strategies.lightning_names import pl

LAST_BATCHES = "the last batches of an epoch"
END_OF_EPOCH = "the end of an epoch"


class Counting:
    """One rank's part in decisions by counts, in a ``fit``.

    Args:
        trainer: of the fit.
        strategy: its name, for messages.
        gather: returns a value of each rank, after a meeting for the given reason.
        await_all: waits for all ranks, for the given reason, and calls a function with what others meet for meanwhile.
        also: what else ranks may meet for while some are out of batches, and how to take part.
        refuse: called with the lengths where they are unequal or unknown.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        strategy: str,
        gather: Callable[[Any, str], list[Any]],
        await_all: Callable[[str, Callable[[str], None]], None],
        also: Mapping[str, Callable[[], None]],
        refuse: Callable[[list[float]], None],
    ) -> None:
        self._trainer = trainer
        self._strategy = strategy
        self._gather = gather
        self._await_all = await_all
        self._refuse = refuse
        self._unequal = False
        self._all_are_last = False  # in this epoch
        self._done: dict[str, tuple[int, int]] = {}  # counts at which each thing was done last
        self._taking_part = dict(also)
        self._taking_part["validation"] = partial(self._follow_decision, "validation", self._validate)
        for index, callback in enumerate(counts.step_checkpoints(trainer)):
            save = partial(counts.save_at_step, trainer, callback)
            what = f"checkpoint {index}"
            self._taking_part[what] = partial(self._follow_decision, what, save)

    def install(self, after_batch: Callable[[], None]) -> None:
        """Begin; ``after_batch`` is called at the end of every batch, the validation after it included."""
        counts.after_loading(self._trainer, self._agree_on_lengths)
        counts.decide_batch_ends(self._trainer, self._decide, after_batch)
        lightning_compat.after_each_epoch(self._trainer, self._end_epoch)

    # -- lengths --------------------------------------------------------------------------------------------------

    def _agree_on_lengths(self) -> None:
        trainer = self._trainer
        values = self._gather((counts.number_of_batches(trainer), trainer.val_check_batch), "the lengths of an epoch")
        lengths = [length for length, _ in values]
        self._unequal = len(set(lengths)) > 1 or lengths[0] == float("inf")
        if not self._unequal:
            return
        self._refuse(lengths)
        if len(set(lengths)) > 1:
            counts.refuse_times(trainer, self._strategy, lengths)
        checks = [check for length, check in values if length and check is not None]
        if checks:
            trainer.val_check_batch = max(checks)
        if not counts.number_of_batches(trainer):
            counts.begin_without_batches(trainer)

    # -- decisions ------------------------------------------------------------------------------------------------

    def _decide(self, what: str, own: Callable[[], bool]) -> bool:
        """Return whether all do ``what`` now; ``own`` says what this rank's count does."""
        if not self._unequal:
            return own()
        if counts.is_last_batch(self._trainer):
            self._await_last_batches()
        if not self._all_are_last:
            return own() and self._ask(what, True) is not None
        # a rank that has ended its epoch in its middle may have called for it at this count
        here = counts.counts_of(self._trainer)
        again = self._done.get(what) == (here.batches, here.steps)
        return self._ask(what, own() and not again) is not None

    def _ask(self, what: str, own: bool) -> tuple[counts.Counts, bool] | None:
        """Return the counts of the first rank that does ``what``, and whether its batch is the last; None for none."""
        here = counts.counts_of(self._trainer), self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        votes = self._gather((own, here), what)
        agreed = next((there for wants, there in votes if wants), None)
        if agreed is not None:
            self._done[what] = agreed[0].batches, agreed[0].steps
        return agreed

    def _follow(self, what: str) -> None:
        if what not in self._taking_part:
            raise RuntimeError(
                f"this rank is out of batches in this epoch, and waits for the others, which now meet for '{what}':"
                " that takes all ranks. With unequal numbers of batches nothing in a training step may"
            )
        self._taking_part[what]()

    def _follow_decision(self, what: str, act: Callable[[], None]) -> None:
        if (there := self._ask(what, False)) is not None:
            with counts.counting_as(self._trainer, *there):
                act()

    def _validate(self) -> None:
        counts.run_validation(self._trainer)

    # -- an epoch's end ---------------------------------------------------------------------------------------------

    def _await_last_batches(self) -> None:
        if not self._all_are_last:
            self._await_all(LAST_BATCHES, self._follow)
            self._all_are_last = True
            own = counts.counts_of(self._trainer)
            self._count_most(own, logged=False)

    def _end_epoch(self) -> None:
        if self._unequal:
            self._await_last_batches()
            self._await_all(END_OF_EPOCH, self._follow)
            self._all_are_last = False
            self._done.clear()
            self._count_most(counts.counts_of(self._trainer), logged=True)

    def _count_most(self, own: counts.Counts, logged: bool) -> None:
        """Count what the rank does that counts most."""
        everybody = self._gather(own, "the counts of all ranks")
        most = counts.Counts(
            max(c.batches for c in everybody),
            max(c.steps for c in everybody),
            max(c.logged for c in everybody) if logged else own.logged,
        )
        counts.set_counts(self._trainer, most)
