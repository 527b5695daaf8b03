"""What all strategies with replicas share: start, exchange clock, consensus windows, endings (design §2-§4, §7)."""

from __future__ import annotations

import itertools
import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import ReduceOp
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torchmetrics import Metric
from typing_extensions import override

from lightning_gossip import lightning_compat
from lightning_gossip.arguments import check_choice, check_timeout
from lightning_gossip.consensus import Consensus
from lightning_gossip.control import Control, RunStopped, Stop
from lightning_gossip.models import check_models_agree, take_rank_zeros
from lightning_gossip.strategies.launchers import (
    ReplicaMultiProcessingLauncher,
    ReplicaSubprocessLauncher,
    grace_of,
)

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=5)
_START_TIMEOUT = timedelta(minutes=2)
"""For all processes to start; a shorter `timeout` of the user's holds from then on."""

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
Evaluate = Literal["consensus", "replica"]

_SIGTERM_EXIT_CODE = 143  # 128 + 15, as a shell reports it
_runs = itertools.count()  # calls of Trainer.fit, validate, test and predict in this process; the same on all ranks


class ReplicaStrategy(DDPStrategy):
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
        self._control: Control | None = None
        self._consensus: Consensus | None = None
        self._failed = False
        self._unsynced: list[tuple[Metric, Any]] = []  # torchmetrics objects, and when they sync otherwise
        self.consensus_distance: float | None = None  # when the consensus model was last built
        self.consensus_built = 0  # how often it was built

    # -- what a subclass does -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def step(self) -> int:
        """The exchange clock: steps begun over the whole training."""

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

    # -- launch and set-up --------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        if self._start_method == "popen":
            if self.cluster_environment is None:
                raise MisconfigurationException(f"{type(self).__name__} has no cluster environment to launch in")
            self._launcher = ReplicaSubprocessLauncher(
                self.cluster_environment,
                self.num_processes,
                self.num_nodes,
                report=self._report_child,
                timeout=self.timeout_seconds,
            )
        else:
            launcher = ReplicaMultiProcessingLauncher(self, start_method=self._start_method)
            launcher.grace = grace_of(self.timeout_seconds)
            self._launcher = launcher

    @property
    def timeout_seconds(self) -> float:
        """How long a rank waits for one that gives no sign of life, in seconds."""
        return (self._timeout or TIMEOUT).total_seconds()

    def _report_child(self, rank: int, how: str) -> None:
        if (control := self._control) is not None and control.stopped is None:
            control.stop("error", f"rank {rank} is gone: {how}", lost=rank)

    @override
    def setup_distributed(self) -> None:
        # processes may take their time to start; once they have met, `_meet` watches over them
        timeout, self._timeout = self._timeout, max(self._timeout or TIMEOUT, _START_TIMEOUT)
        try:
            super().setup_distributed()
        finally:
            self._timeout = timeout

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, (CPUAccelerator, CUDAAccelerator)):
            raise MisconfigurationException(
                f"{type(self).__name__} runs on CPU and CUDA devices, not on {type(self.accelerator).__name__};"
                " set `Trainer(accelerator='cpu')` or `'cuda'`."
            )
        super().setup_environment()
        self._failed = False
        prefix = f"lightning_gossip/{next(_runs)}"
        default_store = lightning_compat.run_store()

        def connect() -> Store:
            return PrefixStore(prefix, default_store.clone())

        self._connect = connect
        timeout = self._timeout or TIMEOUT
        self._control = Control(
            connect, self.global_rank, self.world_size, timeout, clock=lambda: self.step, raise_stop=_raise_stop
        )

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
            self._consensus = Consensus(module, self.world_size)
            self.start_training(trainer, self._run_control, self._connect())
            lightning_compat.stop_broadcasting_before_batches(trainer, self._run_control.check)
            lightning_compat.run_steps_within(trainer, self._step)

    @property
    def _module(self) -> pl.LightningModule:
        if self.lightning_module is None:
            raise RuntimeError(f"{type(self).__name__} has no LightningModule yet: call Trainer.fit first")
        return self.lightning_module

    @property
    def _trainer(self) -> pl.Trainer | None:
        return self.lightning_module._trainer if self.lightning_module is not None else None

    @property
    def _run_control(self) -> Control:
        if self._control is None:
            raise RuntimeError(f"{type(self).__name__} is not in a call of the Trainer")
        return self._control

    # -- steps --------------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self) -> Iterator[None]:
        self.begin_step()
        yield
        self.end_step()

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._check_stop()
        return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._check_stop()
        return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._check_stop()
        return super().predict_step(*args, **kwargs)

    def _check_stop(self) -> None:
        if self._control is not None:
            self._control.check()

    # -- collectives: ranks meet first, where a slow one is waited for, and a dead one or a stop word is noticed ----

    @property
    def _alone(self) -> bool:
        """Whether this rank must not wait for others: it is ending on an exception, which they may not know yet."""
        return self._failed or (self._trainer is not None and self._trainer.interrupted)

    def _meet(self, reason: str) -> None:
        if self._control is not None:
            self._control.meet(reason)

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if not self._alone:
            self._meet(f"barrier {name}")
            super().barrier(name)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if self._alone:
            return obj
        self._meet("broadcast")
        return super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean") -> Tensor:
        if self._alone or not isinstance(tensor, Tensor):
            return tensor
        self._meet("reduce")
        return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        self._meet("all_gather")
        return super().all_gather(tensor, group, sync_grads)

    # -- consensus ----------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self.evaluate == "replica" and self._trainer is not None and not self._trainer.training:
            return {"num_replicas": 1, "rank": 0}  # each rank evaluates its own replica on the whole data
        return super().distributed_sampler_kwargs

    @contextmanager
    def consensus(self, reason: str) -> Iterator[None]:
        """Let the module be the consensus model for a while, on all ranks; the window of a validation is reused."""
        consensus = self._consensus
        if consensus is None or consensus.holds or self._alone:
            yield
            return
        self._enter_consensus(consensus, reason)
        try:
            yield
        finally:
            consensus.leave()

    def _enter_consensus(self, consensus: Consensus, reason: str) -> None:
        self._meet(f"consensus for {reason} at step {self.step}")
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
        self._meet(f"adopt_consensus at step {self.step}")
        module.to(self.root_device)
        Consensus(module, self.world_size).adopt()
        module.to(device)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not lightning_compat.is_fitting(self._trainer):
            return super().lightning_module_state_dict()
        with self.consensus("a checkpoint"):
            state = super().lightning_module_state_dict()
            return {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}

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

    # -- endings ------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self) -> None:
        self.settle()
        if self.evaluate == "consensus" and self._consensus is not None:
            self._meet(f"consensus for the end of training at step {self.step}")
            self.consensus_distance = self._consensus.adopt()
            self.consensus_built += 1

    def _receive_sigterm(self) -> None:
        if self._control is not None:
            self._control.stop_locally("SIGTERM", "it received SIGTERM")

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._failed = True
        if isinstance(exception, SIGTERMException) and not exception.code:
            exception.code = _SIGTERM_EXIT_CODE  # Lightning's own ends the process with 0
        if self._consensus is not None:
            self._consensus.leave()
        self._end_evaluation()
        if self._control is not None and not isinstance(exception, RunStopped):
            kind = {SIGTERMException: "SIGTERM", KeyboardInterrupt: "SIGINT"}.get(type(exception), "error")
            cause = f"{type(exception).__name__}: {exception}" if kind == "error" else f"it received {kind}"
            self._control.stop(kind, cause, lost=getattr(exception, "partner", -1))

    @override
    def teardown(self) -> None:
        if self._control is not None and not self._failed:
            self._meet("the end")
        self.end_training()
        self._consensus = None
        if self._trainer is not None:
            lightning_compat.restore(self._trainer)
        if self._control is not None:
            self._control.close()
            self._control = None
        super().teardown()

    @override
    def __getstate__(self) -> dict:
        state = super().__getstate__()
        state["_control"] = state["_consensus"] = state["_connect"] = None
        return state


def _not_available() -> bool:
    return False


def _raise_stop(stop: Stop) -> NoReturn:
    """Raise what Lightning handles: another rank's signal ends this rank as its own would."""
    if stop.kind == "SIGTERM":
        log.warning("ending: %s", stop)
        raise SIGTERMException
    if stop.kind == "SIGINT":
        raise KeyboardInterrupt(str(stop))
    raise RunStopped(stop)
