"""What all strategies with replicas share: start, exchange clock, consensus windows and checkpoints (design §2-§4)."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed import Store
from torchmetrics import Metric
from typing_extensions import override

from lightning_gossip import checkpoint as files
from lightning_gossip import lightning_compat
from lightning_gossip.arguments import check_choice, check_timeout
from lightning_gossip.consensus import Consensus, average_state
from lightning_gossip.control import Control
from lightning_gossip.models import check_models_agree, take_rank_zeros
from lightning_gossip.strategies.meeting import TIMEOUT, MeetingStrategy, StartMethod

__all__ = ["TIMEOUT", "Evaluate", "ReplicaStrategy", "StartMethod"]

Evaluate = Literal["consensus", "replica"]


class ReplicaStrategy(MeetingStrategy):
    """Every rank trains its own replica; a subclass says how replicas are pulled together.

    Args:
        evaluate: what validation and test during and after ``fit`` run on: ``"consensus"``, the mean of the replicas,
            the data sharded over the ranks; or ``"replica"``, each rank's own on the whole data.
        timeout: how long a rank waits for one that gives no sign of life.
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
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        cluster_environment: ClusterEnvironment | None,
        checkpoint_io: CheckpointIO | None,
        precision_plugin: Precision | None,
        process_group_backend: str | None,
        start_method: StartMethod,
    ) -> None:
        self.evaluate = check_choice("evaluate", evaluate, ("consensus", "replica"))
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=check_choice("process_group_backend", process_group_backend, (None, "gloo", "nccl")),
            timeout=check_timeout("timeout", timeout),
            start_method=check_choice("start_method", start_method, ("popen", "spawn", "fork", "forkserver")),
        )
        self.consensus_distance: float | None = None  # when the consensus model was last built
        self.consensus_built = 0  # how often it was built
        self._consensus: Consensus | None = None
        self._unsynced: list[tuple[Metric, Any]] = []  # torchmetrics objects, and when they sync otherwise
        self._dumped: dict[str, Any] = {}  # this replica's state, as last given to a checkpoint
        self._resume: dict[str, Any] | None = None  # this package's entry in the checkpoint that is resumed
        self._saved: dict[str, str] = {}  # id of the last save to a path

    # -- what a subclass does -----------------------------------------------------------------------------------

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The strategy's arguments as JSON-able values, defaults filled in, for a run's metadata."""
        return {
            "evaluate": self.evaluate,
            "timeout": self.timeout_seconds,
            "process_group_backend": self.process_group_backend,
            "start_method": self._start_method,
        }

    @abstractmethod
    def start_training(self, trainer: pl.Trainer, control: Control, store: Store) -> None:
        """Set up for a ``fit``; all replicas are equal. ``store`` is a connection that nobody blocks."""

    def make_consensus(self, module: pl.LightningModule) -> Consensus:
        """Return what builds the consensus model in a ``fit``: the mean of the replicas, unless a subclass differs."""
        return Consensus(module, self.world_size)

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
    def training_state(self) -> dict[str, Any]:
        """Return what this rank needs to continue, as tensors and primitives; called on all ranks at one clock."""

    def continue_from(self, step: int) -> None:
        """Set the exchange clock, where a training goes on from a consensus model."""

    @abstractmethod
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`training_state` returned."""

    # -- set-up -------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        self._resume = None
        super().setup_environment()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        lightning_compat.refuse_unsupported(trainer, type(self).__name__, self._layer_sync)
        module = self._module
        if self.accelerator is not None:
            self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        lightning_compat.handle_sigterm(trainer, self._receive_sigterm)
        fitting = lightning_compat.is_fitting(trainer)
        if fitting:
            self._meet("the check that all ranks have the same model")
            check_models_agree(module, self.global_rank, self.world_size)
        # replicas differ on purpose where they are evaluated after a fit, and where a checkpoint was loaded
        fresh = not lightning_compat.is_resuming(trainer)
        if fresh and (fitting or self.evaluate == "consensus"):
            take_rank_zeros(module, self.world_size)
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            lightning_compat.optimizers_to_device(self.optimizers, self.root_device)
            self._set_up_training(trainer, module)

    def _set_up_training(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._consensus = self.make_consensus(module)
        self.start_training(trainer, self.control, self._connect())
        resume = self._resume
        if resume is not None and "state" in resume:
            self.load_training_state(resume["state"])
            lightning_compat.before_iterating(trainer, lambda: files.restore_rng_state(resume["rng"]))
        elif resume is not None:
            self.continue_from(resume["step"])
        lightning_compat.stop_broadcasting_before_batches(trainer, self._before_batch)
        lightning_compat.run_steps_within(trainer, self._step)
        lightning_compat.allow_skipped_steps(trainer)
        lightning_compat.share_monitored_metrics(trainer, self.broadcast)
        if self.evaluate == "consensus":
            averages = lightning_compat.weight_averages(trainer)
            lightning_compat.validate_mean_of_averages(averages, Consensus(module, self.world_size), self._meet)

    @override
    def on_train_start(self) -> None:
        lengths = self.gather(self._require_trainer().num_training_batches)
        if len(set(lengths)) > 1 or lengths[0] == float("inf"):
            if self.process_group_backend == "nccl":
                raise lightning_compat.MisconfigurationException(
                    f"The ranks have unequal or unknown numbers of training batches, {lengths}, which is not supported"
                    " on NCCL. Give all ranks the same number, or set `process_group_backend='gloo'`."
                )
            lightning_compat.after_each_epoch(self._require_trainer(), lambda: self._meet("the end of an epoch"))

    def _require_trainer(self) -> pl.Trainer:
        return self._module.trainer

    # -- steps --------------------------------------------------------------------------------------------------

    def _before_batch(self) -> None:
        self.control.check()
        if self.control.asked_to_end:
            self._require_trainer().should_stop = True

    @contextmanager
    def _step(self) -> Iterator[None]:
        self.begin_step()
        yield
        self.end_step()

    # -- consensus ----------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self.evaluate == "replica" and self._trainer is not None and not self._trainer.training:
            return {"num_replicas": 1, "rank": 0}  # each rank evaluates its own replica on the whole data
        return super().distributed_sampler_kwargs

    def _enter_consensus(self, consensus: Consensus, reason: str) -> None:
        self._meet(f"consensus for {reason}")
        self.consensus_distance = consensus.enter()
        self.consensus_built += 1

    def adopt_consensus(self) -> None:
        """Make every rank's module the consensus model; call it on all ranks, after ``fit``.

        Raises:
            RuntimeError: where the other replicas are out of reach: in the launching process of spawn and fork, whose
                ranks have ended, or before any ``fit``.
        """
        if self.world_size > 1 and not dist.is_initialized():
            raise RuntimeError(
                "adopt_consensus() needs the other ranks, and they are not there: with `start_method='spawn'` and"
                " 'fork' their processes end with `fit`. Use `evaluate='consensus'`, or start with 'popen' or torchrun."
            )
        module = self._module
        device = module.device
        self._meet("adopt_consensus")
        module.to(self.root_device)
        Consensus(module, self.world_size).adopt()
        module.to(device)

    @override
    def on_validation_start(self) -> None:
        self._start_evaluation()
        if self.evaluate == "consensus" and self._consensus is not None:
            self._enter_consensus(self._consensus, "validation")

    @override
    def on_validation_end(self) -> None:
        if self._consensus is not None:
            self._consensus.leave()
        self._end_evaluation()

    @override
    def on_test_start(self) -> None:
        self._start_evaluation()

    @override
    def on_test_end(self) -> None:
        self._end_evaluation()

    def _start_evaluation(self) -> None:
        """Keep torchmetrics objects from pooling the ranks' results where each rank evaluates its own replica."""
        if self.evaluate == "replica":
            self._unsynced = [(m, m.distributed_available_fn) for m in self._module.modules() if isinstance(m, Metric)]
            for metric, _ in self._unsynced:
                metric.distributed_available_fn = _not_available

    def _end_evaluation(self) -> None:
        for metric, available in self._unsynced:
            metric.distributed_available_fn = available
        self._unsynced = []

    # -- checkpoints --------------------------------------------------------------------------------------------

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = files.AtomicCheckpointIO()
        elif files.is_wrapper(self._checkpoint_io) and self._checkpoint_io.checkpoint_io is None:
            self._checkpoint_io.checkpoint_io = files.AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This replica's state; :meth:`save_checkpoint` makes the consensus of it."""
        if self._consensus is None:
            return super().lightning_module_state_dict()
        with self._consensus.aside():
            state = super().lightning_module_state_dict()
            self._dumped = {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}
        return dict(self._dumped)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if self._consensus is None or self._alone:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path, save_id = self.broadcast((str(filepath), uuid.uuid4().hex[:16]))
        consensus = self._consensus_of(checkpoint)
        if "optimizer_states" in checkpoint:  # not `weights_only`
            consensus[files.KEY] = {"save_id": save_id, "world_size": self.world_size, "step": self.step}
            self._save_replica(checkpoint, path, save_id, storage_options)
        try:
            self._meet("replica files are complete")
            super().save_checkpoint(consensus, path, storage_options)
        except BaseException:
            if self.is_global_zero:
                files.remove_save(self.checkpoint_io, path, save_id)
            raise
        if self.is_global_zero:
            keep = {save_id, self._saved.get(path, save_id) if files.is_async(self.checkpoint_io) else save_id}
            files.remove_other_saves(self.checkpoint_io, path, keep)
            self._saved[path] = save_id

    def _save_replica(self, checkpoint: dict[str, Any], path: str, save_id: str, storage_options: Any | None) -> None:
        entry = {
            "save_id": save_id,
            "rank": self.global_rank,
            "strategy": type(self).__name__,
            "state": self.training_state(),
            "rng": files.rng_state(),
        }
        file = files.replica_path(path, save_id, self.global_rank)
        files.synchronous(self.checkpoint_io).save_checkpoint(checkpoint | {files.KEY: entry}, file, storage_options)

    def _consensus_of(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return ``checkpoint`` with the consensus model's state in place of this replica's, wherever it stands.

        What a callback put into ``state_dict`` instead, such as an average of its own, is averaged over ranks.
        """
        if self._consensus is None:
            return dict(checkpoint)
        window = not self._consensus.holds
        if window:
            self._enter_consensus(self._consensus, "a checkpoint")
        state = super().lightning_module_state_dict()
        built = {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}
        if window:
            self._consensus.leave()

        def consensus_of(state: dict[str, Any]) -> dict[str, Any]:
            foreign = {name: v for name, v in state.items() if v is not self._dumped.get(name)}
            averaged = average_state(foreign, self.world_size)
            return {name: averaged[name] if name in averaged else built[name] for name in state}

        return {
            key: consensus_of(value) if key in ("state_dict", lightning_compat.CURRENT_MODEL_STATE) else value
            for key, value in checkpoint.items()
        }

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:  # after the file that names them; of a symbolic link there are none
            self.checkpoint_io.remove_checkpoint(files.replica_folder(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        entry = checkpoint.get(files.KEY)
        if entry is None or not lightning_compat.is_fitting(self._trainer):
            return checkpoint
        replica: dict[str, Any] = {}
        problem = ""
        try:
            replica = self._load_replica(entry, checkpoint_path, weights_only)
        except files.ReplicaFileError as error:
            problem = str(error)
        problems = [p for p in self.gather(problem) if p]
        if problems:  # all ranks or none
            rank_zero_warn(
                f"Resuming all ranks from the consensus model and rank 0's optimizer state in {checkpoint_path}, not"
                f" from their replicas: {'; '.join(dict.fromkeys(problems))}."
            )
            self._resume = {"step": entry["step"]}
            return checkpoint
        self._resume = replica[files.KEY]
        if self._consensus is not None:  # in the middle of a fit, as the learning-rate finder does
            self.load_training_state(self._resume["state"])
        return replica

    def _load_replica(self, entry: dict[str, Any], path: _PATH, weights_only: bool | None) -> dict[str, Any]:
        if entry["world_size"] != self.world_size:
            raise files.ReplicaFileError(
                f"it was saved by {entry['world_size']} ranks, and there are {self.world_size} now"
            )
        path = files.followed(path)
        replica = files.load_replica(self.checkpoint_io, path, entry["save_id"], self.global_rank, weights_only)
        if (saved_by := replica[files.KEY]["strategy"]) != type(self).__name__:
            raise files.ReplicaFileError(f"it was saved by {saved_by}, and this is {type(self).__name__}")
        return replica

    # -- endings ------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self) -> None:
        self.settle()
        if self.evaluate == "consensus" and self._consensus is not None:
            self._meet("consensus for the end of training")
            self.consensus_distance = self._consensus.adopt()
            self.consensus_built += 1

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._consensus is not None:
            self._consensus.leave()
        self._end_evaluation()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if not self._failed:
            self._meet("the end")
        self.end_training()
        self._consensus = None
        self._dumped = {}
        if self._trainer is not None:
            lightning_compat.restore(self._trainer)
        super().teardown()

    @override
    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_consensus": None}


def _not_available() -> bool:
    return False
