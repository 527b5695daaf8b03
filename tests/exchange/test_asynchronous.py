"""Asynchronous gossip against a replay of what the ranks recorded, and what must hold of the mean (design §11)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from asynchronous_replay import replay
from ranks import Rank, run_ranks
from torch import nn

from lightning_gossip.exchange import partners
from lightning_gossip.exchange.agreement import Word
from lightning_gossip.exchange.asynchronous import Applied, AsynchronousStats
from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Schedule

STEPS, RANKS, SIZE = 300, 5, 6

RULES: dict[str, MixingRule] = {"elastic": ElasticMixing(0.5), "pull": PullMixing(), "push": PushMixing()}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


def initial(rank: int) -> np.ndarray:
    return np.random.default_rng(rank).normal(size=SIZE)


def gradient(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
    return theta - rank + np.random.default_rng([rank, step]).normal(size=SIZE)


class Updates:
    """What the optimizers add, from their papers, in numpy."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.m: dict[int, np.ndarray] = {}
        self.v: dict[int, np.ndarray] = {}

    def __call__(self, theta: np.ndarray, rank: int, step: int) -> np.ndarray:
        g = gradient(theta, rank, step)
        if self.name == "sgd":
            return -0.1 * g
        if self.name == "momentum":
            self.m[rank] = g if step == 1 else 0.9 * self.m[rank] + g
            return -0.05 * self.m[rank]
        self.m[rank] = 0.9 * self.m.get(rank, np.zeros(SIZE)) + 0.1 * g
        self.v[rank] = 0.999 * self.v.get(rank, np.zeros(SIZE)) + 0.001 * g**2
        scaled = self.m[rank] / (1 - 0.9**step) / (np.sqrt(self.v[rank] / (1 - 0.999**step)) + 1e-8)
        return -0.05 * scaled - 0.05 * 0.1 * theta


@dataclass
class Run:
    """What a rank did."""

    theta: np.ndarray
    records: list[Applied]
    updates: np.ndarray  # the sum of what its optimizer added
    stats: AsynchronousStats


def train(
    optimizer: str, rule: MixingRule, ranks: int = RANKS, steps: int = STEPS, pause: float = 0.002, **kwargs: Any
) -> list[Run]:
    """Train ranks as threads, which pause at random before, within and after a step, and meet at the end."""
    peers = kwargs.pop("peers", "uniform")
    period, probability = kwargs.pop("period", 1), kwargs.pop("probability", 1.0)

    def body(rank: Rank) -> Run:
        rng = np.random.default_rng([7, rank.rank])

        def sleep() -> None:
            if rng.random() < 0.3:
                time.sleep(rng.random() * pause)

        parameter = nn.Parameter(torch.tensor(initial(rank.rank)))
        optim = OPTIMIZERS[optimizer]([parameter])
        schedule = Schedule(peers, probability=probability, period=period, seed=3)
        exchange = rank.asynchronous(schedule, rule, {"theta": parameter}, **kwargs)
        exchange.records = []
        updates = np.zeros(SIZE)
        for t in range(1, steps + 1):
            exchange.begin()
            sleep()
            parameter.grad = torch.tensor(gradient(parameter.detach().numpy(), rank.rank, t))
            sleep()
            exchange.shut()
            before = parameter.detach().numpy().copy()
            optim.step()
            updates += parameter.detach().numpy() - before
            exchange.end()
            sleep()
        exchange.arrive()
        rank.control.meet("the end")
        theta = parameter.detach().numpy().copy()
        exchange.close()
        return Run(theta, exchange.records, updates, exchange.stats)

    return run_ranks(ranks, body)


def replayed(optimizer: str, rule: MixingRule, runs: list[Run], steps: int = STEPS, **kwargs: Any) -> np.ndarray:
    start = {rank: initial(rank) for rank in range(len(runs))}
    records = {rank: run.records for rank, run in enumerate(runs)}
    theta = replay(start, dict.fromkeys(start, steps), records, Updates(optimizer), rule.weight, **kwargs)
    return np.stack([theta[rank] for rank in start])


def check_pairs(runs: list[Run]) -> int:
    """Both sides applied the same pair of snapshots; return how many pairs there were."""
    sides = {(rank, r.own, k, s) for rank, run in enumerate(runs) for r in run.records for k, s in r.others}
    assert all((k, s, rank, own) in sides for rank, own, k, s in sides)
    assert len(sides) == sum(len(run.records) for run in runs), "a snapshot served twice"
    return len(sides) // 2


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_replicas_equal_the_replay_of_their_records(rule: str, optimizer: str) -> None:
    runs = train(optimizer, RULES[rule])
    expected = replayed(optimizer, RULES[rule], runs)
    np.testing.assert_allclose(np.stack([run.theta for run in runs]), expected, rtol=0, atol=1e-12)
    assert sum(len(run.records) for run in runs) > STEPS / 4, [len(run.records) for run in runs]
    if rule == "elastic":
        check_pairs(runs)
        mean = np.mean([run.theta for run in runs], axis=0)
        alone = np.mean([initial(rank) + run.updates for rank, run in enumerate(runs)], axis=0)
        np.testing.assert_allclose(mean, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("peers", ["matching", "weighted", "ring"])
def test_the_mean_is_kept_whoever_is_asked(peers: str) -> None:
    runs = train("sgd", ElasticMixing(0.5), steps=100, peers=peers, period=2, probability=0.8)
    assert check_pairs(runs)
    mean = np.mean([run.theta for run in runs], axis=0)
    alone = np.mean([initial(rank) + run.updates for rank, run in enumerate(runs)], axis=0)
    np.testing.assert_allclose(mean, alone, rtol=0, atol=1e-12)


def test_two_that_always_ask_each_other_exchange_all_the_time() -> None:
    runs = train("sgd", ElasticMixing(0.5), ranks=2)
    expected = replayed("sgd", ElasticMixing(0.5), runs)
    np.testing.assert_allclose(np.stack([run.theta for run in runs]), expected, rtol=0, atol=1e-12)
    assert check_pairs(runs) > STEPS / 20


def test_who_answers_late_is_told_that_it_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 says nothing for a while, as if it were stopped: the others go on with each other, and it comes back."""
    monkeypatch.setattr(partners, "PATIENCE", 0.02)

    def body(rank: Rank) -> tuple[Run, list[int]]:
        parameter = nn.Parameter(torch.tensor(initial(rank.rank)))
        schedule = Schedule("uniform", period=1 if rank.rank != 1 else 1000, seed=3)  # rank 1 only answers
        exchange = rank.asynchronous(schedule, ElasticMixing(0.5), {"theta": parameter})
        exchange.records = []
        mine: Any = exchange._partners
        said: list[int] = []
        say, decide = mine._say, mine._decide

        def noting(link: Any, word: Word, number: int = 0) -> None:
            said.append(int(word))
            say(link, word, number)

        vars(mine)["_say"] = noting
        if rank.rank == 1:
            stopped = time.monotonic() + 0.5

            def late(*args: Any) -> Any:
                time.sleep(max(0.0, stopped - time.monotonic()))
                return decide(*args)

            vars(mine)["_decide"] = late
        for step in range(1, 301):
            exchange.begin()
            time.sleep(0.004)
            exchange.shut()
            with torch.no_grad():
                parameter.sub_(0.1 * torch.tensor(gradient(parameter.numpy(), rank.rank, step)))
            exchange.end()
        exchange.settle()
        rank.control.meet("the end")
        theta = parameter.detach().numpy().copy()
        exchange.close()
        return Run(theta, exchange.records, np.zeros(SIZE), exchange.stats), said

    runs, said = zip(*run_ranks(3, body), strict=True)
    check_pairs(list(runs))
    start = {rank: initial(rank) for rank in range(3)}
    records = {rank: run.records for rank, run in enumerate(runs)}
    theta = replay(start, dict.fromkeys(start, 300), records, Updates("sgd"), lambda count: 0.5)
    np.testing.assert_allclose(
        np.stack([run.theta for run in runs]), np.stack(list(theta.values())), rtol=0, atol=1e-12
    )
    assert Word.VOID in said[0] or Word.VOID in said[2]
    early = [r for rank in (0, 2) for r in runs[rank].records if r.moment < 100]
    assert len(early) > 10, "the others went on with each other"
    assert any(r.others[0][0] == 1 for rank in (0, 2) for r in runs[rank].records), "it is asked again"


def test_a_single_rank_exchanges_nothing() -> None:
    [run] = train("sgd", ElasticMixing(0.5), ranks=1, steps=10)
    assert (run.records, run.stats.busy) == ([], None)


def bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.tensor(x).to(torch.bfloat16).to(torch.float64).numpy()


@pytest.mark.parametrize("rule", RULES)
def test_a_16_bit_wire_equals_its_replay(rule: str) -> None:
    runs = train("momentum", RULES[rule], steps=100, wire_dtype=torch.bfloat16)
    expected = replayed("momentum", RULES[rule], runs, 100, rounding=bfloat16)
    np.testing.assert_allclose(np.stack([run.theta for run in runs]), expected, rtol=0, atol=1e-12)


def test_the_fast_do_not_wait_for_a_slow_one() -> None:
    """Four ranks, the first three times slower: the others' steps last as long as alone."""
    pause, steps = 0.01, 80

    def body(rank: Rank) -> tuple[float, AsynchronousStats]:
        parameter = nn.Parameter(torch.zeros(1000))
        exchange = rank.asynchronous(Schedule("uniform", seed=1), ElasticMixing(0.5), {"theta": parameter})
        start = time.perf_counter()
        for _ in range(steps):
            exchange.begin()
            time.sleep(pause * (3 if rank.rank == 0 else 1))
            exchange.end()
        seconds = time.perf_counter() - start
        exchange.settle()
        rank.control.meet("the end")
        exchange.close()
        return seconds, exchange.stats

    (slow, _), *others = run_ranks(4, body)
    assert slow > 3 * pause * steps
    assert np.median([seconds for seconds, _ in others]) < 0.75 * slow
    assert np.mean([stats.exchanges for _, stats in others]) > steps / 4


class Outer:
    """Design §12 with asynchrony, in numpy: what is proposed in a rank's own rounds, and what mixing moves."""

    lr, momentum = 0.7, 0.9

    def __init__(self, theta: np.ndarray) -> None:
        self.theta, self.start, self.v = theta.copy(), theta.copy(), np.zeros(SIZE)

    def propose(self) -> np.ndarray:
        drift = self.theta - self.start
        self.v = self.momentum * self.v + drift
        return self.start + self.lr * (drift + self.momentum * self.v)

    def absorb(self, move: np.ndarray) -> None:
        self.theta, self.start = self.theta + move, self.start + move
        self.v = self.v + (1 - self.momentum) * move / self.lr


def test_outer_steps_are_made_at_the_rank_s_own_pace_and_sum_with_what_mixing_moves() -> None:
    """Each replica equals a replay of its own outer steps and of the moves that it was given; these sum to zero."""
    steps, period = 120, 5
    moves: dict[int, list[tuple[int, np.ndarray]]] = {rank: [] for rank in range(4)}

    def body(rank: Rank) -> np.ndarray:
        rng = np.random.default_rng(rank.rank)
        parameter = nn.Parameter(torch.tensor(initial(rank.rank)))
        outer = OuterStep(Outer.lr, Outer.momentum)
        schedule = Schedule("uniform", period=period, seed=3)
        exchange = rank.asynchronous(schedule, ElasticMixing(0.5), {"theta": parameter}, outer=outer)
        mix = exchange._mix

        def mixing(agreed: Any) -> None:
            own, theirs = (
                x.view(torch.float64)[:SIZE].numpy().copy() for x in (agreed.own.payload, agreed.received[0].payload)
            )
            moves[rank.rank].append((exchange.step, -0.5 * (own - theirs)))
            mix(agreed)

        vars(exchange)["_mix"] = mixing
        for t in range(1, steps + 1):
            exchange.begin()
            time.sleep(rng.random() * 0.002)
            exchange.shut()
            with torch.no_grad():
                parameter.sub_(0.1 * torch.tensor(gradient(parameter.numpy(), rank.rank, t)))
            exchange.end()
        exchange.settle()
        rank.control.meet("the end")
        exchange.close()
        return parameter.detach().numpy().copy()

    thetas = run_ranks(4, body)
    total = sum(move for rank in moves.values() for _, move in rank)
    np.testing.assert_allclose(total, np.zeros(SIZE), rtol=0, atol=1e-12)
    for rank, theta in enumerate(thetas):
        assert len(moves[rank]) > 5
        replica = Outer(initial(rank))
        for t in range(1, steps + 1):
            before = replica.theta.copy()
            y = replica.propose() if t % period == 0 else None
            replica.theta = replica.theta - 0.1 * gradient(before, rank, t)
            if y is not None:
                replica.theta, replica.start = replica.theta + (y - before), y
            for _, move in (move for move in moves[rank] if move[0] == t):
                replica.absorb(move)
        np.testing.assert_allclose(theta, replica.theta, rtol=0, atol=1e-11)
