"""Asynchronous gossip that loses ranks at random, as threads: what those do that are left (design §10, §11)."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from asynchronous_replay import replay
from survivors import SIZE, Killed, all_at_once, initial, update
from torch import nn
from torch.distributed import HashStore

from lightning_gossip.control.member_control import MemberControl, Survival
from lightning_gossip.exchange import partners
from lightning_gossip.exchange.agreement import Phase, Side
from lightning_gossip.exchange.asynchronous import Applied, AsynchronousExchange
from lightning_gossip.rules.mixing import ElasticMixing, MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.link import Link

pytestmark = [pytest.mark.faults, pytest.mark.slow]

RULES: list[MixingRule] = [ElasticMixing(0.5), ElasticMixing(0.3), PullMixing(), PushMixing()]
SEEDS = 12
"""Of the random walk; ten times as many by ``--long``."""


@dataclass
class Life:
    """What became of a rank."""

    records: list[Applied] = field(default_factory=list)
    steps: int = 0  # updates made
    theta: np.ndarray | None = None
    updates: np.ndarray = field(default_factory=lambda: np.zeros(SIZE))
    longest: float = 0.0  # seconds of a step, but for its pauses
    dead: bool = False
    error: BaseException | None = None


@dataclass
class Doom:
    """When a rank dies: at the n-th message that it sends, or in a step."""

    message: int = 0
    step: int = 0


class Walk:
    """Ranks of one run, of which some die."""

    def __init__(self, size: int, dooms: dict[int, Doom], rule: MixingRule, steps: int, **options: Any) -> None:
        self.size, self.dooms, self.rule, self.steps = size, dooms, rule, steps
        self.options = options
        self.store, self.gone = HashStore(), set[str]()
        self.lives = [Life() for _ in range(size)]

    def go(self) -> list[Life]:
        all_at_once(self.size, self.live)
        return self.lives

    def dying(self) -> bool:
        """Whether somebody has still to die."""
        return any(not self.lives[rank].dead for rank in self.dooms)

    def live(self, rank: int) -> None:
        life, doom = self.lives[rank], self.dooms.get(rank, Doom())
        me = f"threads|{rank}|0"
        survival = Survival(1, timedelta(seconds=10), me, lambda process: process in self.gone)
        step = 0
        control = MemberControl(
            lambda: self.store, rank, self.size, timedelta(seconds=20), survival, clock=lambda: step
        )
        parameter = nn.Parameter(torch.tensor(initial(rank)))
        schedule = Schedule("uniform", period=self.options.get("period", 1), seed=self.options.get("seed", 0))
        exchange = AsynchronousExchange(
            rank, self.size, schedule, self.rule, control, self.store, lambda: {"theta": parameter}
        )
        exchange.records = life.records
        arm(exchange, doom)
        rng = np.random.default_rng([self.options.get("seed", 0), rank])
        try:
            control.begin(10)
            deadline = time.monotonic() + 10
            while step < self.steps or (self.dying() and time.monotonic() < deadline):
                step += 1
                if step == doom.step or dead(exchange):
                    raise Killed
                start = time.monotonic()
                exchange.begin()
                paused = pause(rng)
                exchange.shut()
                with torch.no_grad():
                    moved = torch.tensor(update(parameter.numpy(), rank, step))
                    parameter.add_(moved)
                life.updates += moved.numpy()
                exchange.end()
                life.steps = step
                life.longest = max(life.longest, time.monotonic() - start - paused)
            exchange.settle()
            if dead(exchange):
                raise Killed
            control.meet("the end")
            life.theta = parameter.detach().numpy().copy()
        except Killed:
            life.dead = True
            control._closing.set()
            control._pause.set()
            control._thread.join()
            self.gone.add(me)
            exchange.close()
            return
        except BaseException as error:  # noqa: BLE001 - given to the test
            life.error = error
            control.leave(f"{type(error).__name__}: {error}")
        exchange.close()
        control.close()


def pause(rng: np.random.Generator) -> float:
    seconds = rng.random() * 0.004 if rng.random() < 0.5 else 0.0
    time.sleep(seconds)
    return seconds


def arm(exchange: AsynchronousExchange, doom: Doom) -> None:
    """Let the rank fall silent at its n-th message: what it has sent before is on the wire."""
    mine: Any = exchange._partners
    mine.dead, mine.sent = False, 0
    run = mine._run

    def counting(link: Link, partner: int, job: Any) -> None:
        send, swap = link.send, link.swap

        def tick() -> None:
            mine.sent += 1
            if mine.dead or mine.sent == doom.message:
                mine.dead = True
                raise RuntimeError("killed")

        def sending(*args: Any) -> None:
            tick()
            send(*args)

        def swapping(*args: Any) -> None:
            tick()
            swap(*args)

        vars(link).update(send=sending, swap=swapping)
        run(link, partner, job)

    mine._run = counting


def dead(exchange: AsynchronousExchange) -> bool:
    return bool(exchange._partners and exchange._partners.dead)  # type: ignore[attr-defined]


def check(walk: Walk, lives: list[Life]) -> None:
    for rank, life in enumerate(lives):
        if life.error is not None:
            raise life.error
        if not life.dead:
            assert life.steps >= walk.steps
            assert life.longest < 5.0, f"rank {rank} stood still for {life.longest:.2f} s"
    start = {rank: initial(rank) for rank in range(walk.size)}
    records = {rank: life.records for rank, life in enumerate(lives)}
    steps = {rank: life.steps for rank, life in enumerate(lives)}
    replayed = replay(start, steps, records, update, walk.rule.weight)
    for rank, life in enumerate(lives):
        if life.theta is not None:
            np.testing.assert_allclose(life.theta, replayed[rank], rtol=0, atol=1e-12)
    if not isinstance(walk.rule, ElasticMixing):
        return
    sides = {(rank, r.own, *r.others[0]) for rank, life in enumerate(lives) for r in life.records}
    for rank, own, partner, theirs in sides:
        both = (partner, theirs, rank, own) in sides
        assert both or lives[partner].dead or lives[rank].dead, "one that lives applied what the other did not"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("rule", RULES[1:], ids=["elastic", "pull", "push"])
@pytest.mark.parametrize("message", range(1, 9))
def test_a_death_at_each_message(rule: MixingRule, message: int) -> None:
    walk = Walk(3, {1: Doom(message=message)}, rule, steps=60, seed=message)
    lives = walk.go()
    check(walk, lives)
    assert lives[1].dead


def test_the_mean_of_those_that_never_met_the_dead_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partners, "PATIENCE", 0.01)
    walk = Walk(4, {3: Doom(step=1)}, ElasticMixing(0.5), steps=120)
    lives = walk.go()
    check(walk, lives)
    left = [rank for rank in range(4) if not lives[rank].dead]
    assert left == [0, 1, 2]
    mean = np.mean([theta for life in lives if (theta := life.theta) is not None], axis=0)
    alone = np.mean([initial(rank) + lives[rank].updates for rank in left], axis=0)
    np.testing.assert_allclose(mean, alone, rtol=0, atol=1e-12)
    assert sum(len(lives[rank].records) for rank in left) > 40, "who asked it has turned to others"


def test_a_partner_that_is_cut_off_is_let_go_once_it_is_declared_lost() -> None:
    """Its host is gone: no link breaks, and only the log of members says so."""
    cut, store = threading.Event(), HashStore()
    survival = Survival(1, timedelta(seconds=10))
    controls = [
        MemberControl(lambda: store, rank, 2, timedelta(seconds=20), replace(survival, process=f"host{rank}|1|0"))
        for rank in range(2)
    ]

    def body(rank: int) -> None:
        control = controls[rank]
        parameter = nn.Parameter(torch.tensor(initial(rank)))
        exchange = AsynchronousExchange(
            rank, 2, Schedule("uniform"), ElasticMixing(0.5), control, store, lambda: {"theta": parameter}
        )
        try:
            if rank == 1:
                silent: Any = exchange._partners
                silent._decide = lambda visitor, number: time.sleep(3)  # it hears, and says nothing
                control.begin(10)
                cut.wait(10)
                return
            control.begin(10)
            exchange.begin()
            assert exchange.in_flight
            exchange.end()
            control.declare_lost(1, "cut off")
            exchange.begin()
            assert exchange._partners is not None
            side: Side = exchange._partners._side
            assert side.phase is Phase.IDLE
            exchange.end()
            exchange.settle()
        finally:
            cut.set()
            exchange.close()
            control.close()

    all_at_once(2, body)


def walks(count: int) -> list[Any]:
    return [pytest.param(seed, marks=[pytest.mark.long] if seed >= SEEDS else []) for seed in range(count)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("seed", walks(20 * SEEDS))
def test_ranks_that_are_killed_at_random(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 6))
    dying = rng.permutation(size)[: int(rng.integers(1, size))]
    dooms = {
        int(rank): Doom(message=int(rng.integers(1, 60))) if rng.random() < 0.7 else Doom(step=int(rng.integers(1, 40)))
        for rank in dying
    }
    walk = Walk(size, dooms, RULES[int(rng.integers(4))], steps=50, seed=seed, period=int(rng.integers(1, 4)))
    check(walk, walk.go())
