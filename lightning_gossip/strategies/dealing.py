"""Work dealt on demand, and epochs that end for all with the first, under Lightning (design §11)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from typing_extensions import override

from lightning_gossip.arguments import check_choice
from lightning_gossip.control.dealer import Dealer
from lightning_gossip.control.meeting import Meeting
from lightning_gossip.strategies import lightning_compat, lightning_dealing
from lightning_gossip.strategies.counting import LAST_BATCHES, Counting, Meetings
from lightning_gossip.strategies.dealt_epochs import DealtEpochs, nothing_is_dealt
from lightning_gossip.strategies.lightning_names import pl
from lightning_gossip.strategies.saving import CheckpointedStrategy

log = logging.getLogger(__name__)

EpochEnds = Literal["all", "first"]

_KEY = "dealing"
"""Of what is left of an epoch, in this package's entry in a checkpoint."""

_IN_STEPS = ("reduce", "all_gather", "torchmetrics")
"""Collectives that a module may run in every step."""


class DealingStrategy(CheckpointedStrategy):
    """Ranks that share an epoch's batches out as they go, or each by its share.

    Args:
        dealt: whether a rank takes the next batch of the epoch whenever it has need of one, so that faster ranks take
            more, in place of a fixed share. None: where Lightning places the sampler of a map-style data set and the
            ranks' steps do not go together.
        epoch_ends: with fixed shares: whether an epoch lasts until ``"all"`` are through, or ends for all at their next
            step once the ``"first"`` is.
        launch: see :class:`~lightning_gossip.strategies.base.ReplicaStrategy`.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(self, *, dealt: bool | None, epoch_ends: EpochEnds, **launch: Any) -> None:
        self.dealt = check_choice("dealt", dealt, (None, True, False))
        self.epoch_ends: EpochEnds = check_choice("epoch_ends", epoch_ends, ("all", "first"))
        if dealt and epoch_ends == "first":
            raise ValueError(
                "`epoch_ends='first'` is for fixed shares, and `dealt=True` deals the batches until there are no more:"
                " leave one of them out"
            )
        self._dealing: DealtEpochs | None = None  # in a `fit` in which batches may be dealt
        self._counting: Counting | None = None  # in a `fit`
        super().__init__(**launch)

    # -- life of a call of the Trainer ---------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._stop_dealing()
        trainer = self._trainer
        wanted = self.dealt or (self.dealt is None and not self.steps_go_together)
        if trainer is None or not wanted or self.world_size == 1 or not lightning_compat.is_fitting(trainer):
            return
        if (why_not := self._why_nothing_is_dealt(trainer)) is None:
            dealer = Dealer(self._connect, self.control)
            self._dealing = DealtEpochs(
                trainer,
                dealer,
                self.global_rank,
                lambda: self.members,
                lambda: self.is_joining,
                self._resumed_epoch,
                required=bool(self.dealt),
            )
        elif self.dealt:
            raise nothing_is_dealt(why_not)

    def _why_nothing_is_dealt(self, trainer: pl.Trainer) -> str | None:
        if self.process_group_backend == "nccl":
            return "ranks with unequal numbers of batches need gloo (`process_group_backend='gloo'`)"
        if lightning_dealing.asks_for_time(trainer):
            return (
                "`max_time` and `ModelCheckpoint(train_time_interval=…)` ask all ranks for the time after every batch,"
                " and those that are out of batches can not answer"
            )
        return None

    def _set_up_counting(
        self, trainer: pl.Trainer, refuse: Callable[[list[float]], None], after_batch: Callable[[], None]
    ) -> None:
        """Let ranks come to one decision where their counts differ."""
        lookout, together = self.control.calls.lookout, self.steps_go_together
        meetings = Meetings(
            self.gather,
            self._await_all,
            lambda: lookout.called_to,
            lookout.is_awaited,
            dict(self._acts),
        )
        self._counting = counting = Counting(
            trainer,
            type(self).__name__,
            self.global_rank,
            meetings,
            refuse,
            together=together,
            ends_first=self.epoch_ends == "first",
            dealing=self._dealing,
        )
        lookout.watched = LAST_BATCHES if self.epoch_ends == "first" else ""
        if not together:
            lookout.kept = True
            self._acts = counting.taking_part  # others may come to another meeting first
        resumed = self._resumed_epoch()
        if resumed is not None:
            counting.resume(resumed["validated"])
        counting.install(after_batch)

    @override
    def _resume_training(self, trainer: pl.Trainer) -> None:
        super()._resume_training(trainer)
        resuming = lightning_compat.is_resuming(trainer)
        if self._dealing is not None and resuming and "state" not in (self._resume or {}):
            lightning_compat.before_iterating(trainer, _nothing)  # at the epoch of the checkpoint

    @override
    def teardown(self) -> None:
        self._stop_dealing()
        super().teardown()

    def _stop_dealing(self) -> None:
        if self._dealing is not None:
            self._dealing.close()
        self._dealing = self._counting = None

    @override
    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_dealing": None, "_counting": None}

    # -- loaders --------------------------------------------------------------------------------------------------

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        super().barrier(name, *args, **kwargs)
        if self._dealing is not None and name == lightning_dealing.LOADING:
            self._dealing.begin_loading()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        loader = super().process_dataloader(dataloader)
        if self._dealing is not None and self._trainer is not None and self._trainer.training:
            self._dealing.take(loader)
        return loader

    @override
    def _lengths(self) -> tuple[int | None, ...]:
        return () if self._dealing is not None and self._dealing.active else super()._lengths()

    # -- meetings in a step ---------------------------------------------------------------------------------------

    @override
    def _met(self, reason: str) -> Meeting:
        trainer, dealing = self._trainer, self._dealing
        in_step = trainer is not None and trainer.training and lightning_dealing.is_in_batch(trainer)
        if dealing is not None and dealing.active and reason in _IN_STEPS and in_step:
            dealing.even_out()
        return super()._met(reason)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @override
    def common_state(self) -> dict[str, Any]:
        state = None if self._dealing is None else self._dealing.state(self.gather)
        if state is None or self._counting is None:
            return {}
        return {_KEY: state | {"validated": self._counting.parts_validated}}

    def _resumed_epoch(self) -> dict[str, Any] | None:
        return None if self._resume is None else self._resume.get(_KEY)


def _nothing() -> None:
    pass
