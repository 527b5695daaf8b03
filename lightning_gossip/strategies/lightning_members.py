"""The reaches into Lightning's private parts that concern ranks that may be lost (see :mod:`.lightning_compat`).

Written for, and tested with, lightning 2.6.6. Attributes are put on instances; :func:`.lightning_compat.restore` takes
them away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import _prctl_pr_set_pdeathsig

from lightning_gossip.strategies.lightning_compat import is_fitting
from lightning_gossip.strategies.lightning_names import (
    CSVLogger,
    DDPStrategy,
    TensorBoardLogger,
    _check_bad_cuda_fork,
    _check_missing_main_guard,
    _GlobalStateSnapshot,
    _MultiProcessingLauncher,
    pl,
    rank_zero_only,
    reset_seed,
)
from lightning_gossip.strategies.stand_in import put, take_away


def refuse_bad_start(launcher: _MultiProcessingLauncher, trainer: pl.Trainer | None) -> None:
    """Raise where Lightning's launcher would not start processes: CUDA before a fork, no main guard, a second fit."""
    if launcher._start_method == "spawn":
        _check_missing_main_guard()
    else:
        _check_bad_cuda_fork()
    if launcher._already_fit and is_fitting(trainer):
        raise NotImplementedError("`fit` works once a Trainer where it starts processes: make a new Trainer")


def global_states(start_method: str) -> tuple[Any, ...]:
    """Return what Lightning's launcher gives to processes besides, by its start method."""
    return (_GlobalStateSnapshot.capture(),) if start_method == "spawn" else ()


def outlive_parent() -> None:
    """Undo what :mod:`torch.multiprocessing` asks for in a process: SIGINT where its parent ends."""
    _prctl_pr_set_pdeathsig(0)


def begin_ranks(strategy: DDPStrategy) -> None:
    """Do what Lightning's ``setup_distributed`` does before it makes a process group."""
    reset_seed()
    strategy.set_world_ranks()


def take_over_from_rank_zero(trainer: pl.Trainer | None) -> None:
    """Let this process do what only rank 0 does: what is decorated so, loggers, and the progress bar."""
    setattr(rank_zero_only, "rank", 0)  # noqa: B010 - a function's attribute
    if trainer is not None and trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.enable()


def be_no_rank_zero(rank: int) -> None:
    """Let this process do nothing that only rank 0 does: it has joined, and another has those duties."""
    setattr(rank_zero_only, "rank", max(1, rank))  # noqa: B010 - a function's attribute


def resume_from(trainer: pl.Trainer, load: Callable[[], dict[str, Any]]) -> None:
    """Let this call of ``fit`` resume from what ``load`` returns, whatever checkpoint it was given."""
    connector = trainer._checkpoint_connector

    def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        take_away(connector, "resume_start")
        connector._ckpt_path = None
        connector._loaded_checkpoint = load()

    put(connector, "resume_start", resume_start)


def tear_down(trainer: pl.Trainer) -> None:
    """Release what a call of ``fit`` holds that has not come to its end, for another one of the same Trainer."""
    trainer._teardown()
    trainer.training = True


def is_between_steps(trainer: pl.Trainer) -> bool:
    """Whether a rank can go on from the state in which this one is at the end of a batch, in the same epoch."""
    loop = trainer.fit_loop
    ends = loop.epoch_loop.batch_progress.is_last_batch or loop.epoch_loop._num_ready_batches_reached()
    return not (ends or trainer.should_stop or loop._should_accumulate() or _makes_last_step(trainer))


def _makes_last_step(trainer: pl.Trainer) -> bool:
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def dumped(trainer: pl.Trainer) -> dict[str, Any]:
    """Return this rank's whole checkpoint, as Lightning makes it, less what nobody needs to go on."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    constructor = [name for name in checkpoint if "hyper_parameters" in name or "hparams" in name]
    return {name: value for name, value in checkpoint.items() if name not in constructor}


def share_log_folders(trainer: pl.Trainer, broadcast: Callable[[Any], Any]) -> None:
    """Let every rank's loggers know rank 0's folder: one of them may have to go on in it."""
    for logger in trainer.loggers:
        if isinstance(logger, (TensorBoardLogger, CSVLogger)) and logger._version is None:
            logger._version = broadcast(logger.version if trainer.is_global_zero else None)


def deal_anew(
    trainer: pl.Trainer, meet: Callable[[], None], dealt_among: Callable[[], Any], note: Callable[[], None]
) -> None:
    """Make the loaders of training and validation anew, by their data sets, wherever others take part than before.

    Args:
        trainer: in ``fit``.
        meet: waits for all that take part; called before every epoch and validation.
        dealt_among: returns among whom data is dealt that is loaded now.
        note: called when the training's was dealt.
    """
    _deal_anew_in(trainer.fit_loop, meet, dealt_among, note)
    _deal_anew_in(trainer.fit_loop.epoch_loop.val_loop, meet, dealt_among, lambda: None)


def _deal_anew_in(
    loop: Any, meet: Callable[[], None], dealt_among: Callable[[], Any], note: Callable[[], None]
) -> None:
    set_up = loop.setup_data
    dealt: list[Any] = []

    def setup_data() -> None:
        meet()  # whether or not there is a loader here: one that has joined has none yet
        if dealt and dealt != [dealt_among()]:
            loop._combined_loader = None
        before = loop._combined_loader
        set_up()
        if loop._combined_loader is not before:
            dealt[:] = [dealt_among()]
            note()

    put(loop, "setup_data", setup_data)
