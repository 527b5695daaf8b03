"""Plain loops with ``Gossip`` as threads, of which some die and come back: a store in place of processes and groups.

Every rank trains a vector by SGD with momentum on a noisy quadratic of its own, and all look at the consensus model
after every :data:`EVERY` steps. How long a run lasts goes by what has happened in it, not by time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import asynchronous_replay
import numpy as np
import pytest
import torch
from joiners import let_all_come_soon
from survivors import SIZE, Killed, initial
from torch import nn
from torch.distributed import HashStore

from lightning_gossip import Gossip
from lightning_gossip.control.stop import SeatLost
from lightning_gossip.control.watching import Survival
from lightning_gossip.exchange import consensus, plain, plain_runs
from lightning_gossip.exchange.asynchronous import Applied
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.transport import link_transport
from lightning_gossip.transport.handover import Donor, Header, Kind, donors_link

EVERY = 10
LR, MOMENTUM, ALPHA = 0.1, 0.9, 0.4

IN_A_STEP = ("before posting", "posted")
AT_A_CONSENSUS = ("before its word", "after its word", "within the collective", "before the verdict")
AS_A_DONOR = ("before serving", "while serving")


class Theta(nn.Module):
    """One vector, and a buffer that counts steps."""

    count: torch.Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(initial(rank)))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def gradient(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
    noise: np.ndarray = np.random.default_rng([rank, step]).normal(size=SIZE)
    return theta - rank + noise


@dataclass
class Stay:
    """One life of a rank.

    Attributes:
        doom: from which step on it dies, at which point.
        theta, velocity: with which it began.
        replicas: before each consensus, by step.
        seen: of each consensus, who took part, and the model.
    """

    rank: int
    doom: tuple[int, str] | None
    began_after: int = 0
    theta: np.ndarray = field(default_factory=lambda: np.zeros(SIZE))
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(SIZE))
    mixed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    records: list[Applied] = field(default_factory=list)
    steps: int = 0
    died_at: int = 0
    replicas: dict[int, np.ndarray] = field(default_factory=dict)
    seen: dict[int, tuple[tuple[int, ...], np.ndarray]] = field(default_factory=dict)
    given: dict[str, Any] | None = None
    ends_with: np.ndarray | None = None
    members: tuple[int, ...] = ()
    error: BaseException | None = None
    gossip: Any = None

    def dies(self, point: str, step: int) -> None:
        if self.doom is not None and self.doom[1] == point and step >= self.doom[0]:
            raise Killed


class Loops:
    """A run of plain loops, as threads.

    Args:
        size: ranks.
        lives: of each rank, when each of its lives ends but the last that is None; one life without an end by default.
        ends: whether the run may end, looked at after every consensus.
        options: of :class:`Gossip`.

    Attributes:
        raises: by rank, at which step what is raised within it.
        also: more of what ``state`` returns.
        model: of a rank.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        size: int,
        lives: dict[int, Sequence[tuple[int, str] | None]],
        ends: Callable[[Loops], bool],
        **options: Any,
    ) -> None:
        self.size, self.lives, self.ends = size, lives, ends
        self.options: dict[str, Any] = {
            "min_replicas": 1,
            "alpha": ALPHA,
            "lost_after": timedelta(seconds=10),
        } | options
        self.store, self.gone = HashStore(), set[str]()
        self.stays: list[Stay] = []
        self.given: list[tuple[tuple[int, int], dict[str, Any]]] = []
        self.here = threading.local()
        self.raises: dict[int, tuple[int, BaseException]] = {}
        self.also: dict[str, Any] = {}
        self.model: Callable[[int], Any] = Theta
        self._decided: dict[int, bool] = {}
        let_all_come_soon(monkeypatch, link_transport)
        # torch's hook is one for all threads
        monkeypatch.setattr(plain, "register_optimizer_step_pre_hook", lambda _: SimpleNamespace(remove=lambda: None))
        monkeypatch.setattr(plain_runs, "Survival", self._survival)
        monkeypatch.setattr(plain_runs, "Donor", self._donor)
        monkeypatch.setattr(consensus, "all_reduce_", self._dying(consensus.all_reduce_, "within the collective"))

    def _survival(self, min_replicas: int, lost_after: timedelta) -> Survival:
        return Survival(min_replicas, lost_after, self.here.process, self.gone.__contains__)

    def _dying(self, call: Callable[..., Any], point: str) -> Callable[..., Any]:
        def dying(*args: Any) -> Any:
            self.here.stay.dies(point, self.here.stay.steps)
            return call(*args)

        return dying

    def _donor(self, control: Any, store: Any) -> Donor:
        donor, serve = Donor(control, store), Donor.serve

        def serving(guest: tuple[int, int], step: int, state: dict[str, Any]) -> None:
            stay = self.here.stay
            stay.dies("before serving", step)
            if stay.doom is not None and stay.doom[1] == "while serving":
                link = donors_link(store, control.rank, *guest, timedelta(seconds=10))
                link.submit(lambda: link.send(Header(Kind.STATE, step, 10_000))).result(timeout=10)
                donor._links.append(link)
                raise Killed
            self.given.append((guest, copy.deepcopy(state)))
            serve(donor, guest, step, state)

        vars(donor)["serve"] = serving
        return donor

    # -- a run ----------------------------------------------------------------------------------------------------

    def go(self) -> Loops:
        """Run all ranks to the end of all."""
        threads = [threading.Thread(target=self._live, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a rank hangs"
        return self

    def _live(self, rank: int) -> None:
        for number, doom in enumerate(self.lives.get(rank, (None,))):
            self.here.process, self.here.stay = f"threads|{rank}|{number}", Stay(rank, doom)
            self.stays.append(self.here.stay)
            try:
                self._train(self.here.stay)
                return
            except Killed:
                pass
            except SeatLost as lost:  # it comes to its seat anew
                self.here.stay.error = lost
                self.here.stay.gossip.__exit__(SeatLost, lost, None)
                continue
            except BaseException as error:  # noqa: BLE001 - given to the test
                self.here.stay.error = error
                if self.here.stay.gossip is not None:
                    self.here.stay.gossip.__exit__(type(error), error, None)
                return
            self._die(self.here.stay)

    def _die(self, stay: Stay) -> None:
        """Leave what the kernel leaves: closed connections, no heartbeat; not a word."""
        gossip, run = stay.gossip, stay.gossip._run
        stay.died_at = gossip.steps
        run.control._closing.set()
        run.control._pause.set()
        run.control._thread.join()
        gossip._exchange.close()
        run._donor.close()
        run._group.spoil()
        run._group.destroy()
        self.gone.add(self.here.process)
        if stay.doom is not None and stay.doom[1] in IN_A_STEP:
            stay.mixed.pop(stay.died_at, None)

    def _train(self, stay: Stay) -> None:
        model = self.model(stay.rank)
        optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
        gossip = stay.gossip = Gossip(
            model,
            store=self.store,
            rank=stay.rank,
            world_size=self.size,
            state=lambda: {"optimizer": optimizer.state_dict(), "from": stay.rank, **self.also},
            **self.options,
        )
        self._arm(stay, gossip)
        if gossip.given is not None:
            stay.given = {"module": copied(model), **copy.deepcopy(gossip.given), "step": gossip.steps}
            optimizer.load_state_dict(gossip.given["optimizer"])
            stay.velocity = optimizer.state[model.theta]["momentum_buffer"].numpy().copy()
        stay.theta = model.theta.detach().numpy().copy()
        stay.began_after = -1
        while True:
            stay.dies("before posting", gossip.steps + 1)
            with gossip.step():
                step = gossip.steps
                stay.began_after = step - 1 if stay.began_after < 0 else stay.began_after
                stay.dies("posted", step)
                if self.raises.get(stay.rank, (0,))[0] == step:
                    raise self.raises[stay.rank][1]
                model.theta.grad = torch.tensor(gradient(model.theta.detach().numpy(), stay.rank, step))
                gossip.shut()
                optimizer.step()
                model.count += 1
            stay.steps = step
            if step % EVERY == 0:
                self._look(stay, gossip, model)
                if self._decide(step):
                    break
        gossip.close()
        stay.ends_with = model.theta.detach().numpy().copy()

    def _arm(self, stay: Stay, gossip: Any) -> None:
        control, exchange = gossip._run.control, gossip._exchange
        announce, agree = control._announce, control.agree

        def announcing(*args: Any) -> None:
            stay.dies("before its word", stay.steps)
            announce(*args)
            stay.dies("after its word", stay.steps)

        def agreeing(*args: Any) -> bool:
            stay.dies("before the verdict", stay.steps)
            return bool(agree(*args))

        vars(control).update({"_announce": announcing, "agree": agreeing})
        if gossip._scheme.asynchronous:
            exchange.records = stay.records
            return
        mix = exchange._mix

        def mixing(in_flight: Any, received: Any) -> bool:
            stay.mixed[in_flight.step] = in_flight.received_from
            return bool(mix(in_flight, received))

        vars(exchange)["_mix"] = mixing

    def _look(self, stay: Stay, gossip: Gossip, model: Theta) -> None:
        stay.replicas[stay.steps] = model.theta.detach().numpy().copy()
        with gossip.consensus():
            stay.seen[stay.steps] = gossip.members, model.theta.detach().numpy().copy()
        stay.members = gossip.members
        if not stay.records:  # else an exchange that was agreed may have been applied over the meeting
            assert np.array_equal(model.theta.detach().numpy(), stay.replicas[stay.steps]), "the replica is not back"

    def _decide(self, step: int) -> bool:
        """Return whether the run ends after this step: whoever comes first decides for all."""
        if step not in self._decided:
            self._decided.setdefault(step, self.ends(self))
        return self._decided[step]


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def ended(loops: Loops) -> list[Stay]:
    """Those that came to the end; whoever ended otherwise raises."""
    for stay in loops.stays:
        if stay.error is not None and not isinstance(stay.error, SeatLost):
            raise stay.error
    return [stay for stay in loops.stays if stay.ends_with is not None]


def check(loops: Loops) -> list[Stay]:
    """Hold every consensus against its members' replicas, and those that came to the end against a replay."""
    stays = ended(loops)
    assert stays
    for step in sorted({step for stay in stays for step in stay.seen}):
        seen = [stay.seen[step] for stay in stays if step in stay.seen]
        members, model = seen[0]
        for others, other in seen[1:]:
            assert others == members
            assert np.array_equal(model, other)
        replicas = {s.rank: s.replicas[step] for s in loops.stays if step in s.replicas and s.rank in members}
        assert len(replicas) == len(members)  # of two lives that came to one meeting the later: the earlier died there
        np.testing.assert_allclose(model, np.mean([*replicas.values()], axis=0), rtol=0, atol=1e-12)
    theta = replayed(loops)
    for stay in stays:
        assert stay.ends_with is not None
        np.testing.assert_allclose(stay.ends_with, theta[id(stay)], rtol=0, atol=1e-12)
    return stays


def replayed(loops: Loops) -> dict[int, np.ndarray]:
    """Design §3 with momentum, by what each life mixed, all in one loop; who joined begins with what it was given."""
    stays = [stay for stay in loops.stays if stay.began_after >= 0]
    theta, velocity = {id(s): s.theta.copy() for s in stays}, {id(s): s.velocity.copy() for s in stays}
    rule = ElasticMixing(ALPHA)
    for step in range(1, max(stay.steps for stay in stays) + 1):
        there = [stay for stay in stays if stay.began_after < step]
        snapshots = {id(stay): theta[id(stay)].copy() for stay in there}
        latest = {stay.rank: stay for stay in there}
        for stay in there:
            if stay.steps < step:
                continue
            partners = stay.mixed.get(step, ())
            moves = sum((snapshots[id(stay)] - snapshots[id(latest[k])] for k in partners), np.zeros(SIZE))
            now = theta[id(stay)]
            velocity[id(stay)] = MOMENTUM * velocity[id(stay)] + gradient(now, stay.rank, step)
            theta[id(stay)] = now - LR * velocity[id(stay)] - (rule.weight(len(partners)) * moves if partners else 0)
    return theta


def replayed_asynchronously(loops: Loops) -> dict[int, np.ndarray]:
    """The same at own paces, by the records of all; nobody has joined."""
    velocity = {stay.rank: np.zeros(SIZE) for stay in loops.stays}

    def update(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
        velocity[rank] = MOMENTUM * velocity[rank] + gradient(theta, rank, step)
        return -LR * velocity[rank]

    return asynchronous_replay.replay(
        {stay.rank: stay.theta for stay in loops.stays},
        {stay.rank: stay.steps for stay in loops.stays},
        {stay.rank: stay.records for stay in loops.stays},
        update,
        ElasticMixing(ALPHA).weight,
    )


def has_joined(loops: Loops, rank: int) -> bool:
    """Whether a process of ``rank`` has joined, and had exchanges since."""
    return any(s.given is not None and (len(s.mixed) > 5 or len(s.records) > 5) for s in loops.stays if s.rank == rank)
