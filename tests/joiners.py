"""Ranks as threads, of which some die and come back: as a donor or as a joiner either may die at any point.

A replay holds the survivors, those that came back among them, against design §3 from the donor's snapshot on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType

import numpy as np
import pytest
from survivors import Killed, Life, Mortal, Run, initial, update
from torch import nn
from torch.distributed import Store

from lightning_gossip.control import joining, member_control, run, stop, watching
from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.member_control import RunOver
from lightning_gossip.control.members import JOINED, JOINING
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.transport import handover
from lightning_gossip.transport.link import Link

TIMEOUT = timedelta(seconds=10)

OF_A_JOINER = ("claimed", "asked", "taken in", "loaded", "joined")
OF_A_DONOR = ("before taking in", "after taking in", "while serving")


def let_all_come_soon(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Let everything that a run does by time come ten times as soon, in ``modules`` besides those of control."""
    for module in (run, stop, watching, member_control, joining, *modules):
        monkeypatch.setattr(module, "LOOK", 0.02, raising=False)
        if hasattr(module, "HEARTBEAT"):
            monkeypatch.setattr(module, "HEARTBEAT", 0.1)
    monkeypatch.setattr(watching, "LEAD", 0.2)


@dataclass
class Stay:
    """One life of a rank: from its coming to its death, or the end."""

    rank: int
    life: Life
    incarnation: int = 0
    began_after: int = 0  # its clock when it began
    taken_at: int = 0  # the donor's clock
    donor: int = -1
    theta: np.ndarray | None = None  # that it began with
    over: bool = False


class Returning(Mortal):
    """A rank that takes others in between its steps; or comes in the place of one that died.

    Attributes:
        stay: what became of it.
    """

    run: Returns

    def __init__(self, run: Returns, rank: int, doom: tuple[int, str] | None = None, again: bool = False) -> None:
        self.again = again
        super().__init__(run, rank)
        if again:
            self.doom = doom or (0, "")
        self.stay = Stay(rank, self.life, -1) if again else Stay(rank, self.life, theta=initial(rank))
        self._links: list[Link] = []

    def come(self, incarnation: int) -> None:
        if incarnation or not self.again:  # who comes again has no seat yet
            super().come(incarnation)

    # -- as a donor ---------------------------------------------------------------------------------------------

    def after_step(self, exchange: Exchange, parameter: nn.Parameter) -> None:
        if self.run.pace:
            time.sleep(self.run.pace)
        if self.control.guest is None:
            return
        guest = self.control.guest
        self._at_once("before taking in")
        if self.control.take_in() is None:
            return
        self._at_once("after taking in")
        state = {
            "theta": parameter.detach().clone(),
            "exchange": exchange.state_to_join(),
            "position": self.control.position(),
            "step": self.step,
            "meetings": [m for m in self.run.meetings if m > self.step],
        }
        self.run.snapshots[guest] = (self.rank, self.step, parameter.detach().numpy().copy())
        link = handover.donors_link(self.run.store, self.rank, *guest, TIMEOUT)
        self._links.append(link)
        if self.doom[1] == "while serving" and self.doom[0] <= self.step:
            link.submit(lambda: link.send(handover.Header(handover.Kind.STATE, self.step, 10_000)))
            time.sleep(0.01)
            raise Killed
        handover.serve(link, self.step, lambda: state)

    def _at_once(self, point: str) -> None:
        """Die here, if this is the point, whatever the step from the doomed one on."""
        if self.doom[1] == point and self.doom[0] <= self.step:
            raise Killed

    # -- as a joiner --------------------------------------------------------------------------------------------

    def come_back(self) -> None:
        """Live in the place of one that died."""
        while True:
            incarnation = claim_seat(self.run.store, self.rank, self.run.world_size, self.survival)
            self._give_up()
            self.come(incarnation)
            self.stay.incarnation = incarnation
            self.at("claimed")
            self.control.ask()
            self.at("asked")
            donor = self.control.await_donor()
            self.at("taken in")
            if (state := handover.state_of(donor, self.control, self.run.store)) is not None:
                break
            self.control.leave("its donor was lost")
        self.control.take_place(state["position"])
        parameter = nn.Parameter(state["theta"])
        exchange = self.exchange_of(parameter)
        exchange.load_state_dict(state["exchange"])
        self.at("loaded")
        self.stay.donor, self.stay.taken_at = donor.rank, state["step"]
        self.stay.theta = parameter.detach().numpy().copy()
        self.step = state["step"]
        clock = self.control.clock_to_join(self.control.tell_joined(donor.rank))
        # which meetings it comes to follows from the donor's step: it makes no step before one that it has passed
        own = min([clock, *(m - 1 for m in state["meetings"]), self.run.steps - 1])
        self.step = self.stay.began_after = self.life.steps = max(own, state["step"])
        exchange.align(self.step)
        self.doom = (self.step + self.doom[0], self.doom[1])
        self.at("joined")
        self.train(exchange, parameter)

    def _give_up(self) -> None:
        if hasattr(self, "control"):
            self.control.close()
            self.transport.close()

    def die(self) -> None:
        super().die()
        for link in self._links:
            link.close()


@dataclass
class Returns(Run):
    """A run in which ranks come back.

    Attributes:
        returns: by rank, for each time that it comes back, the point at which it dies then (see :data:`OF_A_JOINER`, or
            steps after its joining, and a point of :mod:`survivors`), or None.
        pace: seconds that a step takes at least.
    """

    returns: Mapping[int, list[tuple[int, str] | None]] = field(default_factory=dict)
    pace: float = 0.002
    stays: list[Stay] = field(default_factory=list)
    snapshots: dict[tuple[int, int], tuple[int, int, np.ndarray]] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    def go(self) -> list[Life]:
        """Run all ranks, those that come back too; return the lives of the last that came to each seat."""
        threads = [threading.Thread(target=self._live, args=(rank,), daemon=True) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=25)
            assert not thread.is_alive(), "a rank hangs"
        if self.errors:
            raise self.errors[0]
        return [stay.life for stay in self.stays]

    def _live(self, rank: int) -> None:
        me = Returning(self, rank)
        left = list(self.returns.get(rank, ()))
        while True:
            self.stays.append(me.stay)
            try:
                me.come_back() if me.again else me.live()
            except Killed:
                me.die()
                if not self.delay:
                    me.life.mixed.pop(me.step, None)
                if not left:
                    return
                me = Returning(self, rank, left.pop(0), again=True)
                continue
            except RunOver:
                me.stay.over = True
            except BaseException as error:  # noqa: BLE001 - given to the test
                self.errors.append(error)
                if hasattr(me, "control"):
                    me.control.leave(f"{type(error).__name__}: {error}")
            if hasattr(me, "control") and me.rank == next(iter(me.control.members), -1):
                me.control.tell_over("nothing")
            me._give_up()
            for link in me._links:
                link.close()
            return


def check_log(store: Store, seats: int) -> None:
    """No entry stands twice, incarnations grow, and nobody serves before it is whole itself."""
    entries = [json.loads(store.get(f"change/{n}")) for n in range(1, 300) if store.check([f"change/{n}"])]
    for seat in range(seats):
        kinds = [(e["kind"], e["incarnation"]) for e in entries if e["seat"] == seat]
        assert len(set(kinds)) == len(kinds), f"an entry twice: {kinds}"
        joined = [number for kind, number in kinds if kind == JOINED]
        assert joined == sorted(joined)
    whole = set(range(seats))
    for entry in entries:
        if entry["kind"] == JOINING:
            assert entry["by"] in whole, f"rank {entry['by']} served before it was whole itself"
        elif entry["kind"] == JOINED:
            whole.add(entry["seat"])
        else:
            whole.discard(entry["seat"])


def check(run: Returns) -> None:
    """Hold what became of the ranks against the protocol, and those that lived to the end against a replay."""
    check_log(run.store, run.world_size)
    for stay in run.stays:
        if stay.donor >= 0:
            by, step, theta = run.snapshots[stay.rank, stay.incarnation]
            assert (by, step) == (stay.donor, stay.taken_at)
            assert stay.theta is not None
            assert np.array_equal(stay.theta, theta), "it begins with another state than the donor's"
    for step in range(1, run.steps + 1):
        drawn = {stay.life.drawn[step] for stay in run.stays if step in stay.life.drawn}
        assert len(drawn) <= 1, f"ranks drew step {step} among {drawn}"
    for step in run.meetings:
        sums = {stay.life.sums[step] for stay in run.stays if step in stay.life.sums}
        assert len(sums) <= 1, f"the collective of step {step} gave {sums}"
    ended = [stay for stay in run.stays if stay.life.theta is not None]
    assert ended, "nobody came to the end"
    for stay in ended:
        assert stay.life.steps == run.steps, (
            f"rank {stay.rank}.{stay.incarnation} ended at {stay.life.steps}, taken at {stay.taken_at}"
        )
        assert stay.life.longest < run.longest, f"rank {stay.rank} stood still for {stay.life.longest:.2f} s"
    replayed = replay(run)
    for stay in ended:
        assert stay.life.theta is not None
        np.testing.assert_allclose(stay.life.theta, replayed[id(stay)], rtol=0, atol=1e-12)


def replay(run: Returns) -> dict[int, np.ndarray]:
    """Design §3 by what each life mixed, all in one loop; a joiner begins with what it was given."""
    stays = [stay for stay in run.stays if stay.theta is not None]
    theta = {id(stay): stay.theta.copy() for stay in stays if stay.theta is not None}
    due: dict[int, dict[int, np.ndarray]] = {}
    for step in range(1, run.steps + 1):
        there = [s for s in stays if s.began_after < step]
        snapshots = {id(stay): theta[id(stay)].copy() for stay in there}
        latest: dict[int, Stay] = {}
        for stay in there:
            if stay.rank not in latest or latest[stay.rank].incarnation < stay.incarnation:
                latest[stay.rank] = stay
        for stay in there:
            partners = stay.life.mixed.get(step, ())
            if partners:
                moves = sum(snapshots[id(stay)] - snapshots[id(latest[k])] for k in partners)
                due.setdefault(step + run.delay, {})[id(stay)] = run.rule.weight(len(partners)) * moves
        for stay in there:
            if 0 < stay.life.died_at <= step and stay.life.steps < step:
                continue
            now = theta[id(stay)]
            theta[id(stay)] = now + update(now, stay.rank, step) - due.get(step, {}).pop(id(stay), 0.0)
    for step in sorted(s for s in due if s > run.steps):
        for key, moves in due[step].items():
            theta[key] = theta[key] - moves
    return theta
