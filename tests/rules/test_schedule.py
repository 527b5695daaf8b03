"""Who exchanges with whom: frequencies, agreement between ranks, and the stability limit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from lightning_gossip.rules.schedule import SELECTORS, Schedule, WeightedPeers, peer_probabilities, stability_limit


def rounds(schedule: Schedule, world_size: int, count: int) -> np.ndarray:
    steps = (schedule.period * (r + 1) for r in range(count))
    return np.stack([schedule.choices(step, world_size) for step in steps])


@pytest.mark.parametrize("peers", SELECTORS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 17])
def test_choices_are_other_ranks(peers: str, world_size: int) -> None:
    if peers == "exponential" and world_size & (world_size - 1):
        pytest.skip("needs a power of two")
    choices = rounds(Schedule(peers, probability=0.8), world_size, 200)
    assert choices.min() >= -1
    assert choices.max() < world_size
    assert (choices != np.arange(world_size)).all()
    if peers in ("matching", "ring", "exponential"):
        for row in choices:
            paired = np.flatnonzero(row >= 0)
            assert (row[row[paired]] == paired).all(), "pairs choose each other"
    full = rounds(Schedule(peers), world_size, 50)
    idle = (full < 0).sum(axis=1)
    assert (idle == (world_size % 2 if peers in ("matching", "ring") else 0)).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("peers", ["matching", "uniform", "weighted", "ring", "exponential"])
@pytest.mark.parametrize("probability", [0.125, 0.6])
def test_probability_is_the_frequency_of_taking_part(peers: str, probability: float) -> None:
    count, world_size = 20_000, 4
    taking_part = rounds(Schedule(peers, probability, seed=5), world_size, count) >= 0
    coins = count * (world_size if peers in ("uniform", "weighted") else world_size // 2)
    sigma = (probability * (1 - probability) / coins) ** 0.5
    assert abs(taking_part.mean() - probability) < 4 * sigma
    if peers in ("uniform", "weighted"):  # coins of ranks are independent
        together = (taking_part[:, 0] & taking_part[:, 1]).mean()
        assert abs(together - probability**2) < 4 * (probability**2 / count) ** 0.5


@pytest.mark.parametrize("peers", ["matching", "uniform", "weighted"])
def test_partners_are_drawn_with_their_weights(peers: str) -> None:
    count, n, seed = 40_000, 5, 11
    choices = rounds(Schedule(peers, seed=seed), n, count)
    if peers == "weighted":
        expected = peer_probabilities(seed, n, 1.0)
        positions_differ = np.unique(expected[expected > 0]).size > n
        assert positions_differ, "weights are not uniform"
    else:
        # matching: 5 ranks, each idle in a fifth of the rounds
        expected = (1 - np.eye(n)) / (n - 1) * (0.8 if peers == "matching" else 1.0)
    frequency = np.stack([(choices == k).mean(axis=0) for k in range(n)], axis=1)
    assert np.abs(frequency - expected).max() < 4.5 * (0.25 / count) ** 0.5


def test_weights_follow_the_penalty() -> None:
    mild, strong = peer_probabilities(1, 6, 0.0), peer_probabilities(1, 6, 4.0)
    np.testing.assert_allclose(mild[~np.eye(6, dtype=bool)], 1 / 5)
    assert strong.max() > 0.5
    np.testing.assert_allclose(strong.sum(axis=1), 1)


def written_out(seed: int, n: int, penalty: float) -> np.ndarray:
    """The weights 1 / (d + 1e-5)^penalty, as they stand."""
    positions = np.random.Generator(np.random.Philox(key=seed)).random((n, 2))
    weights = (np.linalg.norm(positions[:, None] - positions[None], axis=2) + 1e-5) ** -penalty
    np.fill_diagonal(weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0, 2.5, 8.0])
def test_weights_of_ordinary_penalties_choose_as_written_out(penalty: float) -> None:
    n, seed, count = 9, 4, 2000
    expected = written_out(seed, n, penalty)
    np.testing.assert_allclose(peer_probabilities(seed, n, penalty), expected, rtol=1e-13)
    choices = rounds(Schedule(WeightedPeers(penalty), seed=seed), n, count)
    for step in range(1, count + 1):
        picks = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, 0])).random((2, n))[1]
        rows = zip(np.cumsum(expected, axis=1), picks, strict=True)
        chosen = [np.searchsorted(row, pick * row[-1], "right") for row, pick in rows]
        assert choices[step - 1].tolist() == chosen


@pytest.mark.parametrize("penalty", [70.0, 1e4, 1e308])
@pytest.mark.filterwarnings("error")
def test_a_large_penalty_chooses_the_nearest(penalty: float) -> None:
    n, seed = 12, 3
    probabilities = peer_probabilities(seed, n, penalty)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (np.diag(probabilities) == 0).all()
    choices = rounds(Schedule(WeightedPeers(penalty), seed=seed), n, 50)
    assert (choices != np.arange(n)).all()
    if penalty > 100:
        assert (choices == probabilities.argmax(axis=1)).all()
        assert (probabilities.argmax(axis=1) == written_out(seed, n, 1.0).argmax(axis=1)).all()


@pytest.mark.parametrize("peers", SELECTORS)
def test_everybody_computes_the_same_and_a_resume_continues(peers: str) -> None:
    unbroken = rounds(Schedule(peers, 0.7, seed=9), 4, 40)
    other = Schedule(peers, 0.7, seed=9)
    for step in (40, 17, 1, 23):  # any order: nothing is remembered
        np.testing.assert_array_equal(other.choices(step, 4), unbroken[step - 1])
    if peers in ("matching", "uniform", "weighted"):
        assert (rounds(Schedule(peers, 0.7, seed=10), 4, 40) != unbroken).any()


@pytest.mark.parametrize("peers", SELECTORS)
def test_rounds_come_at_multiples_of_the_period(peers: str) -> None:
    schedule = Schedule(peers, period=3)
    for step in range(1, 13):
        assert (schedule.choices(step, 4) >= 0).any() == (step % 3 == 0)


def test_ring_and_exponential_follow_the_round_number() -> None:
    ring = Schedule("ring", period=2)
    assert ring.choices(2, 5).tolist() == [-1, 2, 1, 4, 3]  # round 1: 1-2, 3-4
    assert ring.choices(4, 5).tolist() == [4, -1, 3, 2, 0]  # round 2: 2-3, 4-0
    exponential = Schedule("exponential")
    assert exponential.choices(1, 8).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert exponential.choices(3, 8).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    with pytest.raises(ValueError, match="power of two, got 6"):
        exponential.check_world_size(6)


def test_a_single_rank_has_nobody() -> None:
    for peers in SELECTORS:
        assert Schedule(peers).choices(1, 1).tolist() == [-1]


class Given:
    def __init__(self, choices: Any) -> None:
        self.given = choices

    def choices(self, step: int, world_size: int) -> Any:
        return self.given


def test_peers_of_ones_own() -> None:
    schedule = Schedule(Given(np.array([1, -1, 1])), period=2)
    assert schedule.choices(1, 3).tolist() == [-1, -1, -1]
    assert schedule.choices(2, 3).tolist() == [1, -1, 1]


@pytest.mark.parametrize("choices", [[0, 0, 1], [1, 2], [1, 3, 0], [1, -2, 0], [1.0, 2.0, 0.0], "abc"])
def test_peers_of_ones_own_are_checked(choices: Any) -> None:
    with pytest.raises(ValueError, match=r"`peers.choices` of Given must return 3 integers"):
        Schedule(Given(choices)).choices(1, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"peers": "nearest"}, "`peers` must be one of 'matching', .* got 'nearest'"),
        ({"peers": 3}, "`peers` must be one of"),
        ({"peers": Given}, r"`peers` must be one of .* or an object with `choices\(.*\)`; got <class '.*Given'>"),
        ({"peers": WeightedPeers}, "`peers` must be one of .* got <class '.*WeightedPeers'>"),
        ({"probability": 0.0}, r"`probability` must be a number in \(0, 1\], got 0.0"),
        ({"probability": 1.5}, "`probability`"),
        ({"probability": float("nan")}, "`probability`"),
        ({"probability": True}, "`probability`"),
        ({"period": 0}, "`period` must be an integer of at least 1, got 0"),
        ({"period": 2.0}, "`period`"),
        ({"seed": -1}, "`seed`"),
        ({"peers": Given([]), "probability": 0.5}, "tosses its own coins"),
    ],
)
def test_arguments_are_checked(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**kwargs)


def test_penalty_is_checked() -> None:
    with pytest.raises(ValueError, match="`penalty`"):
        WeightedPeers(penalty=-1)


def laplacians(n: int) -> list[np.ndarray]:
    """Of all equally likely rounds of `uniform` at probability 1: every rank chooses one of the others."""
    found = []
    for chosen in itertools.product(*[[k for k in range(n) if k != i] for i in range(n)]):
        adjacency = np.zeros((n, n))
        for i, k in enumerate(chosen):
            adjacency[i, k] = adjacency[k, i] = 1
        found.append(np.diag(adjacency.sum(1)) - adjacency)
    return found


def test_stability_limit_equals_its_definition() -> None:
    n = 4
    mean = np.mean(laplacians(n), axis=0)
    mean_square = np.mean([lap @ lap for lap in laplacians(n)], axis=0)
    expected = 2 * np.trace(mean) / np.trace(mean_square)
    assert expected == pytest.approx(0.68, abs=0.005)
    assert stability_limit(Schedule("uniform"), n) == pytest.approx(expected, rel=0.01)
    assert stability_limit(Schedule("uniform"), 32) == pytest.approx(0.58, abs=0.01)
    assert stability_limit(Schedule("matching"), 4) == 1.0
    for peers, world_size in itertools.product(("uniform", "weighted", "ring"), (2, 3, 64)):
        assert stability_limit(Schedule(peers), world_size) > 0.5, "one half is stable on all that have a name"


class Table:
    """Everybody chooses rank 0, in so many rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.asked = rounds, 0

    def choices(self, step: int, world_size: int) -> list[int]:
        self.asked += 1
        return ([[1, *[0] * (world_size - 1)]] * self.rounds)[step - 1]


@pytest.mark.parametrize(("rounds", "asked"), [(3, 4), (10_000, 64)])
def test_stability_limit_of_peers_of_ones_own_asks_few_rounds(rounds: int, asked: int) -> None:
    """The star among n: d = n − 1 once and 1 else, so 2 · 2 (n − 1) / ((n − 1) n + 2 (n − 1)) = 4 / (n + 2)."""
    for n in (3, 8):
        table = Table(rounds)
        assert stability_limit(Schedule(table), n) == pytest.approx(4 / (n + 2))
        assert table.asked == asked


def test_an_error_of_peers_of_ones_own_is_not_hidden() -> None:
    assert stability_limit(Schedule(Table(0)), 4) == 1.0, "nothing is known"
    with pytest.raises(IndexError):
        Schedule(Table(0)).choices(1, 4)
    with pytest.raises(ValueError, match=r"`peers.choices` of Given"):
        stability_limit(Schedule(Given([7, 7, 7, 7])), 4)
