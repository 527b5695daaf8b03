"""Workers that die, and a server that goes on without them: ranks and shards as threads (design §10)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Rank, run_ranks
from shards import Shards
from torch import nn
from torch.distributed import HashStore
from waiting import until

from lightning_gossip.control.member_control import MemberControl, Survival
from lightning_gossip.exchange.stats import NotFinite
from lightning_gossip.parameter_server import questions
from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.process import shares
from lightning_gossip.parameter_server.protocol import Message, ProtocolError, Setup
from lightning_gossip.parameter_server.roster import Roster
from lightning_gossip.parameter_server.snapshot import renumbered
from lightning_gossip.transport.header import Header

pytestmark = pytest.mark.faults

SIZE = 6
STEPS = 10
HALVES = slice(0, 3), slice(3, 6)
"""What each of two shards holds."""


BEFORE_THE_START = -1


class Killed(BaseException):
    """In the place of SIGKILL."""


def made(rank: int, step: int) -> np.ndarray:
    return np.random.default_rng([rank, step]).normal(size=SIZE)


def sum_of(rank: int, steps: int) -> np.ndarray:
    return sum((made(rank, step) for step in range(1, steps + 1)), np.zeros(SIZE))


class Worker:
    """One rank as a thread: it trains as long as it lives."""

    def __init__(self, run: Run, rank: int, life: int = 0, incarnation: int = 0) -> None:
        self.run, self.rank = run, rank
        self.clock: Callable[[], int] = lambda: 0
        self.process = f"threads|{rank}|{life}"
        survival = Survival(1, timedelta(seconds=10), self.process, run.gone.__contains__)
        self.control = MemberControl(
            lambda: run.store,
            rank,
            run.workers,
            timedelta(seconds=20),
            survival,
            incarnation,
            clock=lambda: self.clock(),
        )
        self.client: DownpourClient = run.server.client(self, **{"n_push": 1, "n_pull": 2, **run.options})  # type: ignore[arg-type]
        self.clock = lambda: self.client.step
        self.theta = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.final: np.ndarray | None = None
        self.error: BaseException | None = None

    def step(self) -> None:
        with torch.no_grad():
            self.theta.add_(torch.tensor(made(self.rank, self.client.step + 1)))
        self.client.end_step({"theta": self.theta})

    def start(self, state: Any = None) -> None:
        self.client.start({"theta": self.theta}, state)

    def pulled(self) -> np.ndarray:
        out = {"theta": torch.zeros(SIZE, dtype=torch.float64)}
        self.client.pull_now(out)
        return out["theta"].numpy()

    def links(self) -> list[Any]:
        return self.client._links._links if self.client._links is not None else []

    def die(self) -> None:
        """Leave what the kernel leaves: closed connections and no heartbeat; not a word."""
        self.control._closing.set()
        self.control._pause.set()
        self.control._thread.join()
        if self.client._links is not None:
            self.client._links._closing.set()
        for link in self.links():
            link.close(seconds=1)
        self.run.gone.add(self.process)

    def live(self) -> None:
        """Train, meet, read what the server holds, and say goodbye."""
        self.start()
        while self.client.step < STEPS:
            self.run.at(self, self.client.step)
            self.step()
        self.client.finish({"theta": self.theta})
        self.control.meet("finished")
        self.final = self.pulled()
        self.control.meet("read")
        self.client.close()


class Run:
    """Workers of one run, of which some die at a step's beginning, each in a way of its own."""

    def __init__(self, server: Shards, workers: int = 4, **options: Any) -> None:
        self.server, self.workers, self.options = server, workers, options
        self.store, self.gone = HashStore(), set[str]()
        self.dooms: dict[int, tuple[int, Callable[[Worker], None]]] = {}
        self.body: Callable[[Worker], None] = Worker.live

    def at(self, worker: Worker, step: int) -> None:
        when, how = self.dooms.get(worker.rank, (-2, None))
        if how is not None and step == when:
            how(worker)
            raise Killed

    def go(self) -> list[Worker]:
        """Run all; return those that were not killed."""
        everybody = [Worker(self, rank) for rank in range(self.workers)]
        killed = []

        def run(worker: Worker) -> None:
            try:
                worker.control.begin(10)
                self.at(worker, BEFORE_THE_START)
                self.body(worker)
            except Killed:
                worker.die()
                killed.append(worker)
                return
            except BaseException as error:  # noqa: BLE001 - given to the test
                worker.error = error
                worker.control.leave(str(error))
                worker.client.close()
            worker.control.close()

        threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in everybody]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a worker hangs"
        left = [worker for worker in everybody if worker not in killed]
        for worker in left:
            if worker.error is not None:
                raise worker.error
        return left

    def check(self, lost: dict[int, tuple[int, int]]) -> None:
        """Run, and see that the server holds all of the survivors, and so many steps of the lost ones, by shard."""
        began = time.monotonic()
        left = self.go()
        assert time.monotonic() - began < 15
        assert [worker.rank for worker in left] == [rank for rank in range(self.workers) if rank not in lost]
        expected = sum((sum_of(worker.rank, STEPS) for worker in left), np.zeros(SIZE))
        for half, (number, part) in zip(HALVES, enumerate(HALVES), strict=True):
            expected[half] += sum((sum_of(rank, steps[number])[part] for rank, steps in lost.items()), np.zeros(3))
        for worker in left:
            assert worker.client.step == STEPS
            assert worker.final is not None
            np.testing.assert_allclose(worker.final, expected, rtol=0, atol=1e-10)
        until(lambda: all(server.finished.is_set() for server in self.server.servers), 5)


def before(worker: Worker) -> None:
    worker.client.drain()


def after(worker: Worker) -> None:
    worker.client.drain()
    worker.step()
    worker.client.drain()


def fail_later() -> Any:
    """Let a link fail once what was sent before has arrived elsewhere."""
    time.sleep(0.3)
    raise RuntimeError("killed")


def within(worker: Worker) -> None:
    """Shard 0 gets its part, shard 1 the header."""
    worker.client.drain()
    with torch.no_grad():
        worker.theta.add_(torch.tensor(made(worker.rank, worker.client.step + 1)))
    link = worker.links()[1]
    send = link.send
    link.send = lambda header, *payloads: send(header)
    link.receive_header = lambda *_: fail_later()
    DownpourClient.end_step(worker.client, {"theta": worker.theta})
    until(lambda: worker.run.server.shard(0).pushes[worker.rank] == worker.client.step)


@pytest.mark.parametrize(("how", "whole"), [(before, (4, 4)), (after, (5, 5)), (within, (5, 4))])
@pytest.mark.parametrize("lost", [(2,), (0,), (0, 3)], ids=str)
def test_a_worker_dies_around_a_push(
    how: Callable[[Worker], None], whole: tuple[int, int], lost: tuple[int, ...]
) -> None:
    def one_after_the_other(worker: Worker) -> None:
        worker.client.drain()  # so that every step's push left at its end
        how(worker)

    with Shards(2) as server:
        run = Run(server)
        run.dooms = dict.fromkeys(lost, (4, one_after_the_other))
        end_step = DownpourClient.end_step

        def stepping(worker: Worker) -> None:
            client: Any = worker.client
            client.end_step = lambda parameters: (end_step(client, parameters), client.drain())
            worker.live()

        run.body = stepping
        run.check(dict.fromkeys(lost, whole))


def test_a_worker_dies_in_the_midst_of_a_large_payload() -> None:
    """All of its push is there, or nothing."""
    with Shards(1) as server:
        run = Run(server, 2)
        seen: list[bool] = []

        def body(worker: Worker) -> None:
            large = {"a": nn.Parameter(torch.zeros(8_000_000, dtype=torch.float64))}
            worker.client.start(large)
            worker.control.meet("started")
            with torch.no_grad():
                large["a"].add_(1.0)
            if worker.rank == 1:
                worker.client.end_step(large)
                time.sleep(0.03)
                raise Killed
            until(lambda: worker.control.is_lost(1, 0))
            worker.client.pull_now(large)
            first = large["a"].detach()[0]
            seen.append(bool((large["a"] == first).all()) and float(first) in (0.0, 1.0))
            worker.client.close()

        run.body = body
        run.go()
        assert seen == [True]


def never(worker: Worker) -> None:
    """It dies before it comes to a shard."""


def while_it_initialises(worker: Worker) -> None:
    """Shard 0 is initialised, shard 1 is not."""
    end: Any = questions.initialise

    def half(cut: Any, *rest: Any) -> Any:
        job = end(cut, *rest)
        dies = f"worker{worker.rank}."
        return lambda link, shard: fail_later() if shard and link.own.startswith(dies) else job(link, shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "initialise", half)
        with pytest.raises(RuntimeError):
            worker.start()


@pytest.mark.parametrize("how", [never, while_it_initialises])
def test_the_first_worker_dies_over_the_beginning(how: Callable[[Worker], None]) -> None:
    with Shards(2) as server:
        run = Run(server)
        run.dooms = {0: (BEFORE_THE_START, how)}
        run.check({0: (0, 0)})


@pytest.mark.parametrize("lost", [(0,), (0, 1)], ids=str)
def test_the_next_warms_up_where_the_first_dies_over_it(lost: tuple[int, ...]) -> None:
    with Shards(2) as server:
        run = Run(server, warmup_steps=6)
        begun: dict[int, int] = {}
        run.dooms = dict.fromkeys(lost, (3, after))
        shard = server.shard

        def body(worker: Worker) -> None:
            client: Any = worker.client
            end_step = client.end_step

            def ending(parameters: Any) -> None:
                begun.setdefault(worker.rank, shard().pushes[min({0, 1, 2, 3} - set(lost))])
                end_step(parameters)
                client.drain()

            client.end_step = ending
            worker.live()

        run.body = body
        run.check(dict.fromkeys(lost, (4, 4)))
        next_one = len(lost)
        assert all(begun[rank] >= 6 for rank in range(next_one + 1, 4)), "they waited for the next one's warm-up"


def test_a_worker_dies_while_others_drain_for_a_consensus() -> None:
    """What it sent last is on the server by the time that the lowest asks, or never."""
    with Shards(2) as server:
        run = Run(server, 3)
        pulls: list[np.ndarray] = []

        def body(worker: Worker) -> None:
            worker.start()
            for _ in range(4):
                worker.step()
            if worker.rank == 0:
                raise Killed
            worker.client.drain()
            assert worker.control.meet("consensus").members == (1, 2)
            pulls.append(worker.pulled())
            time.sleep(0.3)
            pulls.append(worker.pulled())
            assert server.shard(0).dropped == server.shard(1).dropped == {0}
            worker.control.meet("done")
            worker.client.close()

        run.body = body
        run.go()
        assert len(pulls) == 4
        assert all(np.array_equal(pulls[0], other) for other in pulls)


def test_who_was_dropped_changes_nothing_and_is_not_waited_for() -> None:
    setup = Setup(3, 0, 1, ("float32",), (1,), 0, survives=True)
    roster = Roster()
    shard = roster.join(0, setup)
    roster.join(1, setup)
    shard.initialise(1, [torch.zeros(1)], ready=False)
    shard.push(0, 1, [torch.ones(1)])
    assert roster.drop(0, by=1)
    assert not roster.drop(0, by=1)
    assert roster.status().lead == "present"
    for act in (
        lambda: shard.push(0, 1, [torch.ones(1)]),
        lambda: shard.begin_all(1, 0),
        lambda: shard.initialise(2, [torch.ones(1)], True, 0),
        lambda: roster.join(0, setup),
        lambda: roster.drop(1, by=0),
        lambda: roster.drop(1, by=1),
        lambda: roster.drop(3 << 32, by=1),
    ):
        with pytest.raises(ProtocolError, match=r"dropped|only worker 1 may"):
            act()
    assert shard.version == 1
    shard.push(1, 1, [torch.ones(1)])
    assert shard.position(1).others == 1, "what the lost one pushed stays"
    with pytest.raises(ProtocolError, match="worker 2 pushed while worker 1 warms up"):
        shard.push(2, 1, [torch.ones(1)])
    roster.leave(1)
    assert not roster.serves()
    assert not roster.everybody_left()
    roster.join(2, setup)
    assert roster.serves()
    roster.leave(2)
    assert roster.everybody_left()


def test_nobody_is_dropped_where_a_lost_worker_ends_the_run() -> None:
    with Shards(1) as server:

        def body(rank: Rank) -> None:
            client = server.client(rank)
            client.start({"theta": nn.Parameter(torch.zeros(2))})
            if rank.rank == 1:
                link = client._links._links[0]  # type: ignore[union-attr]
                with pytest.raises(RuntimeError):
                    link.submit(lambda: questions.ask(link, Header(Message.DROP, 0, 0, number=0))).result()
            client.close()

        run_ranks(2, body)
        assert server.shard().dropped == set()


def test_the_next_gives_the_server_its_state_back() -> None:
    """All have it; the first dies before a shard does."""
    with Shards(2) as server, Shards(1) as other:
        saved: dict[str, Any] = {}
        first = Run(server, 2)

        def before(worker: Worker) -> None:
            worker.start()
            worker.step()
            worker.client.drain()
            worker.control.meet("pushed")
            if worker.rank == 0:
                saved["server"] = worker.client.server_state()
            saved[str(worker.rank)] = worker.client.state_dict(), worker.theta.detach().clone()
            worker.control.meet("saved")
            worker.client.close()

        first.body = before
        first.go()
        again = Run(other, 2)
        again.dooms = {0: (BEFORE_THE_START, never)}

        def after(worker: Worker) -> None:
            state, theta = saved[str(worker.rank)]
            worker.theta.data.copy_(theta)
            worker.client.load_state_dict(state)
            worker.start(saved["server"])
            np.testing.assert_array_equal(worker.pulled(), saved["server"]["parameters"][0].numpy())
            worker.step()
            worker.client.finish({"theta": worker.theta})
            worker.final = worker.pulled()
            worker.client.close()

        again.body = after
        [left] = again.go()
        assert left.final is not None
        np.testing.assert_allclose(left.final, sum_of(0, 1) + sum_of(1, 2), rtol=0, atol=1e-10)


def test_workers_get_new_numbers() -> None:
    state = {"version": 9, "pushes": {"0": 1, "2": 3, "3": 5}}
    assert renumbered(state, {2: 0, 3: 1}) == {"version": 9, "pushes": {"0": 3, "1": 5}}
    assert renumbered(state, {}) == state
    assert renumbered(None, {2: 0}) is None


def test_the_lowest_of_each_node_starts_shards() -> None:
    assert shares(range(5), (0, 1, 2, 3), 2) == {0: [0, 2, 4], 2: [1, 3]}
    assert shares(range(3), (1, 3, 4, 5), 2) == {1: [0], 3: [1], 4: [2]}
    assert shares([1], (3, 4), 2) == {3: [1], 4: []}


@pytest.mark.parametrize("nonfinite", ["heal", "error"])
def test_nothing_of_a_replica_that_is_not_finite_is_pushed(nonfinite: Any) -> None:
    with Shards(2) as server:
        healed: list[int] = []

        def body(rank: Rank) -> None:
            theta = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
            client = server.client(rank, n_push=1, n_pull=3, nonfinite=nonfinite)
            client.on_heal = lambda: healed.append(client.step)
            client.start({"theta": theta})
            for step in range(1, 7):
                with torch.no_grad():
                    theta.add_(torch.tensor(made(0, step)))
                    if step == 4:
                        theta[1] = float("inf")
                client.end_step({"theta": theta})
                client.drain()
            client.finish({"theta": theta})
            expected = sum_of(0, 6) - made(0, 4)
            np.testing.assert_allclose(theta.detach().numpy(), expected, rtol=0, atol=1e-12)
            assert client.stats.healed == 1
            client.close()

        [result] = run_ranks(1, body, expect_errors=True)
        if nonfinite == "error":
            assert isinstance(result, NotFinite)
            assert "the replica of rank 0 is not finite at step 4" in str(result)
        elif result is not None:
            raise result
        assert healed == ([4] if nonfinite == "heal" else [])
