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

======================  ============================================================================================
called                  is
======================  ============================================================================================
on one rank alone       ``step()``, which waits for the partners of that step only; ``state_dict()``
on all ranks, at the    the constructor, ``wait_for_all()``, ``consensus()``, ``adopt_consensus()``, ``close()`` without
same place              an exception: all meet there, and who is slow but alive is waited for
with an exception       the ``with`` block ends: the others are told the cause, and end at their next step or meeting
======================  ============================================================================================

Nothing here imports Lightning; Lightning's strategies are built of the same parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, Store, distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_gossip.arguments import (
    check_choice,
    check_integer,
    check_number,
    check_timeout,
    check_wire_dtype,
)
from lightning_gossip.control.run import Control
from lightning_gossip.control.stop import RunStopped
from lightning_gossip.exchange.asynchronous import AsynchronousExchange
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.consensus import Consensus
from lightning_gossip.exchange.models import check_models_agree, over, rank_zeros, shared_parameters, take
from lightning_gossip.exchange.stats import NONFINITE, ExchangeStats, NonFinite
from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Chooser, Peers, Schedule
from lightning_gossip.transport.link import Links
from lightning_gossip.transport.link_transport import LinkTransport, end_of_rank

_made = itertools.count()
"""Objects of this process, the same number on all ranks: each has keys of its own in the run's store."""


class Gossip:
    """Replicas of a module that exchange by a schedule and mix by a rule, in a loop of one's own.

    At construction all ranks take rank 0's parameters and buffers; where a training goes on, load each rank's own
    afterwards, and :meth:`load_state_dict`. Payloads travel over gloo links of this object, also where the group's
    backend is NCCL; between ranks on one host, through shared memory.

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
            partner's parameters and calls ``on_heal``.
        on_heal: called after that; an optimizer's state is to begin anew.
        process_group: of the replicas; None for the default group, which has to be there.

    Raises:
        ValueError: for an argument that is not allowed.
        RuntimeError: without a process group, or if the ranks have different models.
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
        nonfinite: NonFinite = "error",
        on_heal: Callable[[], None] = lambda: None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(module, DistributedDataParallel):
            raise ValueError("`module` must not be wrapped in DDP, which averages gradients; give `module.module`")
        rule, outer = _rule(variant, alpha), OuterStep(outer_lr, outer_momentum)
        if not outer.is_plain and variant != "elastic":
            raise ValueError(f"`outer_lr` and `outer_momentum` are for elastic gossip; got `variant={variant!r}`")
        schedule = Schedule(peers, probability, period, seed)
        check_integer("delay", delay, low=0, high=period - 1, why="at most period - 1")
        if check_choice("asynchronous", asynchronous, (True, False)):
            _check_asynchronous(delay, module)
        dtype = check_wire_dtype("wire_dtype", wire_dtype)
        shared_memory = check_choice("shared_memory", shared_memory, (True, False))
        check_timeout("timeout", timeout)
        check_choice("nonfinite", nonfinite, NONFINITE)
        if not dist.is_initialized():
            raise RuntimeError("there is no process group: call `torch.distributed.init_process_group` first")
        self._group = process_group
        rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if rank < 0:
            raise ValueError("`process_group` must be one that this rank is a member of")
        schedule.check_world_size(world_size)
        self._module = module
        self._exchange: Exchange | AsynchronousExchange | None = None
        self._closed = False
        connect = _connections(process_group)
        self._control = control = Control(connect, rank, world_size, timeout, clock=lambda: self.steps)
        with self._telling():
            place = (rank, world_size, schedule, rule)
            options: dict[str, Any] = {"wire_dtype": dtype, "nonfinite": nonfinite}
            options["outer"] = None if outer.is_plain else outer
            exchange: Exchange | AsynchronousExchange
            if asynchronous:
                exchange = AsynchronousExchange(
                    *place, control, connect(), lambda: shared_parameters(module), **options
                )
            else:
                transport = LinkTransport(
                    Links(connect(), end_of_rank(rank), timeout), control, shared_memory, pin_memory=_on_gpu(module)
                )
                exchange = Exchange(*place, transport, lambda: shared_parameters(module), delay=delay, **options)
            self._exchange = exchange
            exchange.on_heal = on_heal
            self._meet("the start")
            with over(process_group):
                check_models_agree(module)
                take(module, rank_zeros(module))

    # -- in training ----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps begun over the whole training, by the exchange clock."""
        return self._exchange.step if self._exchange is not None else 0

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
            RunStopped: if some rank stopped.
        """
        self._control.check()
        self._running.begin()
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
        self._meet("an epoch's end")

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
        self._meet("what is in flight")
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
            self._meet("the end")
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
                cause = f"{type(error).__name__}: {error}"
                self._control.stop("error", cause, lost=getattr(error, "partner", -1))
            self._release()

    def _release(self) -> None:
        self._closed = True
        if self._exchange is not None:
            self._exchange.close()
        self._control.close()

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> Exchange | AsynchronousExchange:
        if self._exchange is None or self._closed:
            raise RuntimeError("this Gossip is closed")
        return self._exchange

    def _meet(self, reason: str) -> None:
        exchange = self._running
        exchange.arrive()
        meeting = self._control.meet(reason)
        if isinstance(exchange, AsynchronousExchange):
            return  # each rank goes by a clock of its own
        exchange.align(meeting.clock)
        if meeting.skipped:
            exchange.reset_links(meeting.number)

    def _build(self, reason: str) -> tuple[Consensus, float]:
        self._meet(reason)
        consensus = Consensus(self._module)
        with over(self._group):
            return consensus, consensus.build()


def _check_asynchronous(delay: int, module: nn.Module) -> None:
    if delay:
        raise ValueError(f"`delay` must be 0 with `asynchronous=True`, got {delay}: nobody waits for an exchange")
    if _on_gpu(module):
        raise ValueError("`asynchronous=True` runs on the CPU; the module is on a GPU")


def _rule(variant: str, alpha: float) -> MixingRule:
    check_choice("variant", variant, ("elastic", "pull", "push"))
    if variant == "elastic":
        return ElasticMixing(check_number("alpha", alpha, low=0, high=1, open_low=True))
    return PullMixing() if variant == "pull" else PushMixing()


def _connections(group: dist.ProcessGroup | None) -> Callable[[], Store]:
    """Return what makes connections to the store of a group, under a prefix of this object."""
    store = distributed_c10d._get_process_group_store(group or distributed_c10d._get_default_group())
    prefix = f"lightning_gossip/plain/{next(_made)}"
    return lambda: PrefixStore(prefix, store.clone())


def _on_gpu(module: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in module.parameters())
