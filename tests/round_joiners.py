"""Ranks as threads that train by rounds, die at any point, and come back with the common start of the others.

A replay holds those that live to the end, those that came back among them, against design §12.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import reduce
from typing import Any

import numpy as np
import torch
from joiners import OF_A_JOINER, check_log
from round_survivors import SHAPES, Life, Mortal, Run, initial, update
from survivors import Killed
from torch import Tensor, nn

from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.member_control import RunOver
from lightning_gossip.control.members import Change
from lightning_gossip.control.taking_in import TAKING_IN, take_in_together
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.fragments import strided
from lightning_gossip.transport import handover
from lightning_gossip.transport.link import Link

TIMEOUT = timedelta(seconds=10)

OF_A_DONOR = ("before the meeting", "before taking in", "after taking in", "after its word", "while serving")

__all__ = ["OF_A_DONOR", "OF_A_JOINER", "Returns", "Stay", "check"]


@dataclass
class Stay:
    """One life of a rank: from its coming to its death, or the end."""

    rank: int
    life: Life
    incarnation: int = 0
    began_after: int = 0  # its clock when it began: that of its donor's snapshot
    donor: tuple[int, int] | None = None  # rank and incarnation
    began_with: dict[str, Tensor] = field(default_factory=dict)  # parameters, starts and momenta
    over: bool = False

    @property
    def ended(self) -> bool:
        return self.life.theta is not None


class Returning(Mortal):
    """A rank that takes others in together with all; or comes in the place of one that died."""

    run: Returns

    def __init__(self, run: Returns, rank: int, doom: tuple[int, str] | None = None, again: bool = False) -> None:
        self.guests: list[Link] = []
        self.again = again
        super().__init__(run, rank)
        if again:
            self.doom = doom or (0, "")
        self.stay = Stay(rank, self.life, incarnation=-1 if again else 0)

    def come(self, incarnation: int) -> None:
        if self.again and not incarnation:
            return  # it has no seat yet
        super().come(incarnation)
        take_in = self.control.take_in

        def taking_in() -> Change | None:
            self.once("before taking in")
            entry = take_in()
            self.once("after taking in")
            return entry

        vars(self.control)["take_in"] = taking_in

    def dies(self, step: int, point: str) -> bool:
        """Whether it dies here: at the first such point from its step on."""
        return self.doom[1] == point and 0 < self.doom[0] <= step

    def once(self, point: str) -> None:
        if self.dies(max(1, self.step), point):
            raise Killed

    # -- as a donor ---------------------------------------------------------------------------------------------

    def after_step(self, rounds: Rounds, model: dict[str, nn.Parameter]) -> None:
        control = self.control
        if self.run.pace:
            time.sleep(self.run.pace)
        what = control.calls.due(self.step, self._agreement)
        if what is not None and control.claim(what)[1] == what:
            self._take_in(rounds, model)
        if control.guest is not None:
            control.calls.wish(TAKING_IN)

    def _agreement(self, agreed: Any) -> int:
        step = self.control.poll(agreed, time.monotonic() + 20)
        assert step is not None, "the others do not say when all can stop"
        return step

    def _take_in(self, rounds: Rounds, model: dict[str, nn.Parameter]) -> None:
        self.once("before the meeting")
        self._meet(rounds, TAKING_IN)
        self.control.calls.finish(TAKING_IN)
        entry = take_in_together(self.control, self.run.can_serve(self.step))
        self.breathe()
        if entry is None:
            return
        self.once("after its word")
        state = {
            "model": {name: parameter.detach().clone() for name, parameter in model.items()},
            "rounds": rounds.state_to_join(),
            "position": self.control.position(),
            "by": self.stay.incarnation,
        }
        guest = entry.seat, entry.incarnation
        self.run.snapshots[guest] = (self.rank, self.step, _whole(rounds, model))
        link = handover.donors_link(self.run.store, self.rank, *guest, TIMEOUT)
        self.guests.append(link)
        if self.dies(self.step, "while serving"):
            link.submit(lambda: link.send(handover.Header(handover.Kind.STATE, self.step, 10_000)))
            time.sleep(0.01)
            raise Killed
        handover.serve(link, self.step, lambda: state)

    # -- as a joiner --------------------------------------------------------------------------------------------

    def come_back(self) -> None:
        """Live in the place of one that died."""
        while True:
            incarnation = claim_seat(self.run.store, self.rank, self.run.world_size, self.survival, self.breathe)
            self.give_up()
            self.come(incarnation)
            self.stay.incarnation = incarnation
            self.once("claimed")
            self.control.ask()
            self.once("asked")
            donor = self.control.await_donor()
            self.once("taken in")
            if (state := handover.state_of(donor, self.control, self.run.store)) is not None:
                break
            self.control.leave("its donor was lost")
        self.control.take_place(state["position"])
        model = {name: nn.Parameter(value) for name, value in state["model"].items()}
        rounds = self.rounds_of(model)
        rounds.load_state_dict(state["rounds"])
        self.step = self.stay.began_after = rounds.step
        self.stay.donor = donor.rank, int(state["by"])
        self.stay.began_with = _whole(rounds, model)
        self.once("loaded")
        time.sleep(self.run.loading)
        self.control.tell_joined(donor.rank)
        self.once("joined")
        if self.doom[0]:
            self.doom = (self.step + self.doom[0], self.doom[1])
        self.train(rounds, model)

    def give_up(self) -> None:
        """Close what it holds, as a process does that lives."""
        if hasattr(self, "control"):
            self.reducer.close()
            self.control.close()
        for link in self.guests:
            link.close()

    def die(self) -> None:
        if hasattr(self, "control"):
            super().die()
        for link in self.guests:
            link.close()


@dataclass
class Returns(Run):
    """A run in which ranks come back.

    Attributes:
        returns: by rank, for each time that it comes back, the point at which it dies then (at step 1 for those of
            :data:`OF_A_JOINER`, or steps after its joining, and a point of :mod:`round_survivors`), or None.
        pace: seconds that a step takes at least.
        loading: seconds that a joiner takes to be ready.
        busy: after every how many steps nobody can go on from a rank's state: an epoch's last ones; 0 for none.
    """

    returns: Mapping[int, list[tuple[int, str] | None]] = field(default_factory=dict)
    pace: float = 0.002
    loading: float = 0.0
    busy: int = 0
    stays: list[Stay] = field(default_factory=list)
    snapshots: dict[tuple[int, int], tuple[int, int, dict[str, Tensor]]] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    def can_serve(self, step: int) -> bool:
        return not self.busy or step % self.busy != 0

    def go(self) -> list[Life]:
        """Run all ranks, those that come back too."""
        threads = [threading.Thread(target=self._live, args=(rank,), daemon=True) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
            if thread.is_alive() and not self.errors:
                raise AssertionError("a rank hangs")
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
            except RunOver:
                me.stay.over = True
            except BaseException as error:  # noqa: BLE001 - given to the test
                if not me.dying:
                    self.errors.append(error)
                    if hasattr(me, "control"):
                        me.control.leave(f"{type(error).__name__}: {error}")
                else:
                    me.die()
            if not me.dead:
                if me.stay.ended and me.rank == me.control.members[0]:
                    me.control.tell_over("nothing")
                me.give_up()
                return
            if not left:
                return
            me = Returning(self, rank, left.pop(0), again=True)


def _whole(rounds: Rounds, model: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return a copy of a rank's parameters, starts and momenta."""
    state = rounds._state.state_dict()
    whole = {f"parameter {name}": parameter.detach().clone() for name, parameter in model.items()}
    return whole | {f"{kind} {name}": state[kind][name] for kind in ("starts", "velocities") for name in state[kind]}


def check(run: Returns) -> None:
    """Nobody ever had another start than the others; a joiner began as its donor was; a replay gives the same."""
    check_log(run.store, run.world_size)
    for stay in run.stays:
        if stay.donor is not None:
            by, step, whole = run.snapshots[stay.rank, stay.incarnation]
            assert (by, step) == (stay.donor[0], stay.began_after)
            assert whole.keys() == stay.began_with.keys()
            for name, value in whole.items():
                assert torch.equal(value, stay.began_with[name]), f"{name} is not the donor's"
    last = max(stay.life.steps for stay in run.stays)
    for step in range(1, last + 1):
        kept = [stay.life.kept[step] for stay in run.stays if step in stay.life.kept]
        for other in kept[1:]:
            for name, value in kept[0].items():
                assert torch.equal(value, other[name]), f"{name} differs after step {step}"
    applied: dict[tuple[int, int], tuple[int, ...]] = {}
    for stay in run.stays:
        for (step, part), members in stay.life.applied.items():
            if step > stay.began_after:  # what was in flight in the donor tells how many they were
                assert applied.setdefault((step, part), members) == members, f"ranks applied {step} with others"
    ended = [stay for stay in run.stays if stay.ended]
    assert ended, "nobody came to the end"
    for stay in ended:
        mine = {key for key in stay.life.applied if key[0] > stay.began_after}
        assert mine == {key for key in applied if key[0] > stay.began_after}, "it left out a round"
        assert stay.life.steps == run.steps
        assert stay.life.longest < run.longest, f"rank {stay.rank} stood still for {stay.life.longest:.2f} s"
    theta, common = _replay(run, applied)
    for stay in ended:
        own, end = stay.life.theta, stay.life.end
        assert own is not None
        assert end is not None
        for name in SHAPES:
            np.testing.assert_allclose(own[name], theta[id(stay)][name], rtol=0, atol=1e-11)
            np.testing.assert_allclose(end[name], common[name], rtol=0, atol=1e-11)


def _replay(
    run: Returns, applied: Mapping[tuple[int, int], tuple[int, ...]]
) -> tuple[dict[int, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Design §12 by which rounds were applied, all ranks in one loop; a joiner begins as its donor is there."""
    a, v = initial(), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    theta = {id(stay): initial() for stay in run.stays if stay.incarnation == 0}
    parts = strided({name: int(np.prod(shape)) for name, shape in SHAPES.items()}, run.fragments)
    due: dict[int, list[tuple[int, int, dict[int, dict[str, np.ndarray]]]]] = {}

    def seated(rank: int, step: int) -> int:
        """Return whose process of ``rank`` is counted at ``step``."""
        there = [s for s in run.stays if s.rank == rank and s.began_after < step and id(s) in theta]
        return id(max(there, key=lambda stay: stay.incarnation))

    def apply(posted: int, part: int, snapshots: dict[int, dict[str, np.ndarray]]) -> None:
        if (members := applied.get((posted, part))) is None:
            return
        processes = [seated(rank, posted) for rank in members]
        for name in parts[part]:
            drift = reduce(np.add, (a[name] - snapshots[key][name] for key in processes)) / len(members)
            v[name] = run.outer.momentum * v[name] + drift
            a[name] = a[name] - run.outer.lr * (drift + run.outer.momentum * v[name])
            for key, snapshot in snapshots.items():
                theta[key][name] = theta[key][name] + (a[name] - snapshot[name])

    for step in range(1, run.steps + 1):
        for part in range(run.fragments):
            if step % run.period == part * run.period // run.fragments:
                snapshots = {key: {name: value.copy() for name, value in model.items()} for key, model in theta.items()}
                due.setdefault(step + run.delay, []).append((step, part, snapshots))
        for stay in run.stays:
            if (model := theta.get(id(stay))) is not None:
                for name in model:
                    model[name] = model[name] + update(model[name], stay.rank, step)
        for round_ in due.pop(step, []):
            apply(*round_)
        for stay in run.stays:
            if stay.donor is not None and stay.began_after == step:
                [donor] = [id(s) for s in run.stays if (s.rank, s.incarnation) == stay.donor]
                theta[id(stay)] = {name: value.copy() for name, value in theta[donor].items()}
                for rounds in due.values():
                    for _, _, snapshots in rounds:
                        snapshots[id(stay)] = snapshots[donor]
    for step in sorted(due):
        for round_ in due[step]:
            apply(*round_)
    return theta, a
