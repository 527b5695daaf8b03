"""Ranks as threads that train by rounds, and of which some die at any point of an all-reduce."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import reduce
from typing import Any

import numpy as np
import torch
from survivors import Killed, all_at_once, control_of
from torch import Tensor, nn
from torch.distributed import HashStore

from lightning_gossip.control.member_control import Survival
from lightning_gossip.control.votes import Vote, Votes, Word
from lightning_gossip.exchange.round_buffers import Round
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.fragments import strided
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.transport.link import Link, Links
from lightning_gossip.transport.link_transport import end_of_rank
from lightning_gossip.transport.voted_all_reduce import VotedAllReduce

SHAPES = {"a.weight": (7, 3), "a.bias": (7,), "b.weight": (5, 7), "c.weight": (1,), "d.weight": (40,), "d.bias": (3, 2)}

OF_AN_ALL_REDUCE = (
    "before posting",
    "before its turn",
    "in its first half",
    "between the halves",
    "in its second half",
    "before its vote",
    "after its vote",
    "before the word",
    "after the word",
)
"""Where a rank may die in a round; the points of the word are those of whoever writes it."""


def initial() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape) for name, shape in SHAPES.items()}


def update(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
    """What rank's optimizer adds: SGD on a noisy quadratic that differs from rank to rank."""
    return -0.1 * (theta - rank + np.random.default_rng([rank, step, theta.size]).normal(size=theta.shape))


@dataclass
class Life:
    """What became of one rank."""

    applied: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)  # (posted at, part) → members
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # step → starts and momenta at its end
    steps: int = 0  # ended
    died_at: int = 0  # step; 0: it lived
    longest: float = 0.0  # seconds of a step or meeting
    theta: dict[str, np.ndarray] | None = None
    end: dict[str, Tensor] | None = None  # starts and momenta
    error: BaseException | None = None


class MortalStore:
    """The run's store, which a dead one reaches no more."""

    def __init__(self, me: Mortal) -> None:
        self._me = me

    def __getattr__(self, name: str) -> Any:
        if self._me.dying:
            self._me.die()
            raise Killed
        return getattr(self._me.run.store, name)


class MortalVote(Vote):
    me: Mortal

    def say_yes(self, gives_up: Callable[[], bool]) -> Word | None:
        self.me.at("before its vote")
        return super().say_yes(gives_up)

    def look(self) -> Word | None:
        if self._written:
            self.me.at("after its vote")
        return super().look()

    def _end(self, word: Word) -> Word:
        self.me.at("before the word")
        held = super()._end(word)
        self.me.at("after the word")
        return held


class MortalVotes(Votes):
    me: Mortal

    def on(self, question: str, members: Mapping[int, int]) -> Vote:
        self.me.round_step = int(question.split(".")[1])
        self.me.swaps, self.me.half = 0, "first"
        self.me.at("before its turn")
        vote = MortalVote(self, f"vote/{question}", members)
        vote.me = self.me
        return vote


class MortalReducer(VotedAllReduce):
    me: Mortal

    def post(self, header: Any, sent: Any, room: Any, combine: Any, staged: Any = None, members: Any = None) -> Any:
        def combining(*args: Any) -> None:
            self.me.at("between the halves")
            combine(*args)
            self.me.swaps, self.me.half = 0, "second"

        return super().post(header, sent, room, combining, staged, members)

    def _work(self) -> None:
        try:
            super()._work()
        except Killed:
            self.me.die()


class MortalLinks(Links):
    me: Mortal

    def to(self, peer: str) -> Link:
        if self.me.dying:
            raise Killed
        made = peer not in self._links
        link = super().to(peer)
        if made:
            swap = link.swap

            def swapping(outgoing: Tensor | None, incoming: Tensor | None) -> None:
                me = self.me
                with me.lock:
                    me.swaps += 1
                    first = me.swaps == 1
                if me.doomed_at(f"in its {me.half} half") and not first:  # with one other it is done
                    time.sleep(0.02)
                    me.dying = True
                    raise RuntimeError("killed")
                swap(outgoing, incoming)

            vars(link)["swap"] = swapping
        return link


class Mortal:
    """A rank whose life can end at any point."""

    def __init__(self, run: Run, rank: int) -> None:
        self.run, self.rank = run, rank
        self.life = Life()
        self.step = self.swaps = 0
        self.round_step = 0  # of the all-reduce at which the helper thread is
        self.half = "first"
        self.dying = self.dead = False
        self.lock, self.burial = threading.Lock(), threading.Lock()
        self.doom = run.dooms.get(rank, (0, ""))
        self.process = f"threads|{rank}|{run.number()}"
        self.survival = Survival(run.min_replicas, timedelta(seconds=10), self.process, run.is_gone)
        self.come(0)

    def come(self, incarnation: int) -> None:
        """Take part as a process of its seat."""
        run, rank = self.run, self.rank
        self.control = control_of(self, incarnation)
        check = self.control.check

        def checking() -> None:
            self.breathe()  # all threads of a process die at once
            check()

        vars(self.control)["check"] = checking
        store: Any = MortalStore(self)
        self.links = MortalLinks(run.store, end_of_rank(rank, incarnation), timedelta(seconds=20))
        votes = MortalVotes(store, self.control)
        self.links.me = votes.me = self
        self.reducer = MortalReducer(self.links, self.control, votes)
        self.reducer.me = self

    def dies(self, step: int, point: str) -> bool:
        return self.doom == (step, point)

    def doomed_at(self, point: str) -> bool:
        return self.dies(self.round_step, point)

    def at(self, point: str) -> None:
        if self.dying or self.doomed_at(point):
            self.die()
            raise Killed

    def die(self) -> None:
        """Leave what the kernel leaves: closed connections, no heartbeat; not a word."""
        with self.burial:
            self.dying = True
            if not self.dead:
                self.dead = True
                self.life.died_at = self.step
                self.control._closing.set()
                self.control._pause.set()
                self.control._thread.join()
                self.run.gone.add(self.process)
                self.links.close()

    def breathe(self) -> None:
        if self.dying:
            raise Killed

    def live(self) -> None:
        model = {name: nn.Parameter(torch.tensor(value)) for name, value in initial().items()}
        rounds = self.rounds_of(model)
        self.control.begin(10)
        self.train(rounds, model)

    def rounds_of(self, model: dict[str, nn.Parameter]) -> Rounds:
        run = self.run
        rounds = Rounds(
            self.rank,
            run.world_size,
            run.period,
            run.outer,
            self.reducer,
            lambda: model,
            delay=run.delay,
            fragments=run.fragments,
            wire_dtype=run.wire_dtype,
            members=self.control.all_at,
        )
        self._record(rounds)
        return rounds

    def train(self, rounds: Rounds, model: dict[str, nn.Parameter]) -> None:
        """Make the steps that are left, and meet at the end."""
        run = self.run
        while rounds.step < run.last_step(self.rank, run.steps):
            start = time.monotonic()
            self.step = rounds.step + 1
            if self.dies(self.step, "before posting"):
                raise Killed
            rounds.begin()
            with torch.no_grad():
                for parameter in model.values():
                    parameter.add_(torch.tensor(update(parameter.numpy(), self.rank, self.step)))
            rounds.end()
            self.breathe()
            self.life.steps = self.step
            self.life.kept[self.step] = self._kept(rounds)
            for meeting in run.meetings:
                if self.step == run.last_step(self.rank, meeting):
                    self._meet(rounds, f"step {meeting}")
            self.after_step(rounds, model)
            self.life.longest = max(self.life.longest, time.monotonic() - start)
        self._meet(rounds, "the last step")
        rounds.settle()
        self.breathe()
        self.control.meet("the end")
        self.life.end = self._kept(rounds)
        self.life.theta = {name: parameter.detach().numpy().copy() for name, parameter in model.items()}

    def after_step(self, rounds: Rounds, model: dict[str, nn.Parameter]) -> None:
        """Do what there is to do between two steps."""

    def _meet(self, rounds: Rounds, reason: str) -> None:
        rounds.arrive()
        self.breathe()
        meeting = self.control.meet(reason)
        rounds.align(meeting.clock)
        self.step = rounds.step
        if meeting.skipped:
            rounds.reset_links(meeting.number)

    def _kept(self, rounds: Rounds) -> dict[str, Tensor]:
        state = rounds._state.state_dict()
        return state["starts"] | {f"momentum of {name}": value for name, value in state["velocities"].items()}

    def _record(self, rounds: Rounds) -> None:
        make_step = rounds._make_step

        def making_step(round_: Round) -> None:
            self.breathe()
            self.life.applied[round_.step, round_.part] = round_.members
            make_step(round_)

        vars(rounds)["_make_step"] = making_step


@dataclass
class Run:
    """Ranks of one run, as threads.

    Attributes:
        dooms: by rank, the step of a round and the point at which it dies.
        meetings: steps after which all meet.
        early: by rank, how many steps before the others it comes to every meeting.
    """

    world_size: int
    dooms: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    period: int = 4
    delay: int = 0
    fragments: int = 1
    wire_dtype: torch.dtype | None = None
    outer: OuterStep = field(default_factory=lambda: OuterStep(0.7, 0.9))
    steps: int = 22
    meetings: tuple[int, ...] = ()
    early: Mapping[int, int] = field(default_factory=dict)
    min_replicas: int = 1
    longest: float = 3.0

    def __post_init__(self) -> None:
        self.store, self.gone = HashStore(), set[str]()
        self._processes = itertools.count()

    def number(self) -> int:
        return next(self._processes)

    def is_gone(self, process: str) -> bool:
        return process in self.gone

    def last_step(self, rank: int, step: int) -> int:
        return step - self.early.get(rank, 0)

    def go(self) -> list[Life]:
        """Run all ranks; return what became of them."""
        lives: list[Life] = [Life()] * self.world_size

        def run(rank: int) -> None:
            me = Mortal(self, rank)
            lives[rank] = me.life
            try:
                me.live()
            except Killed:
                me.die()
                return
            except BaseException as error:  # noqa: BLE001 - given to the test
                if me.dying:
                    me.die()
                    return
                me.life.error = error
                me.control.leave(f"{type(error).__name__}: {error}")
            me.reducer.close()
            me.control.close()

        all_at_once(self.world_size, run)
        return lives


def check(run: Run, lives: Sequence[Life]) -> None:
    """No two ever had different starts or momenta; parameters are those of a replay; nobody stood still."""
    survivors = [rank for rank, life in enumerate(lives) if not life.died_at]
    assert survivors
    for rank in survivors:
        if (error := lives[rank].error) is not None:
            raise error
        assert lives[rank].longest < run.longest, f"rank {rank} stood still for {lives[rank].longest:.2f} s"
        assert lives[rank].applied == lives[survivors[0]].applied
    for step in range(1, run.steps + 1):
        kept = [life.kept[step] for life in lives if step in life.kept]
        for other in kept[1:]:
            for name, value in kept[0].items():
                assert torch.equal(value, other[name]), f"{name} differs after step {step}"
    if not run.early:
        check_replay(run, lives, survivors)


def check_replay(run: Run, lives: Sequence[Life], survivors: Sequence[int]) -> None:
    theta, common = replay(run, lives, lives[survivors[0]].applied)
    for rank in survivors:
        own, end = lives[rank].theta, lives[rank].end
        assert own is not None
        assert end is not None
        assert lives[rank].steps == run.steps
        for name in SHAPES:
            np.testing.assert_allclose(own[name], theta[rank][name], rtol=0, atol=1e-12)
            np.testing.assert_allclose(end[name], common[name], rtol=0, atol=1e-12)


def replay(
    run: Run, lives: Sequence[Life], applied: Mapping[tuple[int, int], tuple[int, ...]]
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Design §12 by which rounds were applied, all ranks in one loop."""
    a, v = initial(), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    theta = [initial() for _ in lives]
    parts = strided({name: int(np.prod(shape)) for name, shape in SHAPES.items()}, run.fragments)
    due: dict[int, list[tuple[int, int, list[dict[str, np.ndarray]]]]] = {}

    def apply(posted: int, part: int, snapshots: list[dict[str, np.ndarray]]) -> None:
        if (members := applied.get((posted, part))) is None:
            return
        for name in parts[part]:
            drift = reduce(np.add, (a[name] - snapshots[rank][name] for rank in members)) / len(members)
            v[name] = run.outer.momentum * v[name] + drift
            a[name] = a[name] - run.outer.lr * (drift + run.outer.momentum * v[name])
            for rank in range(len(lives)):
                theta[rank][name] = theta[rank][name] + (a[name] - snapshots[rank][name])

    for step in range(1, run.steps + 1):
        for part in range(run.fragments):
            if step % run.period == part * run.period // run.fragments:
                snapshots = [{name: value.copy() for name, value in model.items()} for model in theta]
                due.setdefault(step + run.delay, []).append((step, part, snapshots))
        for rank, model in enumerate(theta):
            for name in model:
                model[name] = model[name] + update(model[name], rank, step)
        for round_ in due.pop(step, []):
            apply(*round_)
    for step in sorted(due):
        for round_ in due[step]:
            apply(*round_)
    return theta, a
