"""What all strategies with replicas share: the life of a ``fit`` and of its steps (design §2, §3)."""

from __future__ import annotations

from abc import abstractmethod
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.distributed import Store
from typing_extensions import override

from lightning_gossip.arguments import check_choice, check_timeout
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.models import check_models_agree, rank_zeros, take
from lightning_gossip.strategies import lightning_compat, lightning_counts, lightning_members
from lightning_gossip.strategies.consensus import Evaluate
from lightning_gossip.strategies.dealing import DealingStrategy, EpochEnds
from lightning_gossip.strategies.lightning_names import Accelerator, CheckpointIO, ClusterEnvironment, Precision, pl
from lightning_gossip.strategies.meeting import TIMEOUT, StartMethod
from lightning_gossip.strategies.surviving import LOST_AFTER, NonFinite

__all__ = ["LOST_AFTER", "TIMEOUT", "EpochEnds", "Evaluate", "NonFinite", "ReplicaStrategy", "StartMethod"]


class ReplicaStrategy(DealingStrategy):
    """Every rank trains its own replica; a subclass says how replicas are pulled together.

    Args:
        evaluate: what validation and test during and after ``fit`` run on: ``"consensus"``, the mean of the replicas,
            the data sharded over the ranks; or ``"replica"``, each rank's own on the whole data.
        timeout: how long a rank waits for one that gives no sign of life.
        min_replicas, restarts, lost_after, nonfinite: see
            :class:`~lightning_gossip.strategies.surviving.SurvivingStrategy`.
        dealt, epoch_ends: see :class:`~lightning_gossip.strategies.dealing.DealingStrategy`.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend,
            start_method: as for Lightning's ``DDPStrategy``.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(
        self,
        *,
        evaluate: Evaluate,
        timeout: timedelta,
        min_replicas: int | None = None,
        restarts: int = 0,
        lost_after: timedelta = LOST_AFTER,
        nonfinite: NonFinite | None = None,
        dealt: bool | None = None,
        epoch_ends: EpochEnds = "all",
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        cluster_environment: ClusterEnvironment | None,
        checkpoint_io: CheckpointIO | None,
        precision_plugin: Precision | None,
        process_group_backend: str | None,
        start_method: StartMethod,
    ) -> None:
        super().__init__(
            evaluate=evaluate,
            min_replicas=min_replicas,
            restarts=restarts,
            lost_after=lost_after,
            nonfinite=nonfinite,
            dealt=dealt,
            epoch_ends=epoch_ends,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=check_choice("process_group_backend", process_group_backend, (None, "gloo", "nccl")),
            timeout=check_timeout("timeout", timeout),
            start_method=check_choice("start_method", start_method, ("popen", "spawn", "fork", "forkserver")),
        )

    # -- what a subclass does -----------------------------------------------------------------------------------

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The strategy's arguments as JSON-able values, defaults filled in, for a run's metadata."""
        return {
            "evaluate": self.evaluate,
            "timeout": self.timeout_seconds,
            "min_replicas": self.min_replicas,
            "restarts": self.restarts,
            "lost_after": self.lost_after.total_seconds(),
            "nonfinite": self.nonfinite,
            "dealt": self.dealt,
            "epoch_ends": self.epoch_ends,
            "process_group_backend": self.process_group_backend,
            "start_method": self._start_method,
        }

    @abstractmethod
    def start_training(self, trainer: pl.Trainer, control: Control, store: Store) -> None:
        """Set up for a ``fit``; all replicas are equal. ``store`` is a connection that nobody blocks."""

    @abstractmethod
    def begin_step(self) -> None:
        """Begin a step, just before ``training_step``."""

    @abstractmethod
    def end_step(self) -> None:
        """End a step, after the optimizer's update."""

    @abstractmethod
    def settle(self) -> None:
        """Complete what is under way at the end of training."""

    @abstractmethod
    def end_training(self) -> None:
        """Release what :meth:`start_training` made, on every ending; may be called twice."""

    @abstractmethod
    def give_up(self) -> None:
        """Give up what is under way: the replicas are about to be replaced. Called on all ranks, who have met."""

    def begin_anew(self) -> None:
        """Go on from the module's present parameters, which all ranks share."""

    def begin_optimizers_anew(self) -> None:
        """Forget what optimizers made of a replica that was not finite."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def adopt_rank_zero(self) -> None:
        """Make every rank's module, and what a server holds, rank 0's present parameters and buffers.

        Call it on all ranks at the same point of a ``fit``, between two steps: in a hook of a batch's or an epoch's
        start or end, say after rank 0 has gone back to weights that it kept, or has initialised a layer anew. Exchanges
        under way are dropped. Optimizers keep their state, but for the one on a server, which begins anew.

        Raises:
            RuntimeError: outside ``fit``, and within a validation, whose module holds the consensus model.
        """
        if self._consensus is None:
            raise RuntimeError("adopt_rank_zero() is for the middle of a `fit`; after it, call adopt_consensus()")
        if self._consensus.holds:
            raise RuntimeError(
                "adopt_rank_zero() was called within a validation, where the module holds the consensus model for the"
                " moment: call it in a hook of training, such as `on_train_epoch_end`"
            )
        self._meet("adopt_rank_zero")
        self.give_up()
        self._take_rank_zeros("nothing is under way")
        self.begin_anew()

    def _take_rank_zeros(self, reason: str) -> None:
        take(self._module, self._together(reason, partial(rank_zeros, self._module)))

    # -- set-up -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        lightning_compat.refuse_unsupported(trainer, type(self).__name__, self._layer_sync)
        module = self._module
        if self.accelerator is not None:
            self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        lightning_compat.handle_sigterm(trainer, self._receive_sigterm)
        lightning_compat.handle_requeue_signal(trainer, self._receive_requeue_signal)
        lightning_counts.share_validation_lengths(trainer, self.gather)
        if self.survives:
            lightning_members.share_log_folders(trainer, self.broadcast)
        self._meet_in_metrics(module)
        fitting = lightning_compat.is_fitting(trainer)
        if fitting:
            self._together("the check that all ranks have the same model", partial(check_models_agree, module))
        # replicas differ on purpose where they are evaluated after a fit, and where a checkpoint was loaded
        fresh = not lightning_compat.is_resuming(trainer)
        if fresh and (fitting or self.evaluate == "consensus"):
            self._take_rank_zeros("rank 0's parameters")
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            lightning_compat.optimizers_to_device(self.optimizers, self.root_device)
            self._set_up_training(trainer, module)

    def _set_up_training(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._set_up_consensus(trainer, module)
        self.start_training(trainer, self.control, self._connect())
        self._resume_training(trainer)
        lightning_compat.stop_broadcasting_before_batches(trainer, self._before_batch)
        lightning_compat.run_steps_between(trainer, self._begin, self._end)
        lightning_compat.allow_skipped_steps(trainer)
        lightning_compat.share_monitored_metrics(trainer, self.broadcast)
        self._set_up_counting(trainer, self._refuse_unequal_lengths, self._after_batch)
        if self.survives:
            meet = partial(self._meet, "the dealing of the data")
            lightning_members.deal_anew(trainer, meet, self.dealt_among, self._note_dealing)

    def _refuse_unequal_lengths(self, lengths: list[float]) -> None:
        if self.process_group_backend == "nccl" and self.world_size > 1:
            raise lightning_compat.MisconfigurationException(
                f"The ranks have unequal or unknown numbers of training batches, {lengths}, which is not supported"
                " on NCCL. Give all ranks the same number, or set `process_group_backend='gloo'`."
            )

    def _require_trainer(self) -> pl.Trainer:
        return self._module.trainer

    # -- steps --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        with self.control.reaching_store():
            if not self._has_begun:
                self._begin_first_step()
            self.begin_step()

    def _end(self) -> None:
        with self.control.reaching_store():
            self.end_step()

    def _after_batch(self) -> None:
        self._answer_call()
        if (control := self._member_control) is not None and control.guest is not None:
            self._take_in_guest()

    def _before_batch(self) -> None:
        control = self.control
        control.check()
        if control.asked_to_end:
            self._require_trainer().should_stop = True
        if self._counting is not None:
            self._counting.before_batch()

    # -- endings ------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self) -> None:
        self._tell_over()
        self.settle()
        super().on_train_end()

    @override
    def teardown(self) -> None:
        if not self._failed:
            self.end_resumed()
            self._meet("the end")
        self.end_training()
        if self._trainer is not None:
            lightning_compat.restore(self._trainer)
            lightning_counts.restore(self._trainer)
        super().teardown()
