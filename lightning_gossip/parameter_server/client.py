"""A worker's side of Downpour SGD (Dean et al., "Large Scale Distributed Deep Networks", 2012, §4.1).

Usable from any training loop::

    client = DownpourClient(addresses, control, n_push=5, n_pull=5)
    client.start(parameters)            # worker 0's parameters are everybody's
    for batch in batches:
        ...                             # forward, backward, the optimizer's step
        client.end_step(parameters)     # push, ask, apply what has arrived: never waits
    client.finish(parameters)           # everything made is on the server
    client.close()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed import Store

from lightning_gossip.arguments import check_choice, check_integer
from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.flat import FlatLayout
from lightning_gossip.exchange.stats import NONFINITE, NonFinite, NotFinite
from lightning_gossip.parameter_server import questions, snapshot
from lightning_gossip.parameter_server.displacement import Cut
from lightning_gossip.parameter_server.held import held_by_server, refuse_new_parameters
from lightning_gossip.parameter_server.optimizers import ServerOptimizer
from lightning_gossip.parameter_server.shard_links import ShardLinks, check_addresses, connect_store
from lightning_gossip.parameter_server.traffic import Answered, DownpourStats, Traffic

log = logging.getLogger(__name__)


class DownpourClient:
    """One worker of a Downpour training.

    With a :class:`~lightning_gossip.control.member_control.MemberControl` shards drop workers that are lost: what they
    pushed stays, a push is applied by each shard to which its part came whole, and the first member that is left is in
    worker 0's place. A shard that is lost ends the run all the same. A worker that joins gets what
    :meth:`state_to_join` returned on its donor, and begins by a pull: see :mod:`.protocol`.

    A push or pull that is due while the last one is still under way waits for the first step's end at which that one
    has come back: the displacement goes on accumulating, and nothing is lost.

    Args:
        addresses: of the shards, ``host:port``, in an order that is the same for all workers.
        control: of the run; its rank is this worker's seat, its world size the number of seats, its timeout that of
            every wait.
        n_push: steps from one push to the next.
        n_pull: steps from one request for the server's parameters to the next.
        max_staleness: a worker known to be more server updates behind than this waits for a pull at the step's end.
            What it knows came with the last answer; where nothing is under way at a step's end, it asks. None never
            waits.
        warmup_steps: for which worker 0 trains alone, from the clock's start on, before the others begin from the
            server's parameters.
        server_optimizer: an element-wise ``torch.optim`` class, or a :class:`functools.partial` of one with JSON-able
            keywords, that gets minus the displacement as the gradient; None adds the displacement.
        nonfinite: what becomes of a replica with NaN or infinite parameters, of which nothing is pushed: it takes the
            server's (``"heal"``), or :class:`NotFinite` is raised (``"error"``).
        connect: returns a connection to the store at an address.
        on_answer: called with every push acknowledged and pull applied.

    Attributes:
        step: the exchange clock, counted from 1 over the whole training.
        stats: see :class:`DownpourStats`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        control: Control,
        *,
        n_push: int = 5,
        n_pull: int = 5,
        max_staleness: int | None = None,
        warmup_steps: int = 0,
        server_optimizer: Any = None,
        nonfinite: NonFinite = "error",
        connect: Callable[[str, timedelta], Store] = connect_store,
        on_answer: Callable[[Answered], None] = lambda answered: None,
    ) -> None:
        self.addresses = check_addresses("addresses", addresses)
        self.step = 0
        self.stats = DownpourStats()
        self._n_push = check_integer("n_push", n_push, low=1)
        self._n_pull = check_integer("n_pull", n_pull, low=1)
        self._max_staleness = None if max_staleness is None else check_integer("max_staleness", max_staleness, low=0)
        self._warmup_steps = check_integer("warmup_steps", warmup_steps, low=0)
        self._optimizer = None if server_optimizer is None else ServerOptimizer.of(server_optimizer)
        self._heals = check_choice("nonfinite", nonfinite, NONFINITE) == "heal"
        self.on_heal: Callable[[], None] = lambda: None  # called after this replica took the server's parameters
        self._control = control
        self._connect = connect
        self._on_answer = on_answer
        self._links: ShardLinks | None = None
        self._cut: Cut | None = None
        self._traffic: Traffic | None = None
        self._trainings = 0
        self._warming_up = False
        self._push_due = self._pull_due = False
        self._pushed_at = 0
        self._loaded: Mapping[str, Any] | None = None

    @property
    def running(self) -> bool:
        """Whether a training is under way: between :meth:`start` and :meth:`abandon` or :meth:`close`."""
        return self._traffic is not None

    @property
    def names(self) -> Collection[str]:
        """Of the parameters that are on the server, in a training."""
        return self._running().displacement.cut.layout.shapes.keys()

    @property
    def connected(self) -> bool:
        """Whether the shards know this worker: between the first :meth:`start` and :meth:`close`."""
        return self._links is not None

    # -- a training's life ----------------------------------------------------------------------------------------

    def continue_from(self, step: int) -> None:
        """Set the clock with which the next :meth:`start` begins; there is no warm-up then, unless it is 0.

        One that joins does not begin before its donor's.
        """
        self.step = step

    def start_again(self, parameters: Mapping[str, Tensor]) -> None:
        """Let everybody, the server included, go on from worker 0's ``parameters``; clock and counts stand.

        What was made and not pushed is given up, and so is the state of the server's optimizer. Let all :meth:`drain`,
        and meet, before it.

        Raises:
            ShardLost, RunStopped: as :meth:`start`.
        """
        counts = self.stats
        self.abandon()
        self.start(parameters)
        self._running().count_in(counts)
        self.stats = counts

    def start(self, parameters: Mapping[str, Tensor], server_state: Mapping[str, Any] | None = None) -> None:
        """Begin a training; called while one is under way, begin another on the same shards, with the clock at 0.

        Worker 0 gives the server its parameters (or ``server_state``, and nobody warms up); the others wait for that
        and for the end of the warm-up, as long as worker 0 lives; where the run goes on without it, the next does what
        it has not done. Those given no state of their own (:meth:`load_state_dict`) then take the server's parameters.
        One that joins waits for the training in which its donor was, and takes these too.

        Args:
            parameters: by name, the same on all workers; the server's are those that require a gradient now, or did
                when the state was made that this worker was given.
            server_state: of :meth:`server_state`: worker 0 lets the server go on from there, or who is in its place.

        Raises:
            ShardLost: if a shard is lost, or refuses.
            RunStopped: if some rank stopped.
            ValueError: if a state does not belong to these parameters.
        """
        loaded, self._loaded = self._loaded, None
        travelling, layout = held_by_server(parameters, loaded)
        own = None if loaded is None or "training" in loaded else loaded
        if own is not None and server_state is None and (rank := self._control.rank) == self._control.members[0]:
            raise ValueError(f"worker {rank} can not go on from a state of its own without `server_state`")
        links, cut = self._meet_shards(layout)
        self._restore_counts({} if loaded is None else loaded)
        device = next(iter(travelling.values())).device
        traffic = Traffic(links, cut, device, self._trainings, self.stats, self._on_answer)
        first = traffic.displacement.begin(travelling)
        warms_up = server_state is None and loaded is None and self.step == 0 < self._warmup_steps
        job = None if loaded is not None else questions.initialise(cut, first, self._trainings, not warms_up)
        if server_state is not None:
            job = snapshot.load(cut, server_state, self._trainings, not warms_up, links.workers.by_seat)
        leads, begins = traffic.begin(job, self.step, warms_up)
        self._warming_up = leads and warms_up
        if own is not None:
            traffic.load_state_dict(own)
        elif not begins or server_state is not None:
            traffic.take_over(travelling, self.step)
        self._traffic = traffic

    def end_step(self, parameters: Mapping[str, Tensor]) -> None:
        """End a step, after the optimizer's update: apply what arrived, push and ask when due.

        Args:
            parameters: of this replica, by name.

        Raises:
            ShardLost: if a shard was lost, as far as is known.
            RunStopped: if some rank stopped.
            NotFinite: if the replica is not finite, and ``nonfinite`` is ``"error"``.
            RuntimeError: if a parameter requires a gradient that is not on the server, for it required none when the
                training started.
        """
        begin = time.perf_counter()
        traffic = self._running()
        self.stats.wait_seconds = 0.0
        self.step += 1
        self._control.check()
        self._links_in_use().check()
        refuse_new_parameters(traffic.displacement.cut.layout.shapes, parameters)
        traffic.collect(parameters, self.step)
        self._push_due |= self.step % self._n_push == 0
        self._pull_due |= self.step % self._n_pull == 0
        self._ask_for_what_is_due(traffic, parameters)
        if self._max_staleness is not None:
            traffic.keep_up(parameters, self.step, self._max_staleness)
        if self._warming_up and self.step >= self._warmup_steps:
            self.end_warmup(parameters)
        self.stats.call_seconds = time.perf_counter() - begin

    def end_warmup(self, parameters: Mapping[str, Tensor]) -> None:
        """Let the other workers begin now, from all that worker 0 has made; nothing where no warm-up is under way.

        To be called before anything for which worker 0 waits for the others.

        Raises:
            ShardLost, RunStopped: as :meth:`end_step`.
        """
        if self._warming_up:
            self._push_rest(parameters)
            traffic = self._running()
            traffic.wait(self._links_in_use().ask(questions.ready(self.step, traffic.training)))
            self._warming_up = False

    def finish(self, parameters: Mapping[str, Tensor]) -> None:
        """End a training: apply the pull that is under way, push what is left, wait until all of it is on the server.

        What was done to the parameters after the last step's end is pushed too.

        Raises:
            ShardLost, RunStopped: as :meth:`end_step`.
        """
        self._push_rest(parameters)
        self.end_warmup(parameters)

    def drain(self) -> None:
        """Wait until everything sent is on the server and everything asked for is here; apply nothing.

        Raises:
            ShardLost, RunStopped: as :meth:`end_step`.
        """
        self._links_in_use()
        self._running().drain(self.step)

    def pull_now(self, into: Mapping[str, Tensor]) -> None:
        """Copy the server's parameters to ``into`` and wait for it; the replica and its pulls stay as they are.

        Args:
            into: by name; all that the server has.

        Raises:
            ShardLost, RunStopped: as :meth:`end_step`.
        """
        traffic = self._running()
        displacement = traffic.displacement
        storage = displacement.free()
        job = questions.pull(displacement.cut, self.step, traffic.training, storage)
        traffic.wait(self._links_in_use().ask(job))
        displacement.copies.write(storage, into)

    def abandon(self) -> None:
        """Give up the training under way, if one is: what was not pushed is lost. The clock stands.

        Let all :meth:`drain`, and meet, before another begins.
        """
        self._traffic = None

    def close(self, goodbye: bool = True) -> None:
        """Say goodbye to the shards, which end once everybody did, and give up the links.

        Args:
            goodbye: False where this worker leaves a run that goes on, perhaps by somebody who has yet to come.
        """
        if self._links is not None:
            self._links.close(goodbye)
        self._links = self._traffic = None

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state (tensors and numbers), to be saved together with its parameters.

        Waits for what is under way. A pull that is not applied yet is asked for again after loading.

        Raises:
            ShardLost, RunStopped: as :meth:`end_step`.
        """
        self.drain()
        traffic = self._running()
        pull_due = self._pull_due or not traffic.can_pull
        dues = {"push_due": self._push_due, "pull_due": pull_due, "pushed_at": self._pushed_at}
        return {"step": self.step, **dues, "stats": asdict(self.stats), **traffic.held, **traffic.state_dict()}

    def state_to_join(self) -> dict[str, Any]:
        """Return what one begins with that joins (numbers and strings), for :meth:`load_state_dict`; waits for nobody.

        What this worker has under way is its own; the other's parameters are the server's, once it has started.
        """
        return {"step": self.step, "training": self._running().training, **self._running().held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next :meth:`start` go on from ``state``, with the parameters that belong to it, or join by it."""
        self._loaded = dict(state)

    def server_state(self) -> dict[str, Any]:
        """Return the server's state (tensors, numbers and strings), whatever the number of shards; for one worker.

        Nobody may push meanwhile: let all :meth:`drain`, and meet, before it, and meet after it.

        Raises:
            ShardLost, RunStopped: as :meth:`end_step`.
        """
        traffic = self._running()
        cut = traffic.displacement.cut
        fetch = partial(snapshot.fetch, cut, self.step, traffic.training)
        links = self._links_in_use()
        return snapshot.gather(cut, traffic.wait(links.ask(fetch)), links.workers.by_seat)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _running(self) -> Traffic:
        if self._traffic is None:
            raise RuntimeError("the client has no training under way: call `start` first")
        return self._traffic

    def _links_in_use(self) -> ShardLinks:
        if self._links is None:
            raise RuntimeError("the client has no links: call `start` first")
        self._links.drop_lost()
        return self._links

    def _meet_shards(self, layout: FlatLayout) -> tuple[ShardLinks, Cut]:
        if self._links is not None and self._cut is not None:
            if self._cut.layout.fingerprint != layout.fingerprint:
                raise ValueError(
                    "`parameters` must stay the same, in name, shape and dtype, as long as the shards live"
                )
            return self._links, self._cut
        survives = isinstance(self._control, MemberControl)
        cut = Cut(layout, len(self.addresses), self._control.world_size, self._optimizer, survives)
        self._links = ShardLinks(self.addresses, self._control, self._connect, clock=lambda: self.step)
        self._links.greet(cut.setups)
        self._cut = cut
        return self._links, cut

    def _restore_counts(self, loaded: Mapping[str, Any]) -> None:
        """Begin with the counts of ``loaded``, of which there are some, the clock alone, or none."""
        if "training" in loaded:
            self._trainings, self.step = loaded["training"], max(self.step, loaded["step"])
        else:
            self._trainings += 1
            self.step = loaded.get("step", 0 if self.running else self.step)
        self.abandon()
        self.stats = DownpourStats(**loaded.get("stats", {}))
        self._push_due, self._pull_due = loaded.get("push_due", False), loaded.get("pull_due", False)
        self._pushed_at = loaded.get("pushed_at", self.step)

    def _ask_for_what_is_due(self, traffic: Traffic, parameters: Mapping[str, Tensor]) -> None:
        push = self._push_due and traffic.can_push
        pull = self._pull_due and traffic.can_pull
        if pull:
            self._pull_due = False
        if push:
            self._push(traffic, parameters, pull)
        elif pull:
            traffic.pull(self.step)

    def _push(self, traffic: Traffic, parameters: Mapping[str, Tensor], pull: bool = False) -> None:
        """Push, and pull by the way, unless the replica is not finite."""
        self._push_due, self._pushed_at = False, self.step
        if traffic.push(parameters, self.step, pull):
            return
        found = NotFinite(self._control.rank, self.step, self._control.rank)
        if not self._heals:
            raise found
        log.warning("%s: nothing of it is pushed, and it takes the server's parameters", found)
        traffic.restart(parameters, self.step)
        self.on_heal()

    def _push_rest(self, parameters: Mapping[str, Tensor]) -> None:
        traffic = self._running()
        traffic.drain(self.step)
        changed = self._pushed_at < self.step or traffic.displacement.changed(parameters)
        traffic.collect(parameters, self.step)
        if changed:
            self._push(traffic, parameters)
            traffic.drain(self.step)
