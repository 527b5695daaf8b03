"""Every reach into Lightning's private parts. Written for, and tested with, lightning 2.6.6.

Lightning 2.6 broadcasts from rank 0 before every batch (``_TrainingEpochLoop._broadcast_sigterm_tensor``) and in its
SIGTERM handler (``_SignalConnector._sigterm_notifier_fn``): both would make every rank wait for rank 0. And it has no
strategy hook around the optimization of a batch. The functions here put attributes on instances, never on classes;
:func:`restore` takes them away.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.distributed import Store, distributed_c10d

from lightning_gossip.strategies.lightning_names import (
    AsyncCheckpointIO,
    CheckpointIO,
    MisconfigurationException,
    ModelCheckpoint,
    _get_sigkill_signal,
    _optimizers_to_device,
    _set_sampler_epoch,
    call,
    is_overridden,
    pl,
)
from lightning_gossip.strategies.stand_in import put, take_away
from lightning_gossip.strategies.window import ConsensusWindow

log = logging.getLogger(__name__)

SIGKILL = _get_sigkill_signal()
"""What Lightning sends to its children after a KeyboardInterrupt."""


optimizers_to_device = _optimizers_to_device
"""Move the state of optimizers to a device."""


def run_store() -> Store:
    """Return the store on which the default process group was made."""
    return distributed_c10d._get_default_store()


def stop_broadcasting_before_batches(trainer: pl.Trainer, check: Callable[[], None]) -> None:
    """Call ``check`` before every training batch, in place of Lightning's broadcast from rank 0."""
    put(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", check)


def handle_sigterm(trainer: pl.Trainer, handler: Callable[[], None]) -> None:
    """Call ``handler`` when SIGTERM arrives, in place of Lightning's, which runs a collective in the handler."""
    connector = trainer._signal_connector

    def notify(signum: Any, _: Any) -> None:
        connector.received_sigterm = True
        handler()

    put(connector, "_sigterm_notifier_fn", notify)


def handle_requeue_signal(trainer: pl.Trainer, handler: Callable[[], None]) -> None:
    """Call ``handler`` when SLURM says that the job ends soon, in place of Lightning's, which saves where it stands."""

    def note(*_: Any) -> None:
        handler()

    put(trainer._signal_connector, "_slurm_sigusr_handler_fn", note)


def save_for_requeue(trainer: pl.Trainer) -> None:
    """Save the checkpoint from which Lightning goes on in a requeued job; called on all ranks."""
    for logger in trainer.loggers:
        logger.finalize("finished")
    with _as_in_last_hook(trainer):
        trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))


@contextmanager
def _as_in_last_hook(trainer: pl.Trainer) -> Iterator[None]:
    """At an epoch's last batch, count as in its hook ``on_train_batch_end``.

    Lightning ends that epoch where it resumes from such a save; from one made after the hook, without a validation, it
    would train one batch more.
    """
    loop = trainer.fit_loop.epoch_loop
    trackers: list[Any] = [loop.batch_progress.current, loop.batch_progress.total]
    shift = int(loop.batch_progress.is_last_batch and trackers[0].completed == trackers[0].processed)
    for tracker in trackers:
        tracker.completed -= shift
    loop._batches_that_stepped -= shift
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.completed += shift
        loop._batches_that_stepped += shift


def requeue_slurm_job() -> None:
    """Have SLURM run this job again, as Lightning does."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{task}"
    if job is None:
        log.warning("SLURM_JOB_ID is not set: the job is not requeued")
        return
    try:
        code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        log.warning("requeueing SLURM job %s failed: %s", job, error)
        return
    if code == 0:
        log.info("requeued SLURM job %s", job)
    else:
        log.warning("requeueing SLURM job %s failed with exit code %d", job, code)


def run_steps_between(trainer: pl.Trainer, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Run the optimization of every batch that ends an accumulation window between ``begin()`` and ``end()``.

    The first is called after the hooks of ``on_train_batch_start`` and before ``training_step``, the other after the
    optimizer's update and before schedulers and the hooks of ``on_train_batch_end``, under automatic and manual
    optimization alike, whether or not an optimizer stepped; not where it raised.
    """
    loop = trainer.fit_loop.epoch_loop
    for optimization in (loop.automatic_optimization, loop.manual_optimization):

        def run(*args: Any, _run: Callable[..., Any] = optimization.run, **kwargs: Any) -> Any:
            # asking the loop costs as much as all else here
            if trainer.accumulate_grad_batches > 1 and trainer.fit_loop._should_accumulate():
                return _run(*args, **kwargs)
            begin()
            output = _run(*args, **kwargs)
            end()
            return output

        put(optimization, "run", run)


def allow_skipped_steps(trainer: pl.Trainer) -> None:
    """Let ``training_step`` return None on some rank: no collective waits for its gradients."""
    optimization = trainer.fit_loop.epoch_loop.automatic_optimization

    def training_step(kwargs: Any) -> Any:
        output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
        return optimization.output_result_cls.from_training_step_output(output, trainer.accumulate_grad_batches)

    put(optimization, "_training_step", training_step)


def before_iterating(trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` once, after ``train_dataloader()`` and before the loader is iterated."""
    loop = trainer.fit_loop
    loop._combined_loader = None  # `estimated_stepping_batches`, in `configure_optimizers`, has made and iterated it
    load_states = loop._load_combined_loader_states

    def load_states_then_call() -> None:
        load_states()
        take_away(loop, "_load_combined_loader_states")
        if loop._combined_loader is not None:
            for loader in loop._combined_loader.flattened:  # Lightning sets the epoch after this iterator is made
                _set_sampler_epoch(loader, trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        function()

    put(loop, "_load_combined_loader_states", load_states_then_call)


def after_each_epoch(trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` after the last batch of every training epoch, and the validation that may follow it."""
    loop = trainer.fit_loop.epoch_loop
    take_away(loop, "run")  # the learning-rate finder begins a training twice in one set-up
    run_epoch = loop.run

    def run(*args: Any, **kwargs: Any) -> None:
        run_epoch(*args, **kwargs)
        function()

    put(loop, "run", run)


def before_training_ends(trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` after the last epoch, before the hooks of ``on_train_end``, in which callbacks swap weights."""
    loop = trainer.fit_loop
    end_run = loop.on_run_end

    def on_run_end() -> None:
        function()
        end_run()

    put(loop, "on_run_end", on_run_end)


def share_monitored_metrics(trainer: pl.Trainer, broadcast: Callable[[Any], Any]) -> None:
    """Let every ``ModelCheckpoint`` decide by rank 0's metrics: one decision and one file name for all ranks."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):

            def candidates(trainer: pl.Trainer, _own: Callable[..., Any] = callback._monitor_candidates) -> Any:
                return broadcast(_own(trainer))

            put(callback, "_monitor_candidates", candidates)


def may_swap_in_validation(trainer: pl.Trainer) -> bool:
    """Whether the module or a callback does anything at the start of a validation's epoch."""
    hook = "on_validation_epoch_start"
    callbacks: list[Any] = vars(trainer)["callbacks"]
    return is_overridden(hook, trainer.lightning_module) or any(
        getattr(type(callback), hook) is not getattr(pl.Callback, hook) or hook in vars(callback)
        for callback in callbacks
    )


def open_in_validation(trainer: pl.Trainer, window: ConsensusWindow) -> None:
    """Open and close ``window`` in every validation of a ``fit``; the strategy's own hooks, the last, do the rest.

    Lightning calls callbacks, then the module, then the strategy, at the start of a validation and at its end.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    run, start = loop.run, loop.on_run_start
    begin_epoch, end_epoch, end = (
        loop._on_evaluation_epoch_start,
        loop._on_evaluation_epoch_end,
        loop._on_evaluation_end,
    )

    def run_closing() -> Any:
        try:
            return run()
        except BaseException:
            window.before_exception_hooks()
            raise

    def on_run_start() -> None:
        window.before_start_hooks()
        start()

    def on_evaluation_epoch_start() -> None:
        begin_epoch()
        window.after_epoch_start_hooks()

    def on_evaluation_epoch_end() -> None:
        window.before_epoch_end_hooks()
        end_epoch()

    def on_evaluation_end() -> None:
        window.before_end_hooks()
        end()

    put(loop, "run", run_closing)
    put(loop, "on_run_start", on_run_start)
    put(loop, "_on_evaluation_epoch_start", on_evaluation_epoch_start)
    put(loop, "_on_evaluation_epoch_end", on_evaluation_epoch_end)
    put(loop, "_on_evaluation_end", on_evaluation_end)


def before_validations(trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` before every validation of a ``fit``, and before anybody's hooks of it."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = loop.run

    def run_after() -> Any:
        function()
        return run()

    put(loop, "run", run_after)


def save_within(trainer: pl.Trainer, saving: Callable[[], AbstractContextManager[None]]) -> None:
    """Run ``trainer.save_checkpoint`` within ``saving()``, and all hooks that look at the module and its state."""
    save = trainer.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        with saving():
            save(*args, **kwargs)

    if "save_checkpoint" not in vars(trainer):
        put(trainer, "save_checkpoint", save_checkpoint)


def after_saving(checkpoint_io: CheckpointIO, function: Callable[[], None]) -> None:
    """Call ``function`` once what ``save_checkpoint`` was given last is written: an asynchronous one may do so later.

    Where that writing fails, which Lightning reports at the next save, it is not called.
    """
    if not isinstance(checkpoint_io, AsyncCheckpointIO) or checkpoint_io._executor is None:
        function()
        return

    def run() -> None:
        if checkpoint_io._error is None:
            function()

    checkpoint_io._executor.submit(run)


def restore(trainer: pl.Trainer) -> None:
    """Undo what the functions above did to ``trainer``."""
    loop = trainer.fit_loop.epoch_loop
    changed: list[tuple[Any, str]] = [
        (loop, "_broadcast_sigterm_tensor"),
        (loop, "run"),
        (loop.automatic_optimization, "run"),
        (loop.automatic_optimization, "_training_step"),
        (loop.manual_optimization, "run"),
        (trainer.fit_loop, "_load_combined_loader_states"),
        (trainer.fit_loop, "on_run_end"),
        (trainer.fit_loop, "setup_data"),
        (loop.val_loop, "setup_data"),
        (trainer._signal_connector, "_sigterm_notifier_fn"),
        (trainer._signal_connector, "_slurm_sigusr_handler_fn"),
        (trainer, "save_checkpoint"),
    ]
    in_validation = ("run", "on_run_start", *(f"_on_evaluation_{hook}" for hook in ("epoch_start", "epoch_end", "end")))
    changed += [(loop.val_loop, attribute) for attribute in in_validation]
    changed += [(callback, "_monitor_candidates") for callback in trainer.checkpoint_callbacks]
    for owner, attribute in changed:
        take_away(owner, attribute)


def is_resuming(trainer: pl.Trainer) -> bool:
    """Whether a checkpoint was loaded for this call of the trainer: Lightning loads it before ``strategy.setup``."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def is_fitting(trainer: pl.Trainer | None) -> bool:
    """Whether the trainer is inside ``fit``, its validations included."""
    return trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"


def most_steps(trainer: pl.Trainer) -> float:
    """Return how many steps this ``fit`` may still make, once its loaders are there; infinite where nobody knows."""
    batches = 1.0 * trainer.num_training_batches
    windows = batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - trainer.current_epoch
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps - trainer.global_step
    return min(windows * epochs if windows else 0.0, steps)


def logging_step(trainer: pl.Trainer) -> int:
    """Return the abscissa under which Lightning logs the metrics of the present training step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def show_in_progress_bar(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Show ``metrics`` until they are set again; unlike ``LightningModule.log``, nothing else sees them."""
    trainer._logger_connector._progress_bar_metrics.update(metrics)


def refuse_unsupported(trainer: pl.Trainer, strategy: str, layer_sync: object) -> None:
    """Raise ``MisconfigurationException`` for features that replicas of their own can not have (design §4).

    The batch-size finder is among them; Lightning refuses it with several devices by itself.
    """
    if layer_sync is not None:
        raise MisconfigurationException(
            f"`Trainer(sync_batchnorm=True)` runs a collective in every layer of every step, which {strategy} exists"
            " to avoid. Leave it off: BatchNorm statistics are averaged whenever the consensus model is built."
        )
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        raise MisconfigurationException(
            f"A time-based `val_check_interval` makes each rank validate at a moment of its own, but under {strategy}"
            " all ranks validate together. Give a number of batches or a fraction of an epoch."
        )
