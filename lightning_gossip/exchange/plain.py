"""Gossip in a training loop of one's own, without Lightning: :class:`Gossip`, and what is around it.

::

    dist.init_process_group("gloo")
    with Gossip(model, alpha=0.5, period=8) as gossip:
        for epoch in range(epochs):
            for x, y in loader:
                with gossip.step():
                    optimizer.zero_grad()
                    loss(model(x), y).backward()
                    optimizer.step()
            with gossip.consensus():
                evaluate(model)
        gossip.adopt_consensus()

**Ranks that may be lost.** With ``min_replicas`` the others go on without one that dies, and a process that is started
for it joins them. No process group is needed, which could not shrink: the run's store stands in a process of its own,
``lightning-gossip store --port 29500`` on a machine that stays, and each rank is started by whatever starts it again::

    store = TCPStore("stable-host", 29500)
    with Gossip(model, min_replicas=2, store=store, rank=rank, world_size=4, state=optimizer.state_dict) as gossip:
        if gossip.given is not None:  # this process joins: it has a donor's module and clock, and this
            optimizer.load_state_dict(gossip.given)
        while gossip.steps < steps:
            with gossip.step():
                ...
            if gossip.steps % 500 == 0:
                with gossip.consensus():
                    ...

Meet at certain steps by :attr:`Gossip.steps`, as here: a process that joins then comes to its donor's meetings. A loop
over epochs has the epoch in ``state``, too: who joins begins with that one, and the others wait for it at its end.

======================  ============================================================================================
called                  is
======================  ============================================================================================
on one rank alone       ``step()``, which waits for the partners of that step only; ``state_dict()``
on all ranks, at the    the constructor, ``wait_for_all()``, ``consensus()``, ``adopt_consensus()``, ``close()`` without
same place              an exception: all meet there, and who is slow but alive is waited for
with an exception       the ``with`` block ends: the others are told the cause, and end at their next step or meeting;
                        with ``min_replicas`` they go on, unless it is Ctrl-C, which ends the run
======================  ============================================================================================

Nothing here imports Lightning; Lightning's strategies are built of the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_gossip.arguments import check_choice, check_timeout
from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import LOST_AFTER
from lightning_gossip.control.stop import RunStopped
from lightning_gossip.exchange.asynchronous import AsynchronousExchange
from lightning_gossip.exchange.consensus import Consensus
from lightning_gossip.exchange.models import check_models_agree, manifest, rank_zeros, take
from lightning_gossip.exchange.plain_runs import GroupRun, MembersRun, Seat, survival_of
from lightning_gossip.exchange.plain_scheme import AnyExchange, Scheme
from lightning_gossip.exchange.stats import NONFINITE, ExchangeStats, NonFinite
from lightning_gossip.rules.schedule import Chooser, Peers
from lightning_gossip.transport.handover import differences

T = TypeVar("T")


class Gossip:
    """Replicas of a module that exchange by a schedule and mix by a rule, in a loop of one's own.

    At construction all ranks take the parameters and buffers of rank 0, with ``min_replicas`` of the first that is
    there; where a training goes on, load each rank's own afterwards, and :meth:`load_state_dict`. Payloads travel over
    gloo links of this object, also where the group's backend is NCCL; between ranks on one host, through shared memory.

    Args:
        module: this rank's replica; not wrapped in DDP.
        variant: ``"elastic"`` (arXiv:1812.02407), or gossiping SGD's ``"pull"`` or ``"push"`` (arXiv:1611.04581).
        alpha: of elastic gossip, in (0, 1].
        probability, period, peers, delay, wire_dtype, seed, shared_memory: as of the strategies.
        asynchronous: whether ranks exchange at their own pace, and nobody waits for a partner but at meetings; on the
            CPU, with ``delay=0``.
        timeout: how long an exchange may take, and how long a rank waits elsewhere for one without a sign of life.
        outer_lr, outer_momentum: of elastic gossip's outer step; 1 and 0 for none.
        nonfinite: what becomes of a replica that is not finite: ``"error"`` ends its rank, ``"heal"`` gives it a
            partner's parameters and calls ``on_heal``; None is ``"heal"`` with ``min_replicas``, and else ``"error"``.
        on_heal: called after that; an optimizer's state is to begin anew: ``optimizer.state.clear``.
        process_group: of the replicas; None for the default group, which has to be there unless ``store`` is given.
            With ``min_replicas`` only its store is used: ranks may be lost, but nobody can join, and where rank 0 holds
            that store, as it does unless somebody else serves it, the run ends with rank 0.
        min_replicas: the run begins with so many ranks at least, once all are there or ``timeout`` is over, and goes on
            as long as so many are left; None ends it with the first that is lost.
        lost_after: a rank that gives no sign of life for so long is lost, where there is ``min_replicas``.
        state: returns what else a process that joins takes over, as tensors, numbers, strings and containers of them:
            an optimizer's ``state_dict()``. Called on the donor, where its next step begins; the joiner has it in
            :attr:`given`.
        store: of the run, in place of a process group, where there is ``min_replicas``: a ``TCPStore`` that outlives
            every rank. It holds one run: for several give each a ``PrefixStore`` of it.
        rank, world_size: of this process, and how many ranks there are, with ``store``.

    Raises:
        ValueError: for an argument that is not allowed.
        RuntimeError: without a process group or store, or if the ranks have different models or, at a process that
            joins, other arguments; if another process of this rank is there.
        RunStopped: if fewer than ``min_replicas`` are there.
        SystemExit: with code 0, in a process that comes to a lost rank's place when training is over.
    """

    def __init__(
        self,
        module: nn.Module,
        variant: Literal["elastic", "pull", "push"] = "elastic",
        *,
        alpha: float = 0.5,
        probability: float = 1.0,
        period: int = 1,
        peers: str | Peers | Chooser = "matching",
        delay: int = 0,
        asynchronous: bool = False,
        wire_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        timeout: timedelta = timedelta(minutes=5),
        shared_memory: bool = True,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nonfinite: NonFinite | None = None,
        on_heal: Callable[[], None] = lambda: None,
        process_group: dist.ProcessGroup | None = None,
        min_replicas: int | None = None,
        lost_after: timedelta = LOST_AFTER,
        state: Callable[[], dict[str, Any]] = dict,
        store: Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        how = (variant, alpha, probability, period, peers, delay)
        scheme = Scheme(*how, asynchronous, wire_dtype, seed, outer_lr, outer_momentum)
        scheme.check_module(module)
        check_choice("shared_memory", shared_memory, (True, False))
        check_timeout("timeout", timeout)
        check_choice("nonfinite", nonfinite, (None, *NONFINITE))
        survival = survival_of(min_replicas, lost_after)
        seat = Seat.of(process_group, store, rank, world_size, survival is not None)
        scheme.schedule.check_world_size(seat.world_size)
        self._module, self._scheme, self._state = module, scheme, state
        self._exchange: AnyExchange | None = None
        self._closed = False
        self.given: dict[str, Any] | None = None
        """What ``state`` returned on the donor, on the CPU; None in a process that was there at the beginning."""
        self._run: GroupRun = (
            GroupRun(seat, process_group, timeout, self._clock)
            if survival is None
            else MembersRun(seat, survival, timeout, self._clock)
        )
        with self._telling():
            given = self._run.come()
            heals: NonFinite = "error" if survival is None else "heal"
            self._exchange = scheme.exchange(module, seat, self._run, timeout, shared_memory, nonfinite or heals)
            self._exchange.on_heal = on_heal
            if given is None:
                take(module, self._together("the start", lambda: _rank_zeros(module)))
            else:
                self.given = self._take_over(given)

    # -- in training ----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps begun over the whole training, by the exchange clock."""
        return self._exchange.step if self._exchange is not None else 0

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that took part in the last meeting, by seniority; one that has joined comes last.

        At any step it is the same on all ranks: loops may go by it. What one does for all is for the first of them.
        """
        return self._run.members

    @property
    def stats(self) -> ExchangeStats:
        """Counts and times of this rank's exchanges; an ``AsynchronousStats`` where they are asynchronous."""
        return self._running.stats

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step: an exchange is posted, runs beside what is done within, and is applied after it.

        Put one optimizer update in it: forward, backward and ``optimizer.step()`` of a batch, or of the last batch
        where gradients are accumulated over several.

        With ``asynchronous=True`` partners copy the parameters up to the first update by an optimizer within; call
        :meth:`shut` before parameters are changed in another way.

        Raises:
            PartnerLost: if a partner died, or was silent past the timeout.
            NotFinite: if a replica is not finite, with ``nonfinite="error"``.
            RunStopped: if some rank stopped, or fewer than ``min_replicas`` are left.
            SeatLost: if the others have declared this rank lost, and go on; a new object on that store joins them.
        """
        exchange = self._running
        self._run.control.check()
        self._run.between_steps(exchange.align, self._state_to_join)
        exchange.begin()
        if isinstance(self._exchange, AsynchronousExchange):
            before_updates = register_optimizer_step_pre_hook(lambda *_: self.shut())
            try:
                yield
            finally:
                before_updates.remove()
        else:
            yield
        self._running.end()

    def shut(self) -> None:
        """Let no partner copy the parameters until the step ends: something is about to change them."""
        if isinstance(exchange := self._running, AsynchronousExchange):
            exchange.shut()

    # -- together -------------------------------------------------------------------------------------------------

    def wait_for_all(self) -> None:
        """Meet: at an epoch's end where ranks have unequal numbers of batches, whose partners skip who waits here."""
        self._met("an epoch's end")

    @contextmanager
    def consensus(self) -> Iterator[float]:
        """Have the module be the consensus model, the mean of the replicas, for a block; yields the distance to it.

        Buffers that change within stay changed.

        Returns:
            sqrt(mean over ranks of ‖θ_i − θ̄‖²) / ‖θ̄‖, the consensus distance.
        """
        consensus, distance = self._build("a consensus")
        consensus.enter()
        try:
            yield distance
        finally:
            consensus.leave()
            consensus.forget()

    def adopt_consensus(self) -> float:
        """Make every rank's module the consensus model, and return the consensus distance; training may go on."""
        self._met("what is in flight")
        self._running.settle()
        consensus, distance = self._build("the consensus that is adopted")
        consensus.adopt()
        return distance

    # -- what continues it ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's clock, counts and what is in flight, as tensors and numbers.

        Save it, on all ranks after the same step, beside the state dicts of module and optimizer: a training that loads
        the three continues bit for bit.
        """
        return self._running.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned on this rank; on all ranks, after the module's own state.

        Raises:
            ValueError: if what was in flight does not fit the module's parameters.
        """
        self._running.load_state_dict(dict(state))

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Apply what is in flight, meet, and release links and threads; call it on all ranks, or use ``with``."""
        if self._closed:
            return
        with self._telling():
            self._running.settle()
            self._met("the end")
            self._run.tell_over()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._fail(error)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell the others what ends this rank."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if not self._closed:
            if not isinstance(error, RunStopped):
                self._run.tell(error)
            self._release()

    def _release(self) -> None:
        self._closed = True
        if self._exchange is not None:
            self._exchange.close()
        self._run.close()

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> AnyExchange:
        if self._exchange is None or self._closed:
            raise RuntimeError("this Gossip is closed")
        return self._exchange

    def _clock(self) -> int:
        return self.steps

    def _met(self, reason: str) -> Meeting:
        exchange = self._running
        exchange.arrive()
        meeting = self._run.meet(reason)
        if not isinstance(exchange, AsynchronousExchange):  # else each rank goes by a clock of its own
            exchange.align(meeting.clock)
            if meeting.skipped:
                exchange.reset_links(meeting.number)
        return meeting

    def _together(self, reason: str, attempt: Callable[[], T]) -> T:
        """Meet, and return what ``attempt`` does: a collective, which leaves all as it was."""
        return self._run.together(partial(self._met, reason), attempt)

    def _build(self, reason: str) -> tuple[Consensus, float]:
        consensus = Consensus(self._module)
        return consensus, self._together(reason, consensus.build)

    def _identity(self) -> dict[str, str]:
        """Return by name what a process has in common with those that it joins."""
        return self._scheme.arguments | manifest(self._module)

    def _state_to_join(self) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "module": self._module.state_dict(),
            "exchange": self._running.state_to_join(),
            "state": self._state(),
        }

    def _take_over(self, given: dict[str, Any]) -> dict[str, Any]:
        """Begin as the donor is; return what its loop gave.

        Raises:
            RuntimeError: if this process would train something else than the others do.
        """
        if differing := differences(self._identity(), given["identity"]):
            rank = self._run.control.rank
            raise RuntimeError(f"rank {rank} can not join: it differs from those that train. {differing}")
        self._module.load_state_dict(given["module"])
        self._running.load_state_dict(given["exchange"])
        own: dict[str, Any] = given["state"]
        return own


def _rank_zeros(module: nn.Module) -> dict[str, Tensor]:
    check_models_agree(module)
    return rank_zeros(module)
