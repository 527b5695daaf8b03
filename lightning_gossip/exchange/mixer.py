"""What a replica does with the snapshots of an exchange: its rule, its outer step, and what is not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_gossip.exchange.flat import FlatBuffer
from lightning_gossip.exchange.flat_mixing import Scratch, is_finite, mix_segments
from lightning_gossip.exchange.in_flight import InFlight
from lightning_gossip.exchange.outer_gossip import OuterGossip
from lightning_gossip.exchange.stats import NotFinite
from lightning_gossip.rules.mixing import MixingRule

log = logging.getLogger(__name__)


class Mixer:
    """Moves one replica by what its exchanges bring.

    Args:
        rank: of the replica.
        rule: the weight of what arrives.
        outer: the replica's own outer step; None without.
        heals: whether a replica that is not finite takes a partner's snapshot, in place of :class:`NotFinite`.
    """

    def __init__(self, rank: int, rule: MixingRule, outer: OuterGossip | None, heals: bool) -> None:
        self._rank = rank
        self._rule = rule
        self._outer = outer
        self._heals = heals
        self._scratch = Scratch()

    def mix(self, exchange: InFlight, received: Sequence[Tensor]) -> bool:
        """Mix ``received`` in and return True; where something is not finite, mix nothing in and return False.

        The own outer step, where there is one, is made either way, once.
        """
        layout, parameters = exchange.layout, exchange.parameters
        weight = self._rule.weight(len(received)) if received else 0.0
        if self._outer is None:
            return mix_segments(layout, parameters, exchange.own, received, weight, self._scratch)
        own, *others = (FlatBuffer(layout, storage) for storage in (exchange.own, *received))
        if exchange.proposal is None:
            return self._outer.mix(parameters, own, others, weight)
        proposal, exchange.proposal = exchange.proposal, None
        return self._outer.apply(parameters, proposal, own, others, weight)

    def mix_finite(self, exchange: InFlight, received: Sequence[Tensor], on_heal: Callable[[], None]) -> list[Tensor]:
        """Mix in what is finite, or take it in place of a replica that is not, and call ``on_heal``; return it.

        Raises:
            NotFinite: for what is not, unless this replica heals.
        """
        finite = [is_finite(payload, exchange.layout) for payload in received]
        healthy = is_finite(exchange.own, exchange.layout)
        whose = [rank for rank, good in zip(exchange.received_from, finite, strict=False) if not good]
        for rank in [*whose, *(() if healthy else (self._rank,))]:
            found = NotFinite(rank, exchange.step, self._rank)
            if not self._heals:
                raise found
            log.warning("%s: it is not mixed in", found)
        left = [payload for payload, good in zip(received, finite, strict=True) if good]
        if left and healthy:
            self.mix(exchange, left)
        elif left:
            snapshot = FlatBuffer(exchange.layout, left[0])
            if self._outer is None:
                snapshot.copy_to(exchange.parameters)
            else:
                self._outer.take(exchange.parameters, snapshot)
            on_heal()
        return left
