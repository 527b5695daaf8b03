"""Workers that come back to a parameter server in the places of those that died: ranks and shards as threads.

What workers make is whole numbers, so that sums are exact in whatever order they are made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from joiners import let_all_come_soon
from shards import Shards
from test_lost_workers import SIZE, Killed, Run, Worker
from waiting import until

from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.member_control import RunOver, Survival
from lightning_gossip.parameter_server.protocol import ProtocolError, Setup
from lightning_gossip.parameter_server.roster import Roster
from lightning_gossip.transport import handover
from lightning_gossip.transport.link import Link

pytestmark = pytest.mark.faults

TIMEOUT = timedelta(seconds=20)
AT_HOME = 8
"""Steps that everybody makes at least after the last one came back."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    let_all_come_soon(monkeypatch)


class Life(Worker):
    """One life of a worker: from the beginning, or in the place of one that was killed."""

    run: Returns

    def __init__(self, run: Returns, rank: int, life: int = 0, incarnation: int = 0) -> None:
        super().__init__(run, rank, life, incarnation)
        self.life = life
        self.dice = np.random.default_rng([rank, life])
        self.made, self.pushed = np.zeros(SIZE), np.zeros(SIZE)
        self.number = rank  # what the shards call it
        self.steps = 0
        self.gifts: list[Link] = []
        self.began_at: np.ndarray | None = None  # the parameters of its first step

    def step(self) -> None:
        """Make a step, see that it is on the server, and take in who asks."""
        made = self.dice.integers(-9, 10, SIZE).astype(float)
        with torch.no_grad():
            self.theta.add_(torch.tensor(made))
        self.client.end_step({"theta": self.theta})
        self.client.drain()
        self.made += made
        self.steps += 1
        if self.client._pushed_at == self.client.step:
            self.pushed = self.made.copy()
        self.run.points.get((self.rank, self.life), _nothing)(self, "stepped")
        if self.control.guest is not None and (entry := self.control.take_in()) is not None:
            guest = entry.seat, entry.incarnation
            state = {"client": self.client.state_to_join(), "position": self.control.position()}
            link = handover.donors_link(self.run.store, self.rank, *guest, TIMEOUT)
            self.gifts.append(link)
            handover.serve(link, self.client.step, lambda: state)
        time.sleep(0.002)

    def come_back(self) -> None:
        """Take part from a member's state on."""
        self.control.ask()
        donor = self.control.await_donor()
        state = handover.state_of(donor, self.control, self.run.store)
        assert state is not None, "its donor is there, and what it gives is whole"
        self.control.take_place(state["position"])
        self.client.load_state_dict(state["client"])
        self.run.points.get((self.rank, self.life), _nothing)(self, "fetched")
        self.client.continue_from(state["client"]["step"])
        clock = self.control.clock_to_join(self.control.tell_joined(donor.rank))
        self.client.continue_from(max(clock, self.client.step))
        self.start()
        links: Any = self.client._links
        self.number = links.workers.own
        self.began_at = self.theta.detach().numpy().copy()
        self.run.points.get((self.rank, self.life), _nothing)(self, "started")

    def live(self) -> None:
        if self.control.incarnation:
            self.come_back()
        else:
            self.start()
        while not self.run.is_enough():
            self.run.points.get((self.rank, self.life), _nothing)(self, "before")
            self.step()
        self.client.finish({"theta": self.theta})
        self.control.meet("finished")
        self.final = self.pulled()
        self.control.meet("read")
        if self.rank == self.control.members[0]:
            self.control.tell_over("nothing")
        self.client.close()

    def die(self) -> None:
        super().die()
        for link in self.gifts:
            link.close(seconds=1)


def _nothing(worker: Life, point: str) -> None:
    pass


class Returns(Run):
    """Workers that are killed, and come back.

    Attributes:
        points: by rank and life, what happens to it at a point of its life.
        returns: how often each comes back.
    """

    def __init__(self, server: Shards, workers: int = 4, returns: dict[int, int] | None = None, **options: Any) -> None:
        super().__init__(server, workers, **options)
        self.returns = returns or {}
        self.points: dict[tuple[int, int], Callable[[Life, str], None]] = {}
        self.lives: list[Life] = []
        self.dead: list[Life] = []
        self.enough = False

    def is_enough(self) -> bool:
        """Whether all that are to come back have, and everybody has made some steps since."""
        alive = [life for life in list(self.lives) if life not in self.dead]
        back = all(any(w.rank == rank and w.life == n for w in alive) for rank, n in self.returns.items())
        self.enough |= back and len(alive) >= self.expected and all(w.steps >= AT_HOME for w in alive)
        return self.enough

    @property
    def expected(self) -> int:
        killed = {rank for rank, life in self.points if life == self.returns.get(rank, 0)}
        return self.workers - len(killed - set(self.returns))

    def go(self) -> list[Worker]:
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            for life in range(self.returns.get(rank, 0) + 1):
                worker = self._life(rank, life)
                if worker is None:
                    return
                try:
                    if not worker.control.incarnation:
                        worker.control.begin(10)
                    worker.live()
                except Killed:
                    self.dead.append(worker)
                    worker.die()
                    continue
                except RunOver:
                    pass
                except BaseException as error:  # noqa: BLE001 - given to the test
                    errors.append(error)
                    self.enough = True
                    worker.control.leave(str(error))
                    worker.client.close()
                for link in worker.gifts:
                    link.close(seconds=1)
                worker.control.close()
                return

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
            assert not thread.is_alive(), "a worker hangs"
        if errors:
            raise errors[0]
        return [life for life in self.lives if life not in self.dead]

    def _life(self, rank: int, life: int) -> Life | None:
        incarnation = 0
        if life:
            survival = Survival(1, timedelta(seconds=10), f"threads|{rank}|{life}", self.gone.__contains__)
            try:
                incarnation = claim_seat(self.store, rank, self.workers, survival)
            except RunOver:
                return None
        worker = Life(self, rank, life, incarnation)
        self.lives.append(worker)
        return worker

    def check_sums(self) -> list[Life]:
        """Run; see that the server holds all that was pushed in all lives, exactly; return those that live."""
        self.go()
        left = [life for life in self.lives if life not in self.dead]
        total = sum((life.made for life in left), sum((life.pushed for life in self.dead), np.zeros(SIZE)))
        for life in left:
            assert life.final is not None
            np.testing.assert_array_equal(life.final, total)
        until(lambda: all(server.finished.is_set() for server in self.server.servers), 5)
        return left


def dies_after(steps: int) -> Callable[[Life, str], None]:
    def act(worker: Life, point: str) -> None:
        if point == "before" and worker.steps == steps:
            raise Killed

    return act


def entries(run: Run, kind: str) -> list[tuple[int, int]]:
    """Number and seat of the entries of that kind in the log of members."""
    changes = run.lives[-1].control.changes  # type: ignore[attr-defined]
    return [(change.number, change.seat) for change in changes if change.kind == kind]


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("options", [{}, {"max_staleness": 1}, {"n_push": 3, "n_pull": 2}], ids=str)
def test_a_worker_comes_back_under_its_next_number(rank: int, options: dict[str, Any]) -> None:
    with Shards(2) as server:
        run = Returns(server, returns={rank: 1}, **options)
        seen: dict[str, Any] = {}

        def watch(worker: Life, point: str) -> None:
            shard = server.shard()
            seen["leads"] = [*seen.get("leads", []), shard.lead]

        run.points = {(rank, 0): dies_after(5), (3, 0): watch}
        left = run.check_sums()
        assert np.array_equal(run.dead[0].pushed, run.dead[0].made) == ("n_push" not in options)
        assert len(left) == 4
        [(entry, seat)] = entries(run, "joining")
        assert seat == rank
        [joiner] = [life for life in left if life.control.incarnation]
        assert joiner.number == 4 * entry + rank
        for number in range(2):
            shard = server.shard(number)
            assert shard.dropped == {rank}
            assert shard.workers == {0, 1, 2, 3} - {rank} | {joiner.number}
            assert shard.pushes[joiner.number] > 0
            assert sum(shard.pushes.values()) == shard.version
        leads = [lead for lead, before in zip(seen["leads"], [None, *seen["leads"]], strict=False) if lead != before]
        # worker 3 may come when worker 0 has died already
        assert leads in ([[0, 1], [1]] if rank == 0 else [[0]]), "who comes back takes no duties away"
        assert joiner.began_at is not None
        assert np.any(joiner.began_at), "it began with what the server held"


def test_one_that_reads_of_the_loss_late_drops_nobody_that_lives() -> None:
    with Shards(2) as server:
        run = Returns(server, returns={2: 1})
        told: list[int] = []

        def reads_late(worker: Life, point: str) -> None:
            links: Any = worker.client._links
            back = [life for life in run.lives if life.life and life.steps >= 3]
            if not back:
                vars(links)["drop_lost"] = lambda: None
            elif "drop_lost" in vars(links):
                del vars(links)["drop_lost"]
                links.drop_lost()
                worker.client.drain()
                told.append(back[0].steps)

        run.points = {(2, 0): dies_after(5), (3, 0): reads_late}
        left = run.check_sums()
        [joiner] = [life for life in left if life.life]
        assert 3 <= told[0] < joiner.steps
        assert server.shard().dropped == server.shard(1).dropped == {2}


def test_a_worker_comes_back_twice_and_so_does_another() -> None:
    with Shards(2) as server:
        run = Returns(server, returns={0: 2, 2: 1})
        run.points = {(0, 0): dies_after(5), (0, 1): dies_after(4), (2, 0): dies_after(12)}
        left = run.check_sums()
        joins = entries(run, "joining")
        assert sorted(seat for _, seat in joins) == [0, 0, 2]
        numbers = [4 * entry + seat for entry, seat in joins]
        assert numbers == sorted(numbers), "ascending numbers are the order of seniority"
        assert server.shard().workers == {life.number for life in left}
        assert server.shard().lead == min(life.number for life in left) == 1
        order = [life.rank for life in sorted(left, key=lambda life: life.number)]
        assert order == list(left[0].control.members)


def test_one_that_dies_before_it_has_said_hello_comes_back_under_another_number() -> None:
    with Shards(2) as server:
        run = Returns(server, returns={2: 2})

        def dies_joining(worker: Life, point: str) -> None:
            if point == "fetched":
                raise Killed

        run.points = {(2, 0): dies_after(5), (2, 1): dies_joining}
        left = run.check_sums()
        (first, _), (second, _) = entries(run, "joining")
        assert server.shard().dropped == server.shard(1).dropped == {2, 4 * first + 2}
        assert server.shard().workers == {0, 1, 3, 4 * second + 2} == {life.number for life in left}


def test_who_came_back_leads_once_those_before_it_are_lost() -> None:
    """It begins trainings, and is itself a donor."""
    with Shards(2) as server:
        run = Returns(server, 2, returns={0: 1, 1: 1})

        def dies_once_the_other_is_whole(worker: Life, point: str) -> None:
            back = [life for life in run.lives if life.rank == 1 and life.life == 1 and life.steps >= 3]
            if point == "before" and back:
                raise Killed

        run.points = {(1, 0): dies_after(3), (0, 0): dies_once_the_other_is_whole}
        left = run.check_sums()
        assert [life.rank for life in sorted(left, key=lambda life: life.number)] == [1, 0]
        assert left[0].control.members == (1, 0)
        assert server.shard().lead == min(life.number for life in left) > 2


def test_the_last_one_dies_after_it_has_given_its_state() -> None:
    """Nobody is connected to the shards for a while, and they wait."""
    with Shards(2) as server:
        run = Returns(server, 2, returns={1: 1})
        fetched = threading.Event()

        def dies_then(worker: Life, point: str) -> None:
            if point == "before" and fetched.is_set():
                raise Killed

        def holds(worker: Life, point: str) -> None:
            if point == "fetched":
                fetched.set()
                until(lambda: worker.control.is_lost(0, 0))
                time.sleep(0.3)
                assert not any(server.finished.is_set() for server in run.server.servers)

        run.points = {(1, 0): dies_after(3), (0, 0): dies_then, (1, 1): holds}
        [left] = run.check_sums()
        assert server.shard().lead == left.number
        assert server.shard().dropped == {0, 1}


def test_who_came_back_begins_another_training_where_it_leads() -> None:
    with Shards(1) as server:
        run = Returns(server, 2, returns={1: 1})

        def dies_then(worker: Life, point: str) -> None:
            if any(life.life == 1 and life.steps >= 3 for life in run.lives):
                raise Killed

        run.points = {(1, 0): dies_after(3), (0, 0): dies_then}
        again: list[np.ndarray] = []

        def live(self: Life) -> None:
            self.come_back()
            while not self.control.is_lost(0, 0):
                self.step()
            with torch.no_grad():
                self.theta.fill_(7.0)
            self.client.start_again({"theta": self.theta})
            self.step()
            again.extend([self.pulled(), self.theta.detach().numpy().copy()])
            self.client.close()

        with pytest.MonkeyPatch.context() as patch:
            lives = Life.live
            patch.setattr(Life, "live", lambda self: (live if self.life else lives)(self))
            run.go()
        np.testing.assert_array_equal(again[0], again[1])
        assert server.shard().training == 2


def test_one_that_comes_in_a_warm_up_waits_for_its_end() -> None:
    with Shards(2) as server:
        run = Returns(server, 3, returns={2: 1}, warmup_steps=300)
        versions: dict[str, int] = {}

        def dies_waiting(self: Life) -> None:
            if self.rank == 2 and not self.life:
                time.sleep(0.1)
                raise Killed
            lives(self)

        def watch(worker: Life, point: str) -> None:
            versions.setdefault(point, server.shard().version)

        run.points = {(2, 1): watch}
        with pytest.MonkeyPatch.context() as patch:
            lives = Life.live
            patch.setattr(Life, "live", dies_waiting)
            run.check_sums()
        assert versions["fetched"] < 300 <= versions["started"]


def test_a_late_word_about_the_dead_one_changes_nothing() -> None:
    setup = Setup(3, 0, 1, ("float64",), (1,), 0, survives=True)
    roster = Roster()
    shard = roster.join(0, setup)
    for worker in (1, 2):
        roster.join(worker, setup)
    shard.initialise(1, [torch.zeros(1, dtype=torch.float64)], ready=True)
    one = [torch.ones(1, dtype=torch.float64)]
    shard.push(2, 1, one)
    roster.join(3 * 4 + 2, setup)  # nobody has told that worker 2 is lost
    assert (shard.dropped, shard.workers, shard.lead) == ({2}, {0, 1, 14}, 0)
    for act in (lambda: shard.push(2, 1, one), lambda: roster.join(2, setup), lambda: roster.join(3 * 3 + 2, setup)):
        with pytest.raises(ProtocolError, match=r"worker 2.* was dropped"):
            act()
    shard.push(14, 1, one)
    assert not roster.drop(2, by=0)
    assert roster.drop(3 * 2 + 2, by=1), "one that was lost before it said hello"
    shard.push(14, 1, one)
    assert (shard.version, dict(shard.pushes)) == (3, {2: 1, 14: 2})
    assert shard.position(14).others == 1, "what the dead one pushed is another's"
    with pytest.raises(ProtocolError, match=r"worker 0 was dropped|may not let"):
        roster.drop(0, by=2)
    assert roster.drop(0, by=14)
    assert roster.drop(3 * 6 + 1, by=14), "a number that was never heard of, and those before it"
    assert (shard.workers, shard.lead) == ({14}, 14)
    shard.initialise(2, [torch.zeros(1, dtype=torch.float64)], True, worker=14)
    with pytest.raises(ProtocolError, match="worker 1 sent what only worker 2 \\(number 14\\) may"):
        shard.begin_all(2, 1)


def test_numbers_of_others_are_for_runs_that_go_on() -> None:
    with pytest.raises(ProtocolError, match="worker 4 is none of 3"):
        Roster().join(4, Setup(3, 0, 1, ("float32",), (1,), 0))
    with pytest.raises(ProtocolError, match="is none of 3"):
        Roster().join(3 << 32, Setup(3, 0, 1, ("float32",), (1,), 0, survives=True))


def test_shards_wait_where_all_broke_off_and_end_after_a_goodbye() -> None:
    setup = Setup(2, 0, 1, ("float32",), (1,), 0, survives=True)
    roster = Roster()
    for worker in (0, 1):
        roster.join(worker, setup)
    roster.leave(0, goodbye=False)
    roster.leave(1, goodbye=False)
    assert not roster.everybody_left()
    assert roster.deserted_for() > 0
    roster.join(2 * 3 + 1, setup)
    roster.leave(2 * 3 + 1)
    assert roster.everybody_left()
    other = Roster()
    for worker in (0, 1):
        other.join(worker, Setup(2, 0, 1, ("float32",), (1,), 0))
        other.leave(worker, goodbye=False)
    assert other.everybody_left(), "nobody can come where the first loss ends the run"


def test_a_checkpoint_tells_by_seats_what_numbers_pushed() -> None:
    """And all go on from it, the one that came back among them."""
    saved: dict[str, Any] = {}
    with Shards(2) as server:
        run = Returns(server, 3, returns={0: 1})
        run.points = {(0, 0): dies_after(4)}
        lives = Life.live

        def saving(self: Life) -> None:
            close = self.client.close

            def save_and_close(**options: Any) -> None:
                self.client.drain()
                self.control.meet("drained")
                if self.rank == self.control.members[0]:
                    saved["server"] = self.client.server_state()
                saved[str(self.rank)] = self.client.state_dict(), self.theta.detach().clone()
                self.control.meet("saved")
                close(**options)

            vars(self.client)["close"] = save_and_close
            lives(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Life, "live", saving)
            left = run.check_sums()
        numbers = {life.rank: life.number for life in left}
        pushes = {str(rank): server.shard().pushes[number] for rank, number in numbers.items()}
        assert saved["server"]["pushes"] == pushes
        assert saved["server"]["version"] == server.shard().version
    with Shards(1) as other:
        again = Run(other, 3)

        def resume(worker: Worker) -> None:
            state, theta = saved[str(worker.rank)]
            worker.theta.data.copy_(theta)
            worker.client.load_state_dict(state)
            worker.start(saved["server"])
            worker.control.meet("all have started")
            worker.final = worker.pulled()
            worker.client.close()

        again.body = resume
        for worker in again.go():
            np.testing.assert_array_equal(worker.final, saved["server"]["parameters"][0].numpy())
        assert {str(k): n for k, n in other.shard().pushes.items()} == pushes
