"""That gossip with an outer step settles, whoever mixes with whom: the rule alone, on stacked replicas (design §12).

Replicas drift by noise and by a weak spring to optima of their own, and exchange once a round. Beside the rule: the
momentum mixed as the parameters are, at twice the bytes (what the rule is measured by), and all that mixing moved told
to the momentum in place of a part (what must not be done).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Schedule

ALPHA, SIZE, SPRING, NOISE = 0.5, 24, 0.05, 1.0
BOUND = 1e6
MOMENTA, APART = (0.5, 0.9, 0.99), (0.0, 5.0)


class Replicas:
    """Stacked replicas of several runs at once, which differ in momentum and in how far apart their optima are.

    All have the same noise and mix with the same partners. Every tensor has shape (momenta, apart, replicas, size).
    """

    def __init__(
        self, count: int, momenta: Sequence[float], scheme: str, apart: Sequence[float], seed: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.count, self.scheme = count, scheme
        self.outer = [OuterStep(0.7, gamma) for gamma in momenta]
        self.optima = torch.tensor(apart, dtype=torch.float64).view(-1, 1, 1) * self.noise((count, SIZE))
        shape = (len(momenta), len(apart), count, SIZE)
        self.theta, self.start, self.velocity = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def train(self, rows: slice) -> None:
        theta = self.theta[..., rows, :]
        theta += SPRING * (self.optima[..., rows, :] - theta) + NOISE * self.noise(tuple(theta.shape[-2:]))

    def round(self, choices: np.ndarray) -> None:
        """Everybody's round at once: the outer step, then mixing of those whose choices are not -1."""
        self.train(slice(None))
        self.propose(slice(None))
        self.mix(slice(None), laplacian_of(choices.tobytes()))

    def asynchronous_round(self) -> None:
        """One replica's round, at a moment of its own: its partner, in mid-round, gives what it is (design §11)."""
        i, k = sorted(torch.randperm(self.count, generator=self.generator)[:2].tolist())
        asker = i if torch.rand((), generator=self.generator) < 0.5 else k
        self.train(slice(asker, asker + 1))
        self.propose(slice(asker, asker + 1))
        self.mix(slice(i, k + 1, k - i), PAIR)

    def propose(self, rows: slice) -> None:
        for outer, theta, start, velocity in self.by_momentum(rows):
            proposal = outer.propose(theta, start, velocity)
            theta.copy_(proposal)
            start.copy_(proposal)

    def mix(self, rows: slice, laplacian: Tensor) -> None:
        all_mixed = -ALPHA * laplacian @ self.theta[..., rows, :]
        for mixed, (outer, theta, start, velocity) in zip(all_mixed, self.by_momentum(rows), strict=True):
            if self.scheme == "rule":
                outer.absorb(mixed, theta, start, velocity)
                continue
            outer.absorb(mixed, theta, start, None)
            velocity += -ALPHA * laplacian @ velocity if self.scheme == "mixed" else mixed / outer.lr

    def by_momentum(self, rows: slice) -> Iterator[tuple[OuterStep, Tensor, Tensor, Tensor]]:
        """Each outer step with the θ, a and v of its runs."""
        theta, start, velocity = (tensor[..., rows, :] for tensor in (self.theta, self.start, self.velocity))
        return zip(self.outer, theta, start, velocity, strict=True)

    def distance(self) -> Tensor:
        """Root mean square over replicas and elements of a_i − ā; shape (momenta, apart)."""
        return (self.start - self.start.mean(dim=2, keepdim=True)).square().mean(dim=(2, 3)).sqrt()


PAIR = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)


@cache
def laplacian_of(choices: bytes) -> Tensor:
    """Of everybody's choices, as they lie in memory."""
    chosen = np.frombuffer(choices, dtype=np.int64)
    laplacian = np.zeros((len(chosen), len(chosen)))
    for rank in range(len(chosen)):
        for partner in ElasticMixing(ALPHA).transfers(chosen, rank).receive_from:
            laplacian[rank, partner] -= 1
            laplacian[rank, rank] += 1
    return torch.from_numpy(laplacian)


@cache
def distances(scheme: str, count: int, peers: str, probability: float, momenta: tuple[float, ...]) -> Tensor:
    """Return the distance after each round of every run, shape (rounds, momenta, apart).

    A hundredth of a momentum's memory, or fifty rounds between exchanges, are long: the rounds outlast both. They end
    where all runs have gone beyond BOUND.
    """
    replicas = Replicas(count, momenta, scheme, APART)
    schedule = Schedule(peers, probability) if peers != "asynchronous" else None
    seen: list[Tensor] = []
    for number in range(1, (900 if count < 128 else 1200) + 1):
        if schedule is not None:
            replicas.round(schedule.choices(number, count))
        else:
            for _ in range(count):
                replicas.asynchronous_round()
        seen.append(replicas.distance())
        if not (seen[-1] < BOUND).any():
            break
    return torch.stack(seen)


def settled(
    scheme: str, count: int, peers: str, probability: float, gamma: float, apart: float, rounds: int
) -> tuple[float, float]:
    """Return the distance over the middle and over the last third of the rounds; infinite once it is beyond BOUND."""
    momenta = MOMENTA if scheme == "rule" else (gamma,)
    of_all = distances(scheme, count, peers, probability, momenta)[:rounds]
    seen = of_all[:, momenta.index(gamma), APART.index(apart)]
    if not bool((seen < BOUND).all()):
        return float("inf"), float("inf")
    assert len(seen) == rounds
    thirds = seen.square().tensor_split(3)
    return float(thirds[1].mean().sqrt()), float(thirds[2].mean().sqrt())


SCHEDULES = ("matching", "ring", "exponential", "uniform")
CASES = [
    (count, peers, probability, gamma)
    for peers in SCHEDULES
    for count, probability in ((4, 1.0), (4, 0.5), (8, 1.0), (32, 0.1), (32, 1.0), (128, 0.02))
    for gamma in MOMENTA
] + [(count, "asynchronous", 1.0, gamma) for count in (4, 32) for gamma in MOMENTA]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("apart", APART, ids=["optima agree", "optima differ"])
@pytest.mark.parametrize(("count", "peers", "probability", "gamma"), CASES)
def test_the_distance_settles(count: int, peers: str, probability: float, gamma: float, apart: float) -> None:
    rounds = 900 if count < 128 else 1200
    middle, last = settled("rule", count, peers, probability, gamma, apart, rounds)
    assert last < 1.35 * middle, "it still grows"
    assert last < 60, "it settles far from where noise and springs alone would hold the replicas"


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("apart", "allowed"), [(0.0, 1.2), (5.0, 2.0)], ids=["optima agree", "optima differ"])
@pytest.mark.parametrize(
    ("count", "probability"), [(4, 1.0), (4, 0.5), (8, 1.0), (8, 0.5), (32, 1.0), (32, 0.1), (128, 0.02)]
)
def test_replicas_stay_about_as_near_as_with_twice_the_bytes(
    count: int, probability: float, apart: float, allowed: float
) -> None:
    ours, mixed = (settled(scheme, count, "matching", probability, 0.9, apart, 900)[1] for scheme in ("rule", "mixed"))
    assert ours < allowed * mixed


@pytest.mark.parametrize(
    ("count", "peers", "probability"),
    [(4, "matching", 0.5), (32, "matching", 0.1), (32, "exponential", 1.0), (4, "uniform", 1.0), (32, "uniform", 1.0)],
)
def test_with_all_that_mixing_moved_told_to_the_momentum_replicas_run_apart(
    count: int, peers: str, probability: float
) -> None:
    assert settled("whole", count, peers, probability, 0.9, 0.0, 900)[1] == float("inf")
    assert settled("rule", count, peers, probability, 0.9, 0.0, 900)[1] < 60


def test_a_mixing_moves_a_replica_over_all_its_future_by_less_than_it_gave_to_the_momentum() -> None:
    """The docstring's sum: (γ² + γ³ + …)(1 − γ) c = γ² c, of a replica that drifts no more and mixes no more."""
    for gamma in (0.5, 0.9, 0.99):
        outer = OuterStep(0.7, gamma)
        theta, start, velocity, mixed = (torch.full((1,), x, dtype=torch.float64) for x in (0.0, 0.0, 0.0, 1.0))
        outer.absorb(mixed, theta, start, velocity)
        for _ in range(5000):
            proposal = outer.propose(theta, start, velocity)
            theta.copy_(proposal)
            start.copy_(proposal)
        torch.testing.assert_close(theta, 1 + gamma**2 * mixed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("peers", [*SCHEDULES, "asynchronous"])
def test_mixing_leaves_the_sums_over_the_replicas(peers: str) -> None:
    """Whoever mixes with whom, in whichever order: so the mean makes DiLoCo's step on the mean drift."""
    replicas = Replicas(8, [0.9], "rule", [5.0])
    mix, errors = replicas.mix, list[Tensor]()

    def watched(rows: slice, laplacian: Tensor) -> None:
        tensors = (replicas.theta, replicas.start, replicas.velocity)
        before = [tensor.sum(dim=2) for tensor in tensors]
        mix(rows, laplacian)
        errors.extend((tensor.sum(dim=2) - sums).abs().max() for tensor, sums in zip(tensors, before, strict=True))

    replicas.mix = watched  # type: ignore[method-assign]
    schedule = Schedule(peers, 0.7) if peers != "asynchronous" else None
    for number in range(1, 101):
        if schedule is None:
            replicas.asynchronous_round()
        else:
            replicas.round(schedule.choices(number, 8))
    assert len(errors) == 300
    assert max(errors) < 1e-12 * float(replicas.start.abs().max()) * 8
