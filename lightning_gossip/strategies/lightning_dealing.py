"""The reaches into Lightning's private parts that concern work dealt on demand (see :mod:`.lightning_compat`).

Written for, and tested with, lightning 2.6.6. An epoch's length differs from rank to rank then, and nobody knows it
before its last batch. Lightning's loops see the fair share wherever they show or estimate something, and go by the last
batch where they decide. Attributes are put on instances; :func:`restore` takes them away.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from lightning_gossip.strategies.lightning_names import ModelCheckpoint, RunningStage, Timer, _Stateful, pl
from lightning_gossip.strategies.stand_in import put, take_away

LOADING = "train_dataloader()"
"""Name of the barrier before Lightning looks at the loaders of training."""

UNKNOWN = sys.maxsize
"""Length of an epoch whose last batch is not known yet."""


def note_placed_samplers(trainer: pl.Trainer, note: Callable[[DistributedSampler[Any]], None]) -> None:
    """Call ``note`` with every sampler that Lightning is about to place in a loader of training, before it does.

    Not with those that wrap a sampler of the user's.
    """
    connector = trainer._data_connector
    take_away(connector, "_resolve_sampler")
    resolve = connector._resolve_sampler

    def resolve_and_note(dataloader: DataLoader[Any], shuffle: bool, mode: RunningStage | None = None) -> Any:
        sampler = resolve(dataloader, shuffle=shuffle, mode=mode)
        if mode == RunningStage.TRAINING and type(sampler) is DistributedSampler:
            note(sampler)
        return sampler

    put(connector, "_resolve_sampler", resolve_and_note)


def keeps_its_place(loader: object) -> bool:
    """Whether ``loader`` saves by itself where it stands."""
    return isinstance(loader, _Stateful)


def takes_samplers(trainer: pl.Trainer) -> bool:
    """Whether Lightning is to place samplers."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def asks_for_time(trainer: pl.Trainer) -> bool:
    """Whether ranks ask each other for the time after every batch."""
    callbacks: list[Any] = vars(trainer)["callbacks"]
    return any(
        isinstance(c, Timer) or (isinstance(c, ModelCheckpoint) and c._train_time_interval is not None)
        for c in callbacks
    )


def batches_of(trainer: pl.Trainer, total: int, members: int) -> int:
    """Return how many of ``total`` batches are dealt among ``members`` in an epoch, by ``limit_train_batches``."""
    limit = trainer.limit_train_batches
    each = math.ceil(total / members)
    if isinstance(limit, int):
        each = limit
    elif limit < 1.0:
        each = int(each * limit)
    else:
        return total
    return min(total, each * members)


def epoch_of(trainer: pl.Trainer) -> int:
    """Return the number of the epoch that is iterated, or that is next."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def is_in_step(trainer: pl.Trainer) -> bool:
    """Whether the present batch was begun and its step has not ended."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed < progress.ready)


def is_in_batch(trainer: pl.Trainer) -> bool:
    """Whether the present batch was begun and has not ended with its last hook."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.completed < progress.ready)


def fetcher_of(trainer: pl.Trainer) -> Any:
    """Return what fetches batches for the loop, which counts them in ``fetched``."""
    return trainer.fit_loop._data_fetcher


def go_by_last_batch(
    trainer: pl.Trainer, is_dealt: Callable[[], bool], iterate: Callable[[Any, Callable[[], None]], None]
) -> None:
    """Let the loop of an epoch go by the last batch, not by the number of batches, as long as ``is_dealt()``.

    Args:
        trainer: in ``fit``.
        is_dealt: whether batches are.
        iterate: called with the fetcher and a function where Lightning begins an epoch; calls that function, in which
            the loader may be iterated.
    """
    loop = trainer.fit_loop.epoch_loop
    for name in ("_num_ready_batches_reached", "reset", "on_run_start"):
        take_away(loop, name)
    reached, reset, start = loop._num_ready_batches_reached, loop.reset, loop.on_run_start

    def num_ready_batches_reached() -> bool:
        return bool(loop.batch_progress.is_last_batch) if is_dealt() else reached()

    def reset_by_last_batch() -> None:
        fit_loop = trainer.fit_loop
        share = fit_loop.max_batches
        if is_dealt():  # it asks whether an epoch that is resumed was at its end
            fit_loop.max_batches = 1 if loop.batch_progress.is_last_batch else float("inf")
        try:
            reset()
        finally:
            fit_loop.max_batches = share

    def on_run_start(data_fetcher: Any) -> None:
        if is_dealt():
            iterate(data_fetcher, lambda: start(data_fetcher))
        else:
            start(data_fetcher)

    put(loop, "_num_ready_batches_reached", num_ready_batches_reached)
    put(loop, "reset", reset_by_last_batch)
    put(loop, "on_run_start", on_run_start)


def measure_fetcher(fetcher: Any, length: Callable[[], int]) -> None:
    """Have ``fetcher`` ask for the number of batches, up to :data:`UNKNOWN`, whenever its loader is iterated."""
    take_away(fetcher, "reset")
    reset = fetcher.reset

    def reset_and_measure() -> None:
        reset()
        set_length(fetcher, length())

    put(fetcher, "reset", reset_and_measure)
    set_length(fetcher, length())


def leave_fetcher(fetcher: Any) -> None:
    """Undo :func:`measure_fetcher`; a fetcher that is replaced goes then with its epoch's batches, at once."""
    if fetcher is not None:
        take_away(fetcher, "reset")


def set_length(fetcher: Any, length: int) -> None:
    """Let ``fetcher`` have fetched the last batch when it has fetched ``length``."""
    fetcher.length = length
    fetcher.done = fetcher.fetched >= length


def end_with_next_batch(trainer: pl.Trainer) -> None:
    """Let the next batch be the last of this rank's epoch."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or fetcher.done:
        return
    if fetcher.length is not None:
        fetcher.length = min(fetcher.length, fetcher.fetched + 1)
    else:
        fetcher.iterator = iter(())  # it holds the batch that is next, and finds none after it


def end_without_batch(trainer: pl.Trainer) -> None:
    """Do at the end of an epoch what belongs to its last batch, on a rank that had none left to find out by."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is not None and fetcher.done and not loop.batch_progress.is_last_batch:
        loop.batch_progress.is_last_batch = True
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)


def restore(trainer: pl.Trainer) -> None:
    """Undo what the functions above did to ``trainer``."""
    take_away(trainer._data_connector, "_resolve_sampler")
    for name in ("_num_ready_batches_reached", "reset", "on_run_start"):
        take_away(trainer.fit_loop.epoch_loop, name)
    leave_fetcher(fetcher_of(trainer))
