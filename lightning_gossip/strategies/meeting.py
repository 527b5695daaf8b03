"""Ranks that meet: start, collectives and endings of a strategy, over control (design §7)."""

from __future__ import annotations

import itertools
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar

from torch import Tensor
from torch.distributed import DistNetworkError, PrefixStore, Store
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.run import Control
from lightning_gossip.control.stop import RunStopped, SeatLost, Stop
from lightning_gossip.control.store import is_taken, taken
from lightning_gossip.exchange.models import gathered
from lightning_gossip.strategies import lightning_compat, lightning_family
from lightning_gossip.strategies.launchers import (
    ReplicaMultiProcessingLauncher,
    ReplicaSubprocessLauncher,
    grace_of,
)
from lightning_gossip.strategies.lightning_names import (
    STEP_OUTPUT,
    CPUAccelerator,
    CUDAAccelerator,
    DDPStrategy,
    MisconfigurationException,
    ReduceOp,
    SIGTERMException,
    TBroadcast,
    pl,
)
from lightning_gossip.strategies.misuse import StrategyClass
from lightning_gossip.strategies.stand_in import SharedStandIn

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=5)
"""Of every strategy by default."""

START_TIMEOUT = timedelta(minutes=2)
"""For all processes to start; a shorter `timeout` of the user's holds from then on."""

C = TypeVar("C", bound=Control)
T = TypeVar("T")

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

REQUEUE = "a checkpoint before SLURM's job is requeued"

_SIGTERM_EXIT_CODE = 143  # 128 + 15, as a shell reports it
_runs = itertools.count()  # calls of Trainer.fit, validate, test and predict in this process; the same on all ranks


class MeetingStrategy(DDPStrategy, metaclass=StrategyClass):
    """Lightning's DDP strategy without DDP: its launch and collectives, with ranks that meet before each collective.

    A rank that waits there waits as long as the others are alive, and sees the stop word; it never blocks in gloo for
    one that is slow. An exception or a signal on any rank ends all of them, each with the cause.
    """

    _control: Control | None = None
    _acts: Mapping[str, Callable[[], None]] = {}  # what a rank may call for, by reason of the meeting for it
    _failed = False
    _serving = False  # this rank's own state is taken, between two steps of others
    _gathering: tuple[Metric, ...] = ()
    _saved_for_requeue = False  # in this call of the Trainer, or is about to
    _requeued = False

    steps_go_together: bool = True
    """Whether all ranks make their steps at one pace; else each has one of its own."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {lightning_family.for_whom()}>"  # what a Trainer of the other family shows

    restarts: int = 0
    """How often this package's launchers start each rank's process again that the run has lost."""

    @property
    def survives(self) -> bool:
        """Whether the run goes on without a rank that it loses."""
        return False

    @property
    @abstractmethod
    def step(self) -> int:
        """The exchange clock: steps begun over the whole training."""

    @property
    def timeout_seconds(self) -> float:
        """How long a rank waits for one that gives no sign of life, in seconds."""
        return (self._timeout or TIMEOUT).total_seconds()

    @property
    def _module(self) -> pl.LightningModule:
        if self.lightning_module is None:
            raise RuntimeError(f"{type(self).__name__} has no LightningModule yet: call Trainer.fit first")
        return self.lightning_module

    @property
    def _trainer(self) -> pl.Trainer | None:
        return self.lightning_module._trainer if self.lightning_module is not None else None

    @property
    def control(self) -> Control:
        """The control of the present call of the Trainer."""
        if self._control is None:
            raise RuntimeError(f"{type(self).__name__} is not in a call of the Trainer")
        return self._control

    # -- launch -----------------------------------------------------------------------------------------------

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
                survives=self.survives,
                restarts=self.restarts,
            )
        else:
            launcher = ReplicaMultiProcessingLauncher(self, start_method=self._start_method)
            launcher.grace = grace_of(self.timeout_seconds)
            launcher.survives = self.survives
            launcher.restarts = self.restarts
            self._launcher = launcher

    def _report_child(self, rank: int, how: str) -> bool:
        if (control := self._control) is None:
            return False
        if control.stopped is None:
            control.stop("error", f"rank {rank} is gone: {how}", lost=rank)
        return True

    @override
    def setup_distributed(self) -> None:
        # processes may take their time to start; once they have met, `_meet` watches over them
        timeout, self._timeout = self._timeout, max(self._timeout or TIMEOUT, START_TIMEOUT)
        try:
            super().setup_distributed()
        except DistNetworkError as error:
            environment = self.cluster_environment
            if environment is not None and is_taken(error):
                raise RuntimeError(taken(environment.main_port)) from error
            raise
        finally:
            self._timeout = timeout
        self._reach_store(lightning_compat.run_store())
        self._take_control(Control)

    def _reach_store(self, store: Store) -> None:
        """Use ``store`` for a call of the Trainer, under a prefix of its own."""
        prefix = f"lightning_gossip/{next(_runs)}"

        def connect() -> Store:
            return PrefixStore(prefix, store.clone())

        self._connect = connect

    def _take_control(self, make: Callable[..., C], *args: Any, **kwargs: Any) -> C:
        """Take part in the run: make this rank's control, with these arguments besides those of all."""
        timeout = self._timeout or TIMEOUT
        kwargs |= {"clock": lambda: self.step, "raise_stop": _raise_stop}
        self._control = control = make(self._connect, self.global_rank, self.world_size, timeout, *args, **kwargs)
        control.calls.together = self.steps_go_together
        return control

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, (CPUAccelerator, CUDAAccelerator)):
            raise MisconfigurationException(
                f"{type(self).__name__} runs on CPU and CUDA devices, not on {type(self.accelerator).__name__};"
                " set `Trainer(accelerator='cpu')` or `'cuda'`."
            )
        self._failed = self._requeued = self._saved_for_requeue = False
        self._acts = {REQUEUE: self._save_and_requeue}
        super().setup_environment()

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
        """End if another rank did; called at every step of an evaluation."""
        if self._control is not None:
            self._control.check()
            if self._control.calls.called == REQUEUE and not lightning_compat.is_fitting(self._trainer):
                self._requeue()  # there is nothing to save

    # -- collectives: ranks meet first, where a slow one is waited for, and a dead one or a stop word is noticed ----

    @property
    def _alone(self) -> bool:
        """Whether this rank must not wait for others: it is ending on an exception, which they may not know yet."""
        return self._failed or self._serving or (self._trainer is not None and self._trainer.interrupted)

    def _meet(self, reason: str) -> None:
        """Wait for all ranks, at the same point of the program."""
        if self._control is not None:
            self._met(reason)

    def _met(self, reason: str) -> Meeting:
        self.before_meeting()
        meeting = self.control.meet(reason, self._wants_to_end, self._follow_call)
        self._have_met(meeting)
        return meeting

    def _together(self, reason: str, attempt: Callable[[], T]) -> T:
        """Meet, and return what ``attempt`` does: a collective of the default group.

        It changes nothing that it would not find as it was, were it called again.
        """
        self._meet(reason)
        return attempt()

    def _await_all(self, reason: str, follow: Callable[[str], None]) -> None:
        """Wait for all ranks, and take part in what the others meet for meanwhile."""
        if self._control is not None:
            self.before_meeting()
            self._have_met(self._control.await_all(reason, follow, self._wants_to_end))

    @property
    def _wants_to_end(self) -> bool:
        return self._trainer is not None and self._trainer.should_stop

    def _have_met(self, meeting: Meeting) -> None:
        if self._trainer is not None and meeting.ending:
            self._trainer.should_stop = True
        self.on_meeting(meeting)

    def _follow_call(self, reason: str) -> bool:
        """Do first what others meet for, if that is what a rank called for; return whether it was."""
        act = self._acts.get(reason)
        if act is not None:
            act()
        return act is not None

    def _answer_call(self) -> None:
        """Do what a rank called for, at the end of the step at which all do; called at the end of every batch."""
        control = self.control
        what = control.calls.due(self.step, self._await_agreement)
        # where others meet for something else, which they do in the end only, they come back to it after that
        if what is not None and control.claim(what)[1] == what:
            self._acts[what]()

    def _await_agreement(self, agreed: Callable[[], int | None]) -> int:
        step = self.control.poll(agreed, time.monotonic() + self.timeout_seconds)
        if step is None:
            raise RuntimeError(
                f"rank {self.global_rank} waited for {self.timeout_seconds:g} s at step {self.step} for the other ranks"
                f" to say when all can stop, for '{self.control.calls.called}'"
            )
        return step

    def before_meeting(self) -> None:
        """Called before this rank waits for the others: what is under way with a partner has to come to its end."""

    def on_meeting(self, meeting: Meeting) -> None:
        """Called on all ranks when they have met."""

    def _meet_in_metrics(self, module: pl.LightningModule) -> None:
        """Let the module's torchmetrics objects wait for slow ranks too: until :meth:`teardown` they meet to pool."""

        def gather(result: Tensor, group: Any | None = None) -> list[Tensor]:
            return self._together("torchmetrics", lambda: gather_all_tensors(result, group))

        metrics = (m for m in module.modules() if isinstance(m, Metric))
        self._gathering = tuple(m for m in metrics if m.dist_sync_fn is None)
        for metric in self._gathering:
            metric.dist_sync_fn = SharedStandIn(gather, None)

    def gather(self, value: Any, reason: str = "gather") -> list[Any]:
        """Return the value of each rank; a collective, before which all meet for ``reason``."""
        return [value] if self.world_size == 1 else self._together(reason, lambda: gathered(value))

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if not self._alone:
            barrier = super().barrier
            self._together(f"barrier {name}", lambda: barrier(name))

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if self._alone:
            return obj
        broadcast = super().broadcast
        return self._together("broadcast", lambda: broadcast(obj, src))

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean") -> Tensor:
        if self._alone or not isinstance(tensor, Tensor):
            return tensor
        reduce = super().reduce
        return self._together("reduce", lambda: reduce(tensor.clone(), group, reduce_op))

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        all_gather = super().all_gather
        return self._together("all_gather", lambda: all_gather(tensor, group, sync_grads))

    # -- endings ----------------------------------------------------------------------------------------------------

    def _receive_sigterm(self) -> None:
        if self._control is not None:
            self._control.stop_locally("SIGTERM", "it received SIGTERM")

    def _receive_requeue_signal(self) -> None:
        """Handle the signal by which SLURM says that the job ends soon; ranks save at the end of a step."""
        if self._control is not None and not (self._saved_for_requeue or self._requeued):
            self._control.calls.note(REQUEUE)

    def _save_and_requeue(self) -> None:
        self._meet(REQUEUE)
        self._saved_for_requeue = True  # before the note is taken back: a signal may come at any moment
        self.control.calls.finish(REQUEUE)
        lightning_compat.save_for_requeue(self._module.trainer)
        self._requeue()

    def _requeue(self) -> None:
        if self.is_global_zero and not self._requeued:
            lightning_compat.requeue_slurm_job()
        self._requeued = True

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._failed = True
        if isinstance(exception, SIGTERMException) and not exception.code:
            exception.code = _SIGTERM_EXIT_CODE  # Lightning's own ends the process with 0
        if self._control is not None and not isinstance(exception, RunStopped):
            kind = {SIGTERMException: "SIGTERM", KeyboardInterrupt: "SIGINT"}.get(type(exception), "error")
            cause = f"{type(exception).__name__}: {exception}" if kind == "error" else f"it received {kind}"
            self._tell_ending(kind, cause, lost=getattr(exception, "partner", -1))

    def _tell_ending(self, kind: str, cause: str, lost: int) -> None:
        """Tell the others that this rank ends, and why (see :meth:`Control.stop`)."""
        self.control.stop(kind, cause, lost)

    @override
    def teardown(self) -> None:
        for metric in self._gathering:
            metric.dist_sync_fn = None
        self._gathering = ()
        if self._control is not None:
            self._control.close()
            self._control = None
        super().teardown()

    @override
    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_control": None, "_connect": None, "_gathering": (), "_acts": {}}


def _raise_stop(stop: Stop) -> NoReturn:
    """Raise what Lightning handles: another rank's signal ends this rank as its own would."""
    if stop.kind == "SIGTERM":
        log.warning("ending: %s", stop)
        raise SIGTERMException
    if stop.kind == "SIGINT":
        raise KeyboardInterrupt(str(stop))
    if stop.kind == "lost":
        raise SeatLost(stop)
    raise RunStopped(stop)
