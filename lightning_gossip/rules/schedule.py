"""Who exchanges with whom at which step: pure functions of (seed, step, world size).

Every rank computes everybody's choices from the same numbers, so that no message is needed to agree on them and a
resumed run continues the schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lightning_gossip.arguments import check_choice, check_integer, check_number

Choices = NDArray[np.int64]
"""Entry ``i`` is the rank that rank ``i`` chose, or -1 where it chose none. Shape ``(world_size,)``."""


@runtime_checkable
class Chooser(Protocol):
    """The interface of a schedule; an object of yours with this method can be given as ``peers``."""

    def choices(self, step: int, world_size: int) -> Choices:
        """Return the rank chosen by each rank at ``step`` (counted from 1), -1 for none; shape ``(world_size,)``.

        It must be a pure function of its arguments: every rank calls it and must get the same answer. It may be asked
        ahead (:func:`stability_limit`); a table that ends raises ``LookupError`` there, as lists do.
        """
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """What a selector may depend on: the round's number (1, 2, …), the ranks, the coin's bias, the run's seed."""

    number: int
    world_size: int
    probability: float
    seed: int


class Peers(ABC):
    """How the built-in schedules pick partners in one round."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, round_: Round) -> Choices:
        """Return the choices of a round among at least 2 ranks; ``rng`` is at the start of that step's numbers."""

    def check_world_size(self, world_size: int) -> None:  # noqa: B027 - most selectors take any size
        """Raise ``ValueError`` where this selector can not serve ``world_size`` ranks."""


class MatchingPeers(Peers):
    """A random permutation whose consecutive ranks choose each other; one coin a pair; the odd rank is idle."""

    def draw(self, rng: np.random.Generator, round_: Round) -> Choices:
        """See :meth:`Peers.draw`."""
        order = rng.permutation(round_.world_size)
        paired = round_.world_size - round_.world_size % 2
        return _pair_up(order[0:paired:2], order[1:paired:2], rng, round_)


class UniformPeers(Peers):
    """Each rank tosses its own coin, then chooses uniformly among the others (Pramod 2018, arXiv:1812.02407)."""

    def draw(self, rng: np.random.Generator, round_: Round) -> Choices:
        """See :meth:`Peers.draw`."""
        coins, picks = rng.random((2, round_.world_size))
        others = (picks * (round_.world_size - 1)).astype(np.int64)
        others += others >= _ranks(round_.world_size)
        return _where_heads(coins, others, round_)


@dataclass(frozen=True)
class WeightedPeers(Peers):
    """As ``"uniform"``, but nearer ranks are likelier: weights 1 / (d + 1e-5)^penalty.

    ``d`` is the distance of two ranks' positions, drawn once from the seed in the unit square (the thesis' code).

    Args:
        penalty: exponent of the distance, at least 0; 0 is uniform.

    Raises:
        ValueError: if ``penalty`` is not a finite number of at least 0.
    """

    penalty: float = 1.0

    def __post_init__(self) -> None:
        check_number("penalty", self.penalty, low=0)

    def draw(self, rng: np.random.Generator, round_: Round) -> Choices:
        """See :meth:`Peers.draw`."""
        coins, picks = rng.random((2, round_.world_size))
        cumulative = np.cumsum(peer_probabilities(round_.seed, round_.world_size, self.penalty), axis=1)
        others = (picks[:, None] * cumulative[:, -1:] >= cumulative).sum(axis=1)
        return _where_heads(coins, others, round_)


class RingPeers(Peers):
    """In round r, ranks r + 2j and r + 2j + 1 (mod n) choose each other."""

    def draw(self, rng: np.random.Generator, round_: Round) -> Choices:
        """See :meth:`Peers.draw`."""
        first = (round_.number + 2 * np.arange(round_.world_size // 2)) % round_.world_size
        return _pair_up(first, (first + 1) % round_.world_size, rng, round_)


class ExponentialPeers(Peers):
    """In round r, rank i and rank i XOR 2^(r mod log2 n) choose each other; n must be a power of two."""

    def draw(self, rng: np.random.Generator, round_: Round) -> Choices:
        """See :meth:`Peers.draw`."""
        bit = 1 << (round_.number % (round_.world_size.bit_length() - 1))
        ranks = _ranks(round_.world_size)
        first = ranks[ranks & bit == 0]
        return _pair_up(first, first ^ bit, rng, round_)

    def check_world_size(self, world_size: int) -> None:
        """Raise ``ValueError`` unless ``world_size`` is a power of two."""
        if world_size & (world_size - 1):
            raise ValueError(
                f"`peers='exponential'` needs a world size that is a power of two, got {world_size} ranks;"
                " 'matching', 'uniform', 'weighted' and 'ring' take any"
            )


SELECTORS: dict[str, type[Peers]] = {
    "matching": MatchingPeers,
    "uniform": UniformPeers,
    "weighted": WeightedPeers,
    "ring": RingPeers,
    "exponential": ExponentialPeers,
}


class Schedule:
    """The rounds of a run: at steps divisible by ``period``, ``peers`` choose with ``probability``.

    An object of this class belongs to one thread.

    Args:
        peers: a name of ``SELECTORS``, a :class:`Peers`, or an object of yours with the :class:`Chooser`
            interface, which tosses its own coins.
        probability: of a rank (``uniform``, ``weighted``) or a pair (the others) to take part in a round; in (0, 1].
        period: steps from one round to the next, at least 1.
        seed: of every draw, at least 0.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(self, peers: Any = "matching", probability: float = 1.0, period: int = 1, seed: int = 0) -> None:
        self.period = check_integer("period", period, low=1)
        self.probability = check_number("probability", probability, low=0, high=1, open_low=True)
        self.seed = check_integer("seed", seed, low=0, high=2**63 - 1)
        if isinstance(peers, (str, type)) or not isinstance(peers, (Peers, Chooser)):
            name = check_choice("peers", peers, SELECTORS, otherwise="an object with `choices(step, world_size)`")
            peers = SELECTORS[name]()
        if not isinstance(peers, Peers) and probability != 1:
            raise ValueError(
                f"`probability` must be 1.0 where `peers` is an object of yours (it tosses its own coins),"
                f" got {probability!r}"
            )
        self.peers: Peers | Chooser = peers
        self._bits = np.random.Philox(key=self.seed)
        self._start = self._bits.state
        self._rng = np.random.Generator(self._bits)

    @property
    def drawn_together(self) -> int:
        """How many rounds' choices may be drawn at once, ahead of their steps; an object of yours is asked in time."""
        return 64 if isinstance(self.peers, Peers) else 1

    def is_round(self, step: int) -> bool:
        """Whether ranks choose at ``step`` (counted from 1) at all."""
        return step % self.period == 0

    def choices(self, step: int, world_size: int) -> Choices:
        """Return what each of ``world_size`` ranks chose at ``step`` (counted from 1): a rank, or -1 for none.

        Raises:
            ValueError: if a :class:`Chooser` of yours returns something else, or the world size does not suit.
        """
        if world_size == 1 or not self.is_round(step):
            return np.full(world_size, -1, dtype=np.int64)
        if not isinstance(self.peers, Peers):
            return _checked(self.peers.choices(step, world_size), self.peers, step, world_size)
        self._rewind(step)
        return self.peers.draw(self._rng, Round(step // self.period, world_size, self.probability, self.seed))

    def check_world_size(self, world_size: int) -> None:
        """Raise ``ValueError`` where the peers can not serve ``world_size`` ranks."""
        if isinstance(self.peers, Peers):
            self.peers.check_world_size(world_size)

    def serves(self, world_size: int) -> bool:
        """Whether the peers can serve ``world_size`` ranks."""
        try:
            self.check_world_size(world_size)
        except ValueError:
            return False
        return True

    def _rewind(self, step: int) -> None:
        """Set the counter-based generator to the numbers of ``step`` (six times as fast as making a new one)."""
        self._start["state"]["counter"][:] = (0, 0, step, 0)
        self._bits.state = self._start


def stability_limit(schedule: Schedule, world_size: int, draws: int = 2**18) -> float:
    """Return the largest stable α of elastic gossip on this schedule: 2a / b.

    With a = tr E[L] / (n - 1) and b = tr E[L²] / (n - 1), L a round's graph Laplacian, the expected squared
    consensus distance shrinks for every α below it. It is at least 2 / n: a rank has n - 1 partners at most.

    The expectations are means over the schedule's first rounds, about ``draws`` choices of single ranks; an object of
    yours is asked for its first 64 rounds, or as many as it has.
    """
    if world_size == 1:
        return 1.0
    trace, trace_of_square = 0, 0
    for choices in _first_rounds(schedule, world_size, max(2, min(4096, draws // world_size))):
        degrees = _degrees(choices)
        trace += int(degrees.sum())
        trace_of_square += int((degrees * (degrees + 1)).sum())
    return 2 * trace / trace_of_square if trace else 1.0


def _first_rounds(schedule: Schedule, world_size: int, count: int) -> Iterator[Choices]:
    is_yours = not isinstance(schedule.peers, Peers)
    for number in range(1, min(count, 64) + 1 if is_yours else count + 1):
        try:
            choices = schedule.choices(number * schedule.period, world_size)
        except LookupError:
            if is_yours:
                return  # a table ends; training raises this where it comes so far
            raise
        yield choices


@lru_cache(maxsize=8)
def peer_probabilities(seed: int, world_size: int, penalty: float) -> NDArray[np.float64]:
    """Return the probability with which rank i (row) chooses rank k (column) under :class:`WeightedPeers`.

    Shape ``(world_size, world_size)``; rows sum to 1, the diagonal is 0.
    """
    positions = np.random.Generator(np.random.Philox(key=seed)).random((world_size, 2))
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    reach = distances + 1e-5
    np.fill_diagonal(reach, np.inf)
    # relative to the nearest rank's: a large penalty can not overflow
    weights = (reach.min(axis=1, keepdims=True) / reach) ** penalty
    np.fill_diagonal(weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _degrees(choices: Choices) -> NDArray[np.int64]:
    """Return the number of partners of each rank: a mutual choice is one edge."""
    world_size = len(choices)
    choosers = np.flatnonzero(choices >= 0)
    chosen = choices[choosers]
    edges = np.unique(np.minimum(choosers, chosen) * world_size + np.maximum(choosers, chosen))
    return np.bincount(np.concatenate((edges // world_size, edges % world_size)), minlength=world_size)


@lru_cache(maxsize=8)
def _ranks(world_size: int) -> NDArray[np.int64]:
    return np.arange(world_size)


def _where_heads(coins: NDArray[np.float64], others: NDArray[np.int64], round_: Round) -> Choices:
    if round_.probability < 1:
        others[coins >= round_.probability] = -1
    return others


def _pair_up(first: NDArray[np.int64], second: NDArray[np.int64], rng: np.random.Generator, round_: Round) -> Choices:
    choices = np.full(round_.world_size, -1, dtype=np.int64)
    if round_.probability < 1:
        heads = rng.random(len(first)) < round_.probability
        first, second = first[heads], second[heads]
    choices[first] = second
    choices[second] = first
    return choices


def _checked(choices: Any, peers: Chooser, step: int, world_size: int) -> Choices:
    given = np.asarray(choices)
    ranks = _ranks(world_size)
    fits = given.shape == (world_size,) and given.dtype.kind in "iu"
    if not fits or ((given < -1) | (given >= world_size) | (given == ranks)).any():
        raise ValueError(
            f"`peers.choices` of {type(peers).__name__} must return {world_size} integers, each another rank or -1;"
            f" at step {step} it returned {choices!r}"
        )
    return given.astype(np.int64, copy=False)
