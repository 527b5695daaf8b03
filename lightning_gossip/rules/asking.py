"""Whom a rank asks for an exchange in a round of its own, where ranks do not go by one clock (design §11).

First the one that the schedule draws for it at its own step: ranks of one pace that draw each other, as under
``matching``, then ask each other. Where that one is in another exchange, a neighbour by the same rule that was not
asked in the round yet.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_gossip.rules.schedule import (
    ExponentialPeers,
    Peers,
    RingPeers,
    Schedule,
    WeightedPeers,
    peer_probabilities,
)

TRIES = 3
"""Ranks that are asked in one round, at most."""


@dataclass
class OwnRounds:
    """One rank's rounds: in which it asks, and which brought it no exchange.

    Whoever is in an exchange when its round comes has its round in that, and who was asked in the round before, beside
    its own exchange there, had it early: so ranks of one pace exchange as often as by step.

    Args:
        in_pairs: whether who is asked has an exchange, as who asks has.
    """

    in_pairs: bool
    _before: int | None = None  # exchanges of before the present round

    def begin(self, exchanges: int, under_way: bool) -> tuple[bool, bool]:
        """Begin a round; return whether to ask, and whether the round before came to nothing.

        Args:
            exchanges: of this rank so far.
            under_way: whether one is.
        """
        since = None if self._before is None else exchanges - self._before
        early = self.in_pairs and since is not None and since > 1
        self._before = exchanges - early
        return not early and not under_way, since == 0 and not under_way


def first(schedule: Schedule, step: int, rank: int, members: Sequence[int], world_size: int) -> int:
    """Return whom ``rank`` asks first in its round at ``step``; -1 for none, by its coin.

    Args:
        schedule: of the run; belongs to the calling thread.
        step: the rank's own.
        rank: of who asks: nobody, where it is no member, because it is lost and has not seen it yet.
        members: ranks that take part, ascending.
        world_size: number of ranks, of which a schedule that can not serve as few members is drawn among all.

    Raises:
        ValueError: if a :class:`~lightning_gossip.rules.schedule.Chooser` of the user's returns what is none.
    """
    if len(members) == world_size or not schedule.serves(len(members)):
        chosen = int(schedule.choices(step, world_size)[rank])
        return chosen if chosen in members else -1
    if rank not in members:
        return -1
    chosen = int(schedule.choices(step, len(members))[members.index(rank)])
    return members[chosen] if chosen >= 0 else -1


def another(
    schedule: Schedule,
    step: int,
    rank: int,
    members: Sequence[int],
    tried: Collection[int],
    without: Collection[int],
    world_size: int,
) -> int:
    """Return whom ``rank`` asks once those in ``tried`` were busy; -1 where nobody is left, or after :data:`TRIES`.

    A pure function, for any thread. An object of the user's is not asked again. Arguments as of :func:`first`;
    ``without``: ranks that are not asked either.
    """
    peers = schedule.peers
    if not isinstance(peers, Peers) or len(tried) >= TRIES or rank not in members:
        return -1
    among = list(members) if schedule.serves(len(members)) else list(range(world_size))
    weights = _weights(peers, schedule.seed, among.index(rank), len(among))
    may_be_asked = set(members).difference(tried, without)
    weights[[k for k, other in enumerate(among) if other not in may_be_asked]] = 0
    if not weights.any():
        return -1
    rng = np.random.Generator(np.random.Philox(key=schedule.seed, counter=[len(tried), rank + 1, step, 0]))
    return among[int(rng.choice(len(among), p=weights / weights.sum()))]


def neighbours(schedule: Schedule, rank: int, world_size: int) -> list[int]:
    """Return whom ``rank`` may ever ask, as far as that is known beforehand."""
    if not isinstance(schedule.peers, Peers):
        return []
    return np.flatnonzero(_weights(schedule.peers, schedule.seed, rank, world_size)).tolist()


def _weights(peers: Peers, seed: int, rank: int, size: int) -> np.ndarray:
    """Return how likely each of ``size`` ranks is to be a neighbour of ``rank``, up to a factor; shape ``(size,)``."""
    if isinstance(peers, WeightedPeers):
        return peer_probabilities(seed, size, peers.penalty)[rank].copy()
    if isinstance(peers, RingPeers):
        near = [(rank - 1) % size, (rank + 1) % size]
    elif isinstance(peers, ExponentialPeers):
        near = [rank ^ (1 << bit) for bit in range(size.bit_length() - 1)]
    else:
        near = list(range(size))
    weights = np.zeros(size)
    weights[near] = 1.0
    weights[rank] = 0.0
    return weights
