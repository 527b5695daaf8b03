"""Ranks as threads, of which some die: what a killed process leaves behind is what they leave behind."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed import HashStore, PrefixStore

from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import MemberControl, Survival
from lightning_gossip.control.together import together
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.rules.mixing import MixingRule
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.group import MeetingStore, give_up
from lightning_gossip.transport.interface import Posted, Transferred
from lightning_gossip.transport.link import Link, Links, ProcessGroupGloo, gloo_device
from lightning_gossip.transport.link_transport import LinkTransport, end_of_rank

SIZE = 6
CONNECT = timedelta(seconds=0.3)

IN_A_STEP = ("before posting", "posted", "before applying")
AT_A_MEETING = (
    "before its word",
    "after its word",
    "before the collective",
    "within the collective",
    "after the collective",
)


class Killed(BaseException):
    """In the place of SIGKILL."""


def initial(rank: int) -> np.ndarray:
    return np.random.default_rng(rank).normal(size=SIZE)


def update(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
    """What rank's optimizer adds: SGD on a noisy quadratic that differs from rank to rank."""
    return -0.1 * (theta - rank + np.random.default_rng([rank, step]).normal(size=SIZE))


@dataclass
class Life:
    """What became of one rank."""

    mixed: dict[int, tuple[int, ...]] = field(default_factory=dict)  # step posted → whose snapshots it applied
    drawn: dict[int, tuple[int, ...]] = field(default_factory=dict)  # step → members
    steps: int = 0  # ended
    died_at: int = 0  # step; 0: it lived
    longest: float = 0.0  # seconds of a step or meeting
    theta: np.ndarray | None = None
    sums: dict[int, float] = field(default_factory=dict)  # of the members' numbers, by collective
    error: BaseException | None = None


class Recording(LinkTransport):
    """Remembers what every wait brought."""

    received: dict[int, tuple[int, ...]]

    def post(self, header: Any, *args: Any, **kwargs: Any) -> Posted:
        posted = super().post(header, *args, **kwargs)
        wait = posted.wait

        def recording() -> Transferred:
            done = wait()
            self.received[header.step] = tuple(sorted(done.received))
            return done

        posted.wait = recording  # type: ignore[method-assign]
        return posted


def control_of(mortal: Any, incarnation: int) -> MemberControl:
    """Return the control of a rank that is a thread, as that process of its seat."""
    run, timeout = mortal.run, timedelta(seconds=20)
    return MemberControl(
        lambda: run.store,
        mortal.rank,
        run.world_size,
        timeout,
        mortal.survival,
        incarnation,
        clock=lambda: mortal.step,
    )


class Mortal:
    """A rank whose life can end at any point.

    Attributes:
        doom: step and point at which it dies.
    """

    def __init__(self, run: Run, rank: int) -> None:
        self.run, self.rank = run, rank
        self.life = Life()
        self.step = 0
        self.doom = run.dooms.get(rank, (0, ""))
        self.process = f"threads|{rank}|{run.number()}"
        self.survival = Survival(run.min_replicas, run.lost_after, self.process, self.run.is_gone)
        self.come(0)

    def come(self, incarnation: int) -> None:
        """Take part as a process of its seat."""
        run, rank = self.run, self.rank
        self.control = control_of(self, incarnation)
        self.links = Links(run.store, end_of_rank(rank, incarnation), timedelta(seconds=20))
        self.transport = Recording(self.links, self.control, run.shared_memory)
        self.transport.received = {}

    def dies(self, point: str) -> bool:
        return self.doom == (self.step, point)

    def at(self, point: str) -> None:
        if self.dies(point):
            raise Killed

    def die(self) -> None:
        """Leave what the kernel leaves: closed connections, memory that nobody owns, no heartbeat; not a word."""
        self.life.died_at = self.step
        self.control._closing.set()
        self.control._pause.set()
        self.control._thread.join()
        if self.transport._outbox is not None:
            self.transport._outbox.close()
        self.run.gone.add(self.process)
        self.links.close()

    def live(self) -> None:
        parameter = nn.Parameter(torch.tensor(initial(self.rank)))
        exchange = self.exchange_of(parameter)
        self.control.begin(10)
        self.train(exchange, parameter)

    def exchange_of(self, parameter: nn.Parameter) -> Exchange:
        exchange = Exchange(
            self.rank,
            self.run.world_size,
            self.run.schedule(),
            self.run.rule,
            self.transport,
            lambda: {"theta": parameter},
            delay=self.run.delay,
            members=self._members_at,
        )
        self._arm(exchange)
        return exchange

    def train(self, exchange: Exchange, parameter: nn.Parameter) -> None:
        """Make the steps that are left, and meet at the end."""
        run = self.run
        for step in range(self.step + 1, run.steps + 1):
            start = time.monotonic()
            self.step = step
            self.at("before posting")
            exchange.begin()
            self.at("posted")
            with torch.no_grad():
                parameter.add_(torch.tensor(update(parameter.numpy(), self.rank, step)))
            exchange.end()
            self.life.steps = step
            if step in run.meetings:
                self._meet(exchange, step)
            self.after_step(exchange, parameter)
            self.life.longest = max(self.life.longest, time.monotonic() - start)
        self.control.meet("the end")
        exchange.settle()
        self.life.theta = parameter.detach().numpy().copy()

    def after_step(self, exchange: Exchange, parameter: nn.Parameter) -> None:
        """Do what there is to do between two steps."""

    def _members_at(self, step: int) -> tuple[int, ...]:
        members = self.control.members_at(step)
        if self.rank in members:
            self.life.drawn[step] = members
        return members

    def _arm(self, exchange: Exchange) -> None:
        mix, announce, skips = exchange._mix, self.control._announce, self.control.goes_on_without

        def mixing(in_flight: Any, received: Any) -> bool:
            self.at("before applying")
            self.life.mixed[in_flight.step] = in_flight.received_from
            return mix(in_flight, received)

        def announcing(*args: Any) -> None:
            announce(*args)
            self.at("after its word")

        def going_on(partner: int, why: str, incarnation: int) -> bool:
            if self.dies("after its header") or self.dies("in mid-payload"):
                raise Killed
            return skips(partner, why, incarnation)

        vars(exchange)["_mix"] = mixing
        vars(self.control).update({"_announce": announcing, "goes_on_without": going_on})

    def _meet(self, exchange: Exchange, step: int) -> None:
        """Meet, and sum the members' numbers in a group of their own, until all that are left have the sum."""
        self.at("before its word")
        exchange.arrive()

        def meet() -> Meeting:
            meeting = self.control.meet(f"step {step}")
            if meeting.skipped:
                exchange.reset_links(meeting.number)
            return meeting

        def add(meeting: Meeting) -> float:
            self.at("before the collective")
            fresh = MeetingStore(self.run.store, lambda: self.control.has_lost(meeting), timedelta(seconds=5))
            store = PrefixStore(f"group/{meeting.number}", fresh)
            index = meeting.members.index(self.rank)
            options = ProcessGroupGloo._Options()
            options._devices = [self.run.device]
            options._timeout = CONNECT
            options._threads = 1
            group = ProcessGroupGloo(store, index, len(meeting.members), options)
            number = torch.tensor([float(2**self.rank)])
            self.at("joining the group")
            try:
                group.barrier().wait(timedelta(seconds=5))
                self.at("within the collective")
                group.allreduce([number]).wait(timedelta(seconds=5))
            except RuntimeError:
                give_up(group, index, len(meeting.members))  # who is no neighbour of the dead one waits for this
                raise
            self.at("after the collective")
            return float(number)

        self.life.sums[step] = together(self.control, meet, add)


@dataclass
class Run:
    """Ranks of one run, as threads.

    Attributes:
        dooms: by rank, the step and the point at which it dies.
        meetings: steps after which all meet.
    """

    world_size: int
    dooms: Mapping[int, tuple[int, str]]
    rule: MixingRule
    schedule: Callable[[], Schedule]
    steps: int = 20
    delay: int = 0
    shared_memory: bool = True
    meetings: tuple[int, ...] = ()
    min_replicas: int = 1
    lost_after: timedelta = timedelta(seconds=10)
    longest: float = 1.0

    def __post_init__(self) -> None:
        self.store, self.gone, self.device = HashStore(), set[str](), gloo_device()
        self._processes = itertools.count()

    def number(self) -> int:
        """Return the number of a new process."""
        return next(self._processes)

    def is_gone(self, process: str) -> bool:
        return process in self.gone

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
                me.life.mixed.pop(me.step, None) if not self.delay else None
                return
            except BaseException as error:  # noqa: BLE001 - given to the test
                me.life.error = error
                me.control.leave(f"{type(error).__name__}: {error}")
            me.transport.close()
            me.control.close()

        all_at_once(self.world_size, run)
        return lives


def all_at_once(count: int, run: Callable[[int], None]) -> None:
    """Call ``run`` with each of so many ranks, in a thread each, to the end of all; raise what the first one raised."""
    errors: list[BaseException] = []

    def call(rank: int) -> None:
        try:
            run(rank)
        except BaseException as error:  # noqa: BLE001 - given to the test
            errors.append(error)

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]


def break_link(monkeypatch: Any, mortals: Mapping[int, tuple[int, str]]) -> None:
    """Let links of the doomed break after the header of that step, before the payload."""
    swap = Link.swap

    def breaking(link: Link, outgoing: Any, incoming: Any) -> None:
        doom = mortals.get(int(link.own.removeprefix("rank")), (0, ""))
        if doom[1] == "after its header" and link.last_step == doom[0]:  # type: ignore[attr-defined]
            raise RuntimeError("killed")
        swap(link, outgoing, incoming)

    send = Link.send

    def sending(link: Link, header: Any, *payloads: Any) -> None:
        link.last_step = header.step  # type: ignore[attr-defined]
        send(link, header, *payloads)

    monkeypatch.setattr(Link, "send", sending)
    monkeypatch.setattr(Link, "swap", breaking)


def check(run: Run, lives: list[Life]) -> None:
    """Hold what became of the ranks against the protocol, and the survivors against a replay."""
    survivors = [rank for rank, life in enumerate(lives) if not life.died_at]
    for rank in survivors:
        life = lives[rank]
        if life.error is not None:
            raise life.error
        assert life.steps == run.steps, "it lost a step"
        assert life.longest < run.longest, f"rank {rank} stood still for {life.longest:.2f} s"
    for step in range(1, run.steps + 1):
        drawn = {life.drawn[step] for life in lives if step in life.drawn}
        assert len(drawn) <= 1, f"ranks drew step {step} among {drawn}"
        for i, life in enumerate(lives):
            for k in life.mixed.get(step, ()):
                partner = lives[k]
                if not partner.died_at and not life.died_at and type(run.rule).__name__ == "ElasticMixing":
                    assert i in partner.mixed.get(step, ()), f"rank {k} did not mix what rank {i} did at {step}"
    for step in run.meetings:
        sums = {life.sums[step] for rank, life in enumerate(lives) if step in life.sums}
        assert len(sums) == 1, f"the collective of step {step} gave {sums}"
        [total] = sums
        took_part = {rank for rank in range(run.world_size) if int(total) >> rank & 1}
        assert took_part >= {rank for rank, life in enumerate(lives) if not life.died_at}
        assert not {rank for rank, life in enumerate(lives) if 0 < life.died_at < step} & took_part
    entries = [run.store.get(f"change/{n}") for n in range(1, 100) if run.store.check([f"change/{n}"])]
    declared = [json.loads(entry)["seat"] for entry in entries]
    assert len(declared) == len(set(declared)), "a loss was declared twice"
    replayed = replay(run, lives)
    for rank in survivors:
        theta = lives[rank].theta
        assert theta is not None
        np.testing.assert_allclose(theta, replayed[rank], rtol=0, atol=1e-12)


def replay(run: Run, lives: list[Life]) -> dict[int, np.ndarray]:
    """Design §3 by what each rank mixed, all ranks in one loop."""
    theta = {rank: initial(rank) for rank in range(run.world_size)}
    due: dict[int, dict[int, np.ndarray]] = {}
    for step in range(1, run.steps + 1):
        snapshots = {rank: value.copy() for rank, value in theta.items()}
        for rank, life in enumerate(lives):
            partners = life.mixed.get(step, ())
            if partners:
                moves = sum(snapshots[rank] - snapshots[k] for k in partners)
                due.setdefault(step + run.delay, {})[rank] = run.rule.weight(len(partners)) * moves
        for rank in list(theta):
            if 0 < lives[rank].died_at <= step and lives[rank].steps < step:
                continue  # its last snapshot is that of the step in which it died
            theta[rank] = theta[rank] + update(theta[rank], rank, step) - due.get(step, {}).pop(rank, 0.0)
    for step in sorted(s for s in due if s > run.steps):
        for rank, moves in due[step].items():
            theta[rank] = theta[rank] - moves
    return theta
