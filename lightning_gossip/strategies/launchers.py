"""Launchers that let every process end by itself: the cause travels through control, force comes last.

Lightning's own kill the launching process within 5 seconds of any child's failure, and its children at once after a
KeyboardInterrupt: before callbacks, loggers and checkpoints have ended.
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch.multiprocessing as mp
from typing_extensions import override

from lightning_gossip.control import store as run_store
from lightning_gossip.control.interpreter import path_in_environment
from lightning_gossip.control.stop import SeatLost
from lightning_gossip.strategies import lightning_family
from lightning_gossip.strategies.lightning_compat import SIGKILL, is_fitting
from lightning_gossip.strategies.lightning_members import global_states, outlive_parent, refuse_bad_start
from lightning_gossip.strategies.lightning_names import (
    ClusterEnvironment,
    _MultiProcessingLauncher,
    _set_num_threads_if_needed,
    _SubprocessScriptLauncher,
    find_free_network_port,
    move_data_to_device,
)
from lightning_gossip.strategies.ownership import own_parameters
from lightning_gossip.strategies.processes import (
    POLL,
    AsIndex,
    Restarts,
    alive,
    end_processes,
    grace_of,
    how_ended,
    start_again,
    traceback_of,
)

log = logging.getLogger(__name__)

_started: list[subprocess.Popen] = []
"""The further ranks of this script: the launcher of its first Trainer starts them, those of others find them there."""

_running: list[ReplicaSubprocessLauncher] = []
"""Whose call of the Trainer goes on, the innermost last: who is told when one of them fails."""


class ReplicaSubprocessLauncher(_SubprocessScriptLauncher):
    """Runs the script again for each further local rank, and watches over these processes.

    Args:
        cluster_environment, num_processes, num_nodes: as Lightning's launcher.
        report: called with a rank and a text when a child failed; tells the run, and returns whether there was one.
        timeout: seconds after a child's failure at which a call of the Trainer that has not ended is hanging.
        survives: whether the run goes on without a rank that fails, with its store in a process of its own.
        restarts: how often the process of each rank is started again that fails.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        report: Callable[[int, str], bool],
        timeout: float,
        survives: bool = False,
        restarts: int = 0,
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.restarts = restarts
        self.report = report
        self.timeout = timeout
        self.survives = survives
        self.left = False  # whether this process takes part no more, and its children go on

    def __getstate__(self) -> dict[str, Any]:
        """Leave out its processes, for who copies or pickles a strategy that has trained: they can be neither."""
        return vars(self) | {"procs": []}

    @override
    def _call_children_scripts(self) -> None:
        if self.survives:
            _start_store(self.cluster_environment)
        with path_in_environment():
            super()._call_children_scripts()
            environment = dict(os.environ)
        _started.extend(self.procs)
        atexit.register(self._await_children)
        first_rank = self.cluster_environment.node_rank() * self.num_processes
        again = partial(start_again, [proc.args for proc in self.procs], environment)
        _Observer(_started, first_rank + 1, Restarts(self.restarts), again).start()

    @override
    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        # as in the base class, less Lightning's own observer of the children
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        self.procs = _started
        _running.append(self)
        try:
            return until_it_stays(function, trainer, *args, **kwargs)
        finally:
            _running.remove(self)

    def _await_children(self) -> None:
        """Let the children end by themselves: without a limit where they go on without this process."""
        end_processes(_started, math.inf if self.left else grace_of(self.timeout))

    @override
    def kill(self, signum: Any) -> None:
        if signum == SIGKILL:
            end_processes(self.procs, grace_of(self.timeout))
        else:
            super().kill(signum)


def _start_store(environment: ClusterEnvironment) -> bool:
    """Start the run's store in a process of its own, on node 0, unless somebody has; return whether nobody had."""
    if run_store.is_held():
        return False
    os.environ[run_store.VARIABLE] = "True"
    if environment.node_rank() == 0:
        run_store.start_store(environment.main_port)
    run_store.reach(environment.main_address, environment.main_port)
    return True


class ReplicaMultiProcessingLauncher(_MultiProcessingLauncher):
    """Starts the ranks as processes of their own (spawn, fork, forkserver), and leaves none behind."""

    grace: float = 30.0
    """Seconds that processes get to end by themselves."""

    survives: bool = False
    """Whether the run goes on without a rank that fails."""

    restarts: int = 0
    """How often the process of each rank is started again that fails."""

    _launching = 0  # the process that has started the others

    def __reduce__(self) -> tuple[Any, ...]:
        return lightning_family.reduced(self)

    @override
    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        launch = self._launch_members if self.survives else super().launch
        if self._start_method == "fork":
            gc.collect()  # or ranks would destroy what an earlier run left, with threads that they do not have
        try:
            return launch(function, *args, trainer=trainer, **kwargs)
        except KeyboardInterrupt:
            self.kill(signal.SIGINT)  # they have it already where a terminal sent it to the whole group
            raise
        finally:
            end_processes(self.procs, self.grace)

    def _launch_members(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """As in the base class, but that no process is ended because another one failed.

        Raises:
            RuntimeError: if none came to the end.
        """
        refuse_bad_start(self, trainer)
        self._launching = os.getpid()
        strategy: Any = self._strategy
        environment: ClusterEnvironment = strategy.cluster_environment
        given_port = os.environ.get("MASTER_PORT")
        if strategy.num_nodes == 1 and not run_store.is_held():
            # the store outlives the run for a moment, and Lightning keeps to one port
            os.environ["MASTER_PORT"] = str(find_free_network_port())
        os.environ["MASTER_PORT"] = str(environment.main_port)
        started_store = _start_store(environment)
        try:
            output = self._run_members(trainer, function, args, kwargs)
        finally:
            if started_store:
                del os.environ[run_store.VARIABLE]
                run_store.part(environment.main_address, environment.main_port)
                os.environ.pop("MASTER_PORT")
                if given_port is not None:
                    os.environ["MASTER_PORT"] = given_port
        if trainer is None:
            return output
        self._already_fit |= trainer.state.fn == "fit"
        self._recover_results_in_main_process(output, trainer)
        return output.trainer_results

    def _run_members(self, trainer: Any, function: Callable, args: Any, kwargs: Any) -> Any:
        strategy: Any = self._strategy
        queue = mp.get_context(self._start_method).SimpleQueue()
        error_files: dict[int, str] = {}

        def start(index: int) -> Any:
            started = mp.start_processes(
                AsIndex(self._wrapping_function, index),
                args=(trainer, function, args, kwargs, queue, *global_states(self._start_method)),
                nprocs=1,
                start_method=self._start_method,
                join=False,
            )
            [error_files[index]] = started.error_files
            return started.processes[0]

        self.procs = []
        for index in range(strategy.num_processes):
            self.procs.append(start(index))
        output, failures = None, dict[int, str]()
        restarts = Restarts(self.restarts)
        pause = threading.Event()
        running = True
        while running:
            running = any(map(alive, self.procs))
            while not queue.empty():
                output = queue.get()
            for index, process in enumerate(self.procs):
                if process.exitcode and index not in failures:
                    failures[index] = f"its process (pid {process.pid}) {how_ended(process.exitcode)}"
                    log.warning("rank %d: %s%s", index, failures[index], traceback_of(error_files[index]))
                    restarts.note(index)
            for index in restarts.due() if running else ():
                log.warning("rank %d: its process is started again", index)
                with suppress(FileNotFoundError):
                    os.unlink(error_files.pop(index))
                self.procs[index] = start(index)
                del failures[index]
            pause.wait(POLL / 4)
        for file in error_files.values():
            with suppress(FileNotFoundError):
                os.unlink(file)
        if output is None:
            endings = "; ".join(f"rank {index}: {how}" for index, how in failures.items())
            raise RuntimeError(f"no rank came to the end of the run: {endings}")
        return output

    @override
    def _wrapping_function(
        self, process_idx: int, trainer: Any, function: Callable, args: Any, kwargs: Any, queue: Any, *rest: Any
    ) -> None:
        callbacks = [] if trainer is None else [vars(callback) for callback in vars(trainer)["callbacks"]]
        own_parameters([*args, *kwargs.values(), *callbacks])
        self._start_method = "fork"  # or Lightning, which does so after a spawn, takes apart what shares a storage
        if self.survives:
            outlive_parent()
        returned: list[Any] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                returned.append(until_it_stays(function, trainer, *args, **kwargs))
            except BaseException as error:
                if self.survives:  # Lightning calls this where one process is the launching one, and a rank
                    self._strategy.on_exception(error)
                raise
            return returned[0]

        super()._wrapping_function(process_idx, trainer, run, args, kwargs, queue, *rest)
        if process_idx != 0 and self._strategy.is_global_zero:  # rank 0, which gives the results, was lost
            os.environ["LOCAL_RANK"] = "0"
            results = returned[0] if trainer is None else self._collect_rank_zero_results(trainer, returned[0])
            queue.put(move_data_to_device(results, "cpu"))

    @override
    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        if self.survives and os.getppid() != self._launching:
            return None  # nobody would take the weights, which are handed over in a file
        return super()._collect_rank_zero_results(trainer, results)

    @override
    def _recover_results_in_main_process(self, worker_output: Any, trainer: Any) -> None:
        super()._recover_results_in_main_process(worker_output, trainer)
        if worker_output.weights_path is not None:
            os.rmdir(os.path.dirname(worker_output.weights_path))  # Lightning leaves the folder that it made


def until_it_stays(function: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of the Trainer, and again wherever the others have declared this process lost in a ``fit``."""
    while True:
        try:
            return function(*args, **kwargs)
        except SeatLost as lost:
            if not is_fitting(trainer):
                raise
            trainer.strategy.leave_to_come_again(lost, trainer)


class _Observer(threading.Thread):
    """Tells whoever runs now when a child failed, and kills a launching process that hangs in spite of that.

    Args:
        procs: the children; those that are started again take the places of those before them.
        first_rank: of the first of them.
        restarts: which of them are started again.
        start_again: starts one, by its index.
    """

    def __init__(
        self,
        procs: list[subprocess.Popen],
        first_rank: int,
        restarts: Restarts,
        start_again: Callable[[int], subprocess.Popen],
    ) -> None:
        super().__init__(daemon=True, name="child-observer")
        self._procs = procs
        self._first_rank = first_rank
        self._restarts = restarts
        self._start_again = start_again
        self._pause = threading.Event()

    @override
    def run(self) -> None:
        told: ReplicaSubprocessLauncher | None = None
        reported: set[int] = set()
        deadline = math.inf
        while not self._have_ended():
            failed = self._failed()
            launcher = _running[-1] if _running else None
            if launcher is not told:  # whoever called the Trainer before has the exception now
                told, reported, deadline = launcher, set(), math.inf
            if launcher is not None and failed - reported:
                if not launcher.survives:
                    deadline = min(deadline, time.monotonic() + launcher.timeout)
                self._pause.wait(1.0)  # the rank's own word, or its partners', says more
                told_now = {k for k in failed - reported if launcher.report(self._first_rank + k, self._how(k))}
                reported |= told_now
                for index in told_now if launcher.survives else ():
                    self._restarts.note(index)
            for index in self._restarts.due() if launcher is not None and not launcher.left else ():
                log.warning("rank %d: its process is started again", self._first_rank + index)
                self._procs[index] = self._start_again(index)
                reported.discard(index)
            if launcher is not None and time.monotonic() > deadline:
                break
            self._pause.wait(POLL)
        else:
            return
        log.error(
            "the launching process hangs since a child failed, for %.0f s; killing it", told.timeout if told else 0
        )
        end_processes(self._procs, 0)
        os.kill(os.getpid(), SIGKILL)

    def _have_ended(self) -> bool:
        return all(proc.poll() == 0 for proc in self._procs)

    def _failed(self) -> set[int]:
        return {index for index, proc in enumerate(self._procs) if proc.poll()}

    def _how(self, index: int) -> str:
        return _ending(self._procs[index])


def _ending(proc: subprocess.Popen) -> str:
    return f"its process (pid {proc.pid}) {how_ended(proc.returncode)}"
