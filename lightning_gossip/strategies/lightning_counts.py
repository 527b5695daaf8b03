"""The reaches into Lightning's private parts that concern what a rank counts (see :mod:`.lightning_compat`).

Written for, and tested with, lightning 2.6.6. Attributes are put on instances, and taken away by :func:`restore`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

from lightning_gossip.strategies.lightning_names import MisconfigurationException, ModelCheckpoint, Timer, call, pl
from lightning_gossip.strategies.stand_in import put, take_away


@dataclass(frozen=True)
class Counts:
    """What Lightning counts on a rank.

    Attributes:
        batches: begun in this epoch.
        steps: ``trainer.global_step``.
        logged: the abscissa of loggers.
    """

    batches: int
    steps: int
    logged: int


def counts_of(trainer: pl.Trainer) -> Counts:
    """Return what this rank has counted."""
    loop = trainer.fit_loop.epoch_loop
    return Counts(loop.batch_progress.current.ready, loop.global_step, loop._batches_that_stepped)


def set_counts(trainer: pl.Trainer, counts: Counts) -> None:
    """Let this rank go on counting from ``counts``, of whatever stage of a batch it is in."""
    loop = trainer.fit_loop.epoch_loop
    batches, steps, logged = (a - b for a, b in zip(astuple(counts), astuple(counts_of(trainer)), strict=True))
    trackers: list[Any] = [loop.batch_progress.current, loop.batch_progress.total]
    for batch_tracker in trackers:
        batch_tracker.ready += batches
        batch_tracker.started += batches
        batch_tracker.processed += batches
        batch_tracker.completed += batches
    if trainer.lightning_module.automatic_optimization:
        step_tracker = loop.automatic_optimization.optim_progress.optimizer.step.total
    else:
        step_tracker = loop.manual_optimization.optim_step_progress.total
    step_tracker.ready += steps
    step_tracker.completed += steps
    loop._batches_that_stepped += logged


@contextmanager
def counting_as(trainer: pl.Trainer, counts: Counts, is_last_batch: bool) -> Iterator[None]:
    """Have this rank count what another one does, and stand in the epoch where that stands."""
    own, progress = counts_of(trainer), trainer.fit_loop.epoch_loop.batch_progress
    own_is_last, progress.is_last_batch = progress.is_last_batch, is_last_batch
    set_counts(trainer, counts)
    try:
        yield
    finally:
        set_counts(trainer, own)
        progress.is_last_batch = own_is_last


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Whether this rank's present batch is the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether this rank is within an accumulation window."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether this rank has made as many steps as there are to be."""
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def run_validation(trainer: pl.Trainer) -> None:
    """Validate as after a batch of training."""
    loop = trainer.fit_loop.epoch_loop
    trainer.validating = True
    first = trainer._logger_connector._first_loop_iter
    if not loop._should_accumulate():
        call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
    loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first


def step_checkpoints(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """Return the callbacks that save every so many steps of training."""
    callbacks: list[Any] = list(trainer.checkpoint_callbacks)
    return [c for c in callbacks if isinstance(c, ModelCheckpoint) and c._every_n_train_steps >= 1]


def save_at_step(trainer: pl.Trainer, callback: ModelCheckpoint) -> None:
    """Let ``callback`` do what it does at the end of a batch at which its count has come."""
    batch_idx = trainer.fit_loop.epoch_loop.batch_idx
    type(callback).on_train_batch_end(callback, trainer, trainer.lightning_module, None, None, batch_idx)


def decide_batch_ends(
    trainer: pl.Trainer,
    decide: Callable[[str, Callable[[], bool]], bool],
    after: Callable[[], None],
    also_due: Callable[[], bool] = lambda: False,
) -> None:
    """Let ``decide`` say whether to validate, and whether to save, at the end of a batch; then call ``after``.

    Args:
        trainer: in ``fit``.
        decide: called with ``"validation"`` or ``"checkpoint <n>"`` (an index of :func:`step_checkpoints`), and a
            function that says what this rank's own count does.
        after: called at the end of every batch, after the validation that may belong to it.
        also_due: whether to validate in an epoch with validation, besides where Lightning's count says so.
    """
    loop = trainer.fit_loop.epoch_loop
    take_away(loop, "on_advance_end")  # the learning-rate finder begins a training twice in one set-up
    take_away(loop, "_should_check_val_fx")
    end, check = loop.on_advance_end, loop._should_check_val_fx
    decided: bool | None = None  # at a batch's end

    def should_check(data_fetcher: Any) -> bool:
        return check(data_fetcher) if decided is None else decided

    def on_advance_end(data_fetcher: Any) -> None:
        nonlocal decided
        due = lambda: check(data_fetcher) or (loop._should_check_val_epoch() and also_due())  # noqa: E731
        decided = decide("validation", lambda: not loop._skip_next_val and due())
        loop._skip_next_val = False
        try:
            end(data_fetcher)
        finally:
            decided = None
        after()

    put(loop, "_should_check_val_fx", should_check)
    put(loop, "on_advance_end", on_advance_end)
    for index, callback in enumerate(step_checkpoints(trainer)):

        def on_train_batch_end(
            trainer: pl.Trainer,
            *args: Any,
            _callback: ModelCheckpoint = callback,
            _what: str = f"checkpoint {index}",
            **kwargs: Any,
        ) -> None:
            if decide(_what, lambda: trainer.global_step % _callback._every_n_train_steps == 0):
                type(_callback).on_train_batch_end(_callback, trainer, *args, **kwargs)

        take_away(callback, "on_train_batch_end")
        put(callback, "on_train_batch_end", on_train_batch_end)


def after_loading(trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` whenever training data was loaded."""
    loop = trainer.fit_loop
    take_away(loop, "setup_data")
    setup_data = loop.setup_data
    loaded: list[Any] = [None]

    def setup_then_call() -> None:
        setup_data()
        if loop._data_fetcher is not loaded[0]:
            loaded[0] = loop._data_fetcher
            function()

    put(loop, "setup_data", setup_then_call)


def share_validation_lengths(trainer: pl.Trainer, gather: Callable[[Any], list[Any]]) -> None:
    """Let a rank without batches take part in evaluations in which others have some."""
    loops: list[Any] = [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop]
    for loop in loops:
        take_away(loop, "setup_data")

        def setup_data(loop: Any = loop, setup: Callable[[], None] = loop.setup_data) -> None:
            before = loop._max_batches
            setup()
            if loop._max_batches is not before:
                lengths = gather(loop._max_batches)
                if not sum(loop._max_batches) and any(map(sum, lengths)):
                    loop._max_batches = [float("inf")] * len(loop._max_batches)  # it ends when nothing comes

        put(loop, "setup_data", setup_data)


def number_of_batches(trainer: pl.Trainer) -> float:
    """Return how many batches this rank has an epoch, ``inf`` where that is not known."""
    return trainer.fit_loop.max_batches


def begin_without_batches(trainer: pl.Trainer) -> None:
    """Let a rank that has none go through the epochs of those that have."""
    loop = trainer.fit_loop
    loop.max_batches = float("inf")  # an epoch ends when nothing comes
    loop._last_train_dl_reload_epoch = trainer.current_epoch


def refuse_times(trainer: pl.Trainer, strategy: str, lengths: list[float]) -> None:
    """Raise ``MisconfigurationException`` where ranks of unequal lengths would ask each other for the time."""
    callbacks: list[Any] = vars(trainer)["callbacks"]
    timers = [
        "`max_time` (a `Timer`)" if isinstance(c, Timer) else "`ModelCheckpoint(train_time_interval=…)`"
        for c in callbacks
        if isinstance(c, Timer) or (isinstance(c, ModelCheckpoint) and c._train_time_interval is not None)
    ]
    if timers:
        raise MisconfigurationException(
            f"{timers[0]} asks all ranks for the time after every batch, but under {strategy} the ranks have unequal"
            f" numbers of batches, {lengths}, and those that are done can not answer. Give all ranks the same number"
            " (`Trainer(limit_train_batches=…)`), or count steps: `max_steps`, `every_n_train_steps`."
        )


def restore(trainer: pl.Trainer) -> None:
    """Undo what the functions above did to ``trainer``."""
    fit_loop = trainer.fit_loop
    loops: list[Any] = [fit_loop, fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop]
    changed: list[tuple[Any, str]] = [(loop, "setup_data") for loop in loops]
    changed += [(fit_loop.epoch_loop, name) for name in ("on_advance_end", "_should_check_val_fx")]
    changed += [(callback, "on_train_batch_end") for callback in step_checkpoints(trainer)]
    for owner, attribute in changed:
        take_away(owner, attribute)
