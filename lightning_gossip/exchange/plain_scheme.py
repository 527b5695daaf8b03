"""What replicas in a loop of one's own exchange, when, and by which rule: arguments of ``Gossip``, checked."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_gossip.arguments import check_choice, check_integer, check_number, check_wire_dtype
from lightning_gossip.exchange.asynchronous import AsynchronousExchange
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.models import shared_parameters
from lightning_gossip.exchange.plain_runs import GroupRun, Seat
from lightning_gossip.exchange.stats import NonFinite
from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Chooser, Peers, Schedule
from lightning_gossip.transport.link import Links
from lightning_gossip.transport.link_transport import LinkTransport, end_of_rank

AnyExchange = Exchange | AsynchronousExchange


class Scheme:
    """Who exchanges with whom at which step, and what is made of it.

    Args:
        variant, alpha, probability, period, peers, delay, asynchronous, wire_dtype, seed, outer_lr, outer_momentum: see
            :class:`~lightning_gossip.exchange.plain.Gossip`.

    Attributes:
        arguments: in words by name, which all ranks have in common.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(
        self,
        variant: str,
        alpha: float,
        probability: float,
        period: int,
        peers: str | Peers | Chooser,
        delay: int,
        asynchronous: bool,
        wire_dtype: torch.dtype | str | None,
        seed: int,
        outer_lr: float,
        outer_momentum: float,
    ) -> None:
        self.rule, self.outer = _rule(variant, alpha), OuterStep(outer_lr, outer_momentum)
        if not self.outer.is_plain and variant != "elastic":
            raise ValueError(f"`outer_lr` and `outer_momentum` are for elastic gossip; got `variant={variant!r}`")
        self.schedule = Schedule(peers, probability, period, seed)
        self.delay = check_integer("delay", delay, low=0, high=period - 1, why="at most period - 1")
        self.asynchronous = check_choice("asynchronous", asynchronous, (True, False))
        if asynchronous and delay:
            raise ValueError(f"`delay` must be 0 with `asynchronous=True`, got {delay}: nobody waits for an exchange")
        self.wire_dtype = check_wire_dtype("wire_dtype", wire_dtype)
        rule = (variant, alpha) if variant == "elastic" else (variant,)
        words = {
            "the rule": rule,
            "`probability`": probability,
            "`period`": period,
            "`peers`": peers if isinstance(peers, str) else type(peers).__name__,
            "`delay`": delay,
            "`asynchronous`": asynchronous,
            "`wire_dtype`": self.wire_dtype,
            "`seed`": seed,
            "the outer step": (outer_lr, outer_momentum),
        }
        self.arguments = {name: repr(value) for name, value in words.items()}

    def check_module(self, module: nn.Module) -> None:
        """Raise ``ValueError`` for a module whose replicas can not exchange so."""
        if isinstance(module, DistributedDataParallel):
            raise ValueError("`module` must not be wrapped in DDP, which averages gradients; give `module.module`")
        if self.asynchronous and _on_gpu(module):
            raise ValueError("`asynchronous=True` runs on the CPU; the module is on a GPU")

    def exchange(
        self,
        module: nn.Module,
        seat: Seat,
        run: GroupRun,
        timeout: timedelta,
        shared_memory: bool,
        nonfinite: NonFinite,
    ) -> AnyExchange:
        """Return the exchanges of a replica, ``module``, in a run."""
        place = (seat.rank, seat.world_size, self.schedule, self.rule)
        options: dict[str, Any] = {"wire_dtype": self.wire_dtype, "nonfinite": nonfinite}
        options["outer"] = None if self.outer.is_plain else self.outer
        if self.asynchronous:
            parts = run.control, seat.connect(), lambda: shared_parameters(module)
            return AsynchronousExchange(*place, *parts, **options)
        links = Links(seat.connect(), end_of_rank(seat.rank, run.incarnation), timeout)
        transport = LinkTransport(links, run.control, shared_memory, pin_memory=_on_gpu(module))
        options |= {"delay": self.delay, "members": run.members_at}
        return Exchange(*place, transport, lambda: shared_parameters(module), **options)


def _rule(variant: str, alpha: float) -> MixingRule:
    check_choice("variant", variant, ("elastic", "pull", "push"))
    if variant == "elastic":
        return ElasticMixing(check_number("alpha", alpha, low=0, high=1, open_low=True))
    return PullMixing() if variant == "pull" else PushMixing()


def _on_gpu(module: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in module.parameters())
