"""Downpour SGD (Dean et al., "Large Scale Distributed Deep Networks", 2012, §4.1): an asynchronous parameter server."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store
from typing_extensions import override

from lightning_gossip.arguments import check_integer
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.models import shared_parameters
from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.consensus import KeptParameters, Server, ServerConsensus
from lightning_gossip.parameter_server.optimizers import ServerOptimizer
from lightning_gossip.parameter_server.process import ShardProcess
from lightning_gossip.parameter_server.shard_links import ShardLost, check_addresses
from lightning_gossip.parameter_server.snapshot import renumbered
from lightning_gossip.parameter_server.traffic import DownpourStats
from lightning_gossip.strategies import lightning_compat
from lightning_gossip.strategies.base import LOST_AFTER, TIMEOUT, Evaluate, NonFinite, ReplicaStrategy, StartMethod
from lightning_gossip.strategies.dealing import EpochEnds
from lightning_gossip.strategies.lightning_names import Accelerator, CheckpointIO, ClusterEnvironment, Precision, pl
from lightning_gossip.strategies.meeting import MeetingStrategy
from lightning_gossip.strategies.shards import start_shards

_SHARDS = "the shards' addresses"
"""What those of the beginning tell those that join."""


class DownpourStrategy(ReplicaStrategy):
    """Downpour SGD: workers push what their optimizers made to a server, and pull its parameters, without waiting.

    Pick it where some workers are slower than others for good: nobody waits for anybody within an epoch. Every worker
    trains with its own optimizer, whichever it is; what it changed since its last push is added to the server's
    parameters, or handed, negated, as a gradient to ``server_optimizer``. The server's parameters are the consensus
    model. With many workers the learning rate has to be smaller than alone: the server adds up what all of them make.

    An adaptive ``server_optimizer`` such as Adagrad divides by the size of what it gets, and so undoes the workers'
    learning-rate schedule. Shards obey whoever reaches their port: for trusted networks only.

    The server holds what optimizers own and requires a gradient when training begins. A parameter of theirs that begins
    to later on is refused at that step; gossip lets it travel from then on. Every change of what the server holds, by
    whomever, is a worker's work, and is added up over workers: do not load or set weights on all ranks in mid-training,
    but on rank 0, and call :meth:`adopt_rank_zero` on all.

    Args:
        n_push: steps from one push to the next, at least 1.
        n_pull: steps from one request for the server's parameters to the next, at least 1.
        shards: processes between which the server's parameters are cut evenly; started by the lowest rank of each node,
            on the node of rank 0 first and over the nodes in turn, for one ``fit``.
        shard_addresses: ``host:port`` of shards started by hand (``python -m lightning_gossip.parameter_server``), the
            same on all ranks; none is started then. They serve one ``fit`` and end.
        server_optimizer: an element-wise ``torch.optim`` class, a :class:`functools.partial` of one with JSON-able
            keywords, its import path, or a mapping with ``class_path`` and ``init_args``, as in the configuration file
            of a LightningCLI; None adds.
        max_staleness: a worker known to be more updates of others behind the server than this waits for a pull; None
            never waits.
        warmup_steps: for which rank 0 trains alone before the others begin, from the server's parameters. It ends early
            where rank 0 would wait for the others. What goes on from a checkpoint, or in a further ``fit``, has none.
        evaluate: ``"consensus"`` or ``"replica"``; what validation and test run on, and what remains after ``fit``.
        timeout: how long a rank waits for a rank or a shard that gives no sign of life.
        min_replicas: None: the run ends with the first rank that is lost. With a number it begins with so many ranks at
            least, and goes on as long as so many are left. What a lost one pushed stays; each shard applies what of a
            push came to it whole. Only a lost shard, not the rank that started it, ends the run. It needs gloo, and the
            run's store in a process of its own, which our launchers start.
        restarts: how often our launchers start each lost rank again, which joins.
        lost_after: with ``min_replicas``: a rank that gives no sign of life for so long is lost; more than 2 s.
        nonfinite: a replica with NaN or infinite parameters, of which nothing is pushed, takes the server's and begins
            its optimizers anew (``"heal"``, the default with ``min_replicas``), or ends its rank (``"error"``).
        dealt: whether workers take an epoch's batches as they have need of them, in place of even shares; None: where
            Lightning places the sampler of a map-style data set.
        epoch_ends: whether an epoch of even shares ends with the ``"first"`` rank that is through, or with ``"all"``.
        accelerator, parallel_devices, cluster_environment, checkpoint_io: as for Lightning's ``DDPStrategy``.
        precision_plugin, process_group_backend, start_method: likewise.

    Raises:
        ValueError: for an argument that is not allowed.
        RuntimeError: in ``fit``, if a parameter is unfrozen in mid-training.
        ShardLost: (a ``RuntimeError``) in ``fit``, naming a shard that is gone; all ranks end with that cause.

    Example::

        Trainer(accelerator="cpu", devices=4, strategy=DownpourStrategy(n_push=5, n_pull=5, shards=2))
    """

    steps_go_together = False

    def __init__(
        self,
        n_push: int = 5,
        n_pull: int = 5,
        shards: int = 1,
        shard_addresses: Sequence[str] | None = None,
        server_optimizer: Any = None,
        max_staleness: int | None = None,
        warmup_steps: int = 0,
        evaluate: Evaluate = "consensus",
        timeout: timedelta = TIMEOUT,
        min_replicas: int | None = None,
        restarts: int = 0,
        lost_after: timedelta = LOST_AFTER,
        nonfinite: NonFinite | None = None,
        dealt: bool | None = None,
        epoch_ends: EpochEnds = "all",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        self.n_push = check_integer("n_push", n_push, low=1)
        self.n_pull = check_integer("n_pull", n_pull, low=1)
        self.shards = check_integer("shards", shards, low=1)
        self.shard_addresses: tuple[str, ...] | None = None
        if shard_addresses is not None:
            self.shard_addresses = check_addresses("shard_addresses", shard_addresses)
            if shards not in (1, len(self.shard_addresses)):
                raise ValueError(
                    f"`shards` must be {len(self.shard_addresses)}, the number of `shard_addresses`, or be left out;"
                    f" got {shards!r}"
                )
            self.shards = len(self.shard_addresses)
        self.server_optimizer = server_optimizer
        self._optimizer = None if server_optimizer is None else ServerOptimizer.of(server_optimizer)
        self.max_staleness = None if max_staleness is None else check_integer("max_staleness", max_staleness, low=0)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, low=0)
        self._client: DownpourClient | None = None
        self._processes: list[ShardProcess] = []  # the shards that this rank started
        self._last_step = 0  # of the client's clock, after `fit`
        self._finished: dict[str, Tensor] = {}  # this replica, when all that it made was on the server
        self._final: dict[str, Tensor] | None = None  # the server's parameters at the end of `fit`, on rank 0
        self._held: tuple[str, ...] = ()  # names of the parameters that the server held then
        self._owned: tuple[int, set[int]] = (-1, set())  # number of parameters in optimizers, and which they are
        super().__init__(
            evaluate=evaluate,
            timeout=timeout,
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
            process_group_backend=process_group_backend,
            start_method=start_method,
        )

    @property
    @override
    def step(self) -> int:
        return self._client.step if self._client is not None else self._last_step

    @property
    def downpour_stats(self) -> DownpourStats | None:
        """Counts and times of this worker's pushes and pulls; None outside ``fit``."""
        return None if self._client is None else self._client.stats

    @property
    @override
    def hyperparameters(self) -> dict[str, Any]:
        optimizer = self._optimizer
        return {
            "n_push": self.n_push,
            "n_pull": self.n_pull,
            "shards": self.shards,
            "shard_addresses": None if self.shard_addresses is None else list(self.shard_addresses),
            "server_optimizer": None if optimizer is None else {"class": optimizer.path, **optimizer.keywords},
            "max_staleness": self.max_staleness,
            "warmup_steps": self.warmup_steps,
            **super().hyperparameters,
        }

    # -- start ----------------------------------------------------------------------------------------------------

    @override
    def start_training(self, trainer: pl.Trainer, control: Control, store: Store) -> None:
        self._final, self._owned = None, (-1, set())
        self._client = DownpourClient(
            self._addresses(),
            control,
            n_push=self.n_push,
            n_pull=self.n_pull,
            max_staleness=self.max_staleness,
            warmup_steps=self.warmup_steps,
            server_optimizer=self.server_optimizer,
            nonfinite=self.nonfinite,
        )
        self._client.on_heal = self.begin_optimizers_anew
        if trainer.global_step > 0:  # a further `fit` of one training
            self.continue_from(self._last_step)
        lightning_compat.before_training_ends(trainer, self._finish)

    @override
    def continue_from(self, step: int) -> None:
        self._running.continue_from(step)

    def _addresses(self) -> Sequence[str]:
        """Return the shards' addresses, in their order: of those that are there, or that this node starts now."""
        if self.shard_addresses is not None:
            return self.shard_addresses
        if (joiner := self._joiner) is not None:
            agreed: list[str] = joiner.beginning.gathered[_SHARDS]
            return agreed
        addresses = self._beginning.gathered[_SHARDS] = start_shards(self, self.shards, self._processes)
        return addresses

    @override
    def on_train_start(self) -> None:
        """Begin on the server, last of all: from now on a rank may wait for rank 0's warm-up.

        It has begun already where a state was loaded, and where the learning-rate finder trains in mid-fit. One that
        joins begins at its first step.
        """
        super().on_train_start()
        if not self._running.running and not self.is_joining:
            self._running.start(self._trained())

    @override
    def align(self, clock: int) -> None:
        """Begin on the server in the midst of a training: with what it holds by now, and the clock of the others."""
        client = self._running
        client.continue_from(max(client.step, clock))
        try:
            client.start(self._trained())
        except ShardLost as lost:
            lost.ends_run = False  # this rank alone: the others see for themselves whether the shard is there
            raise

    @property
    def _running(self) -> DownpourClient:
        if self._client is None:
            raise RuntimeError(f"{type(self).__name__} is not in `fit`")
        return self._client

    def _parameters(self) -> dict[str, Tensor]:
        return dict(shared_parameters(self._module))

    def _trained(self) -> dict[str, Tensor]:
        """Return the parameters that optimizers own, or all where Lightning knows of no optimizer.

        What else changes, such as a momentum encoder, is no work of a worker's that could be added up.
        """
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        if not groups:
            return self._parameters()
        count = sum(map(len, groups))
        if count != self._owned[0]:  # at the start, and where a group is added
            self._owned = count, {id(p) for group in groups for p in group}
        owned = self._owned[1]
        return {name: p for name, p in self._parameters().items() if id(p) in owned}

    @override
    def make_consensus(self, module: pl.LightningModule) -> ServerConsensus:
        return ServerConsensus(module, self._server, self._meet)

    def _server(self) -> Server | None:
        """Return what knows the server's parameters: the client in a training, after it what was kept of them."""
        kept = None if self._final is None else KeptParameters(self._held, self._final)
        return self._under_way() or kept

    def _under_way(self) -> DownpourClient | None:
        return self._client if self._client is not None and self._client.running else None

    # -- steps ----------------------------------------------------------------------------------------------------

    @override
    def begin_step(self) -> None:
        """Nothing is sent before an update."""

    @override
    def end_step(self) -> None:
        self._running.end_step(self._trained())

    @override
    def before_meeting(self) -> None:
        if (client := self._under_way()) is not None:
            client.end_warmup(self._trained())

    # -- adopting ---------------------------------------------------------------------------------------------------

    @override
    def give_up(self) -> None:
        if (client := self._under_way()) is not None:
            client.drain()

    @override
    def begin_anew(self) -> None:
        if (client := self._under_way()) is not None:
            client.start_again(self._trained())

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @override
    def training_state(self) -> dict[str, Any]:
        """Return the worker's state, and on the lowest rank the server's: the consensus was built, all is on it."""
        if (client := self._under_way()) is None:
            return {"step": self.step}
        state: dict[str, Any] = {"worker": client.state_dict()}
        if self.is_global_zero:
            state["server"] = client.server_state()
        return state

    @override
    def training_state_to_join(self) -> dict[str, Any]:
        return {"joins": self._running.state_to_join()}

    @override
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``: at once where training had begun by then, else at :meth:`on_train_start`."""
        client = self._running
        client.abandon()
        if "joins" in state:
            client.load_state_dict(state["joins"])
            client.continue_from(state["joins"]["step"])
        elif "worker" in state:
            client.load_state_dict(state["worker"])
            server = state.get("server")  # of the lowest; all have it where that one may be lost before the shards do
            server = MeetingStrategy.broadcast(self, server) if self.survives else server  # who joins needs it not
            ranks = () if self._resume is None else self._resume.get("ranks", ())
            client.start(self._trained(), renumbered(server, dict(zip(ranks, self.members, strict=False))))
        else:
            client.continue_from(state["step"])

    # -- endings --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Push what is left, before callbacks replace this replica at the end of training."""
        self._running.finish(self._trained())
        self._finished = self._replica()

    def _replica(self) -> dict[str, Tensor]:
        """Return a copy of this rank's parameters."""
        return {name: p.detach().clone() for name, p in self._parameters().items()}

    @override
    def settle(self) -> None:
        """Keep the server's final parameters for :meth:`adopt_consensus` where the replica remains.

        What a callback has put in place of the replicas, such as averages of its own, is not on the server: the
        consensus model is then the mean of that.
        """
        finished, self._finished = self._finished, {}
        replaced = any(not torch.equal(p, finished[name]) for name, p in self._parameters().items())
        self._final = None
        if any(self.gather(replaced)):
            self._running.abandon()
        else:
            self._keep_servers(finished)

    @override
    def end_resumed(self) -> None:
        super().end_resumed()
        if self._resumed is not None:
            self._keep_servers(self._replica())

    def _keep_servers(self, replica: dict[str, Tensor]) -> None:
        """Keep the server's parameters, in place of this copy, on rank 0 (or all) where the replicas remain."""
        if self.evaluate == "replica":
            self._final = {}
            self._held = tuple(self._running.names)
            if self.survives or self.is_global_zero:
                self._final = replica
                self._running.pull_now(replica)

    @override
    def adopt_consensus(self) -> None:
        """Make every rank's module the server's final parameters; call it on all ranks, after ``fit``.

        Floating-point buffers are the workers' mean. The shards have ended by then: rank 0 has kept the parameters.

        Raises:
            RuntimeError: where the other ranks are out of reach: those of ``spawn`` and ``fork`` end with ``fit``.
        """
        super().adopt_consensus()
        self._final = None

    @override
    def end_training(self) -> None:
        self._last_step = self.step
        client, self._client = self._client, None
        goodbye = client is not None and client.connected and not self._failed
        if client is not None:
            client.close(goodbye=not self.has_left)
        while self._processes:
            self._processes.pop().close(grace=10.0 if goodbye else 0.0, leave=self.has_left)

    @override
    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_client": None, "_processes": [], "_final": None, "_owned": (-1, set())}
