"""The rule of Downpour SGD (design §3) against an independent replay, and what must hold under load."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from ranks import Rank, run_ranks
from shards import Shards
from torch import nn
from waiting import until

from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.traffic import Answered

SIZE = 7
STEPS = 61  # a prime: the last push is always made by `finish`, after the last pull


def initial() -> np.ndarray:
    return np.random.default_rng(99).normal(size=SIZE)


def update(theta: np.ndarray, rank: int, step: int) -> np.ndarray:
    """What plain SGD adds, on a noisy quadratic that differs from rank to rank."""
    return -0.05 * (theta - rank + np.random.default_rng([rank, step]).normal(size=SIZE))


def take_step(parameter: nn.Parameter, rank: int, step: int) -> None:
    with torch.no_grad():
        parameter.add_(torch.tensor(update(parameter.numpy(), rank, step)))


def plain_sgd(steps: int) -> list[np.ndarray]:
    theta = [initial()]
    for t in range(1, steps + 1):
        theta.append(theta[-1] + update(theta[-1], 0, t))
    return theta


def on_server(client: DownpourClient) -> np.ndarray:
    out = {"theta": torch.zeros(SIZE, dtype=torch.float64)}
    client.pull_now(out)
    return out["theta"].numpy()


# -- one worker -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("waits", [False, True])
def test_one_worker_is_plain_sgd(waits: bool, shards: int) -> None:
    expected = plain_sgd(100)
    with Shards(shards) as server:

        def body(rank: Rank) -> None:
            parameter = nn.Parameter(torch.tensor(initial()))
            client = server.client(rank, n_push=1, n_pull=1)
            client.start({"theta": parameter})
            for t in range(1, 101):
                take_step(parameter, 0, t)
                client.end_step({"theta": parameter})
                if waits:
                    client.drain()
                np.testing.assert_allclose(parameter.detach().numpy(), expected[t], rtol=1e-12, atol=1e-13)
            client.finish({"theta": parameter})
            np.testing.assert_allclose(on_server(client), expected[100], rtol=1e-12, atol=1e-13)
            assert not waits or client.stats.pushes == client.stats.pulls == 100
            client.close()

        run_ranks(1, body)


class Gate:
    """Keeps shards from answering, by their locks."""

    def __init__(self, server: Shards) -> None:
        self._locks = [server.shard(number).lock for number in range(server.count)]
        self.closed = False

    def close(self) -> None:
        for lock in self._locks if not self.closed else []:
            lock.acquire()
        self.closed = True

    def open(self) -> None:
        for lock in self._locks if self.closed else []:
            lock.release()
        self.closed = False


@pytest.mark.parametrize("late", [1, 2, 5])
def test_nothing_is_lost_or_doubled_when_answers_are_late(late: int) -> None:
    """Every answer comes ``late`` steps after it was asked for; one worker then still walks the path of plain SGD."""
    steps = 60
    expected = plain_sgd(steps)
    applied_late: list[int] = []
    with Shards(2) as server:

        def note(answered: Answered) -> None:
            if answered.kind == "pull":
                applied_late.append(answered.step - answered.asked)

        def body(rank: Rank) -> None:
            parameter = nn.Parameter(torch.tensor(initial()))
            client = server.client(rank, n_push=2, n_pull=3, on_answer=note)
            client.start({"theta": parameter})
            gate, opens, due = Gate(server), 0, False
            for t in range(1, steps + 1):
                take_step(parameter, 0, t)
                if gate.closed and t >= opens:
                    gate.open()
                    client.drain()
                due |= t % 3 == 0
                if due and not gate.closed:  # what is asked now is answered at step t + late
                    gate.close()
                    opens, due = t + late, False
                client.end_step({"theta": parameter})
                np.testing.assert_allclose(parameter.detach().numpy(), expected[t], rtol=1e-12, atol=1e-13)
            gate.open()
            client.finish({"theta": parameter})
            np.testing.assert_allclose(on_server(client), expected[steps], rtol=1e-12, atol=1e-13)
            client.close()

        run_ranks(1, body)
    assert set(applied_late[:-1]) == {late}, applied_late


@pytest.mark.parametrize("clamps", [False, True])
@pytest.mark.parametrize(("n_push", "n_pull"), [(1, 1), (5, 5), (2, 3)])
def test_what_is_done_after_the_last_steps_push_is_pushed_too(n_push: int, n_pull: int, clamps: bool) -> None:
    """As a clamp in a hook at an epoch's end; and without one, rounding makes no push."""
    steps = 10
    with Shards(2) as server:

        def body(rank: Rank) -> None:
            parameter = nn.Parameter(torch.tensor(initial()))
            client = server.client(rank, n_push=n_push, n_pull=n_pull)
            client.start({"theta": parameter})
            for t in range(1, steps + 1):
                take_step(parameter, 0, t)
                client.end_step({"theta": parameter})
                if t < steps:
                    client.drain()
            if clamps:
                with torch.no_grad():
                    parameter.clamp_(-0.1, 0.1)
            for _ in range(2):
                client.finish({"theta": parameter})
                assert client.stats.pushes == steps // n_push + clamps
            expected = np.clip(plain_sgd(steps)[-1], -0.1, 0.1) if clamps else plain_sgd(steps)[-1]
            np.testing.assert_allclose(on_server(client), expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-12)
            client.close()

        run_ranks(1, body)


# -- several workers ------------------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """One worker's run: what it was at every step's end, and the answers it got."""

    theta: list[np.ndarray] = field(default_factory=list)
    answers: list[Answered] = field(default_factory=list)


def run_recorded(server: Shards, workers: int, n_push: int, n_pull: int) -> tuple[list[Recorded], np.ndarray]:
    """Train with pauses that shuffle the workers; the last push of each is made by ``finish``, after its last pull."""

    def body(rank: Rank) -> tuple[Recorded, np.ndarray]:
        recorded = Recorded()
        parameter = nn.Parameter(torch.tensor(initial()) if rank.rank == 0 else torch.zeros(SIZE, dtype=torch.float64))
        client = server.client(rank, n_push=n_push, n_pull=n_pull, on_answer=recorded.answers.append)
        client.start({"theta": parameter})
        pauses = np.random.default_rng(rank.rank).exponential(0.001, size=STEPS)
        for t in range(1, STEPS + 1):
            take_step(parameter, rank.rank, t)
            time.sleep(pauses[t - 1] * (1 + rank.rank))
            if t >= STEPS - 2:  # nothing put off: at the last step nothing is due
                client.drain()
            client.end_step({"theta": parameter})
            recorded.theta.append(parameter.detach().numpy().copy())
        client.finish({"theta": parameter})
        recorded.theta[-1] = parameter.detach().numpy().copy()
        rank.control.meet("all pushed")
        final = on_server(client)
        rank.control.meet("all read")
        client.close()
        return recorded, final

    results = run_ranks(workers, body)
    return [recorded for recorded, _ in results], results[0][1]


class Replay:
    """Design §3 word by word: shards as lists of versions, workers as sums of what they made, one thread."""

    def __init__(self, recorded: list[Recorded], shards: int) -> None:
        cuts = [SIZE * k // shards for k in range(shards + 1)]
        self.slices = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        self.versions: list[list[np.ndarray]] = [[initial()[s]] for s in self.slices]
        self.arriving: list[dict[int, np.ndarray]] = [{} for _ in self.slices]
        self.theta: list[list[np.ndarray]] = [[] for _ in recorded]
        workers = [self.walk(rank, run.answers) for rank, run in enumerate(recorded)]
        while workers:
            workers = [worker for worker in workers if next(worker, "done") != "done"]

    def walk(self, rank: int, answers: list[Answered]) -> Iterator[None]:
        pushes = {a.asked: a.versions for a in answers if a.kind == "push"}
        pulls = [a for a in answers if a.kind == "pull"]
        theta, made, pushed_at = initial(), [np.zeros(SIZE)], 0
        for t in range(STEPS + 1):
            if t:
                made.append(update(theta, rank, t))
                theta = theta + made[t]
            for pull in [pull for pull in pulls if pull.step == t]:
                while any(len(have) <= v for have, v in zip(self.versions, pull.versions, strict=True)):
                    yield  # until the others' pushes are replayed
                before = max([0] + [asked for asked in pushes if asked <= pull.asked])
                received = np.concatenate([have[v] for have, v in zip(self.versions, pull.versions, strict=True)])
                theta = received + np.sum(made[before + 1 :], axis=0)
            if t and t in pushes:
                delta = np.sum(made[pushed_at + 1 :], axis=0)
                pushed_at = t
                for k, version in enumerate(pushes[t]):
                    self.arriving[k][version] = delta[self.slices[k]]
                    while (nxt := len(self.versions[k])) in self.arriving[k]:
                        self.versions[k].append(self.versions[k][-1] + self.arriving[k][nxt])
            if t:
                self.theta[rank].append(theta)


def expected_staleness(recorded: list[Recorded], rank: int, push: Answered) -> int:
    """Count the others' versions between the last pull that the worker had applied and its push, on each shard."""
    pulls = [a for a in recorded[rank].answers if a.kind == "pull" and a.step <= push.asked]
    read = pulls[-1].versions if pulls else (0,) * len(push.versions)
    others = [a.versions for k, run in enumerate(recorded) if k != rank for a in run.answers if a.kind == "push"]
    return max(sum(read[k] < v[k] < push.versions[k] for v in others) for k in range(len(read)))


@pytest.mark.parametrize(("n_push", "n_pull"), [(2, 3), (3, 3), (5, 2), (4, 7)])
def test_workers_and_shards_equal_the_replay_of_their_order(n_push: int, n_pull: int) -> None:
    with Shards(2) as server:
        recorded, final = run_recorded(server, 3, n_push, n_pull)
    replay = Replay(recorded, 2)
    for run, expected in zip(recorded, replay.theta, strict=True):
        np.testing.assert_allclose(np.stack(run.theta), np.stack(expected), rtol=0, atol=1e-11)
    np.testing.assert_allclose(final, np.concatenate([have[-1] for have in replay.versions]), rtol=0, atol=1e-11)
    staleness = []
    for rank, run in enumerate(recorded):
        for push in [a for a in run.answers if a.kind == "push"]:
            assert push.staleness == expected_staleness(recorded, rank, push)
            staleness.append(push.staleness)
    assert max(staleness) > 0, "the workers did not overlap: nothing was tested"


def test_every_push_of_a_crowd_counts_once() -> None:
    """8 workers × 500 pushes of ones: exactly 4,000, and as many versions."""
    with Shards(1) as server:

        def body(rank: Rank) -> np.ndarray:
            parameter = nn.Parameter(torch.zeros(64))
            client = server.client(rank, n_push=1, n_pull=5)
            client.start({"theta": parameter})
            for _ in range(500):
                with torch.no_grad():
                    parameter.add_(1)
                client.end_step({"theta": parameter})
                client.drain()
            assert client.stats.pushes == 500
            rank.control.meet("all pushed")
            out = {"theta": torch.zeros(64)}
            client.pull_now(out)
            rank.control.meet("all read")
            client.close()
            return out["theta"].numpy()

        for held in run_ranks(8, body):
            np.testing.assert_array_equal(held, 4000)
        assert server.shard().version == 4000


def test_pushes_that_come_too_fast_are_put_together() -> None:
    with Shards(1) as server:

        def body(rank: Rank) -> None:
            parameter = nn.Parameter(torch.zeros(1000))
            client = server.client(rank, n_push=1, n_pull=1)
            client.start({"theta": parameter})
            gate = Gate(server)
            gate.close()
            for _ in range(50):
                with torch.no_grad():
                    parameter.add_(1)
                client.end_step({"theta": parameter})
                assert client.stats.wait_seconds == 0
            gate.open()
            client.finish({"theta": parameter})
            assert client.stats.pushes == 2
            assert client.stats.bytes_sent == 2 * 4000
            assert (parameter == 50).all()
            client.close()

        run_ranks(1, body)


def test_readers_never_see_half_an_update() -> None:
    size, pushes = 300_000, 150
    with Shards(2) as server:
        writers = threading.Semaphore(0)

        def body(rank: Rank) -> int:
            parameter = nn.Parameter(torch.zeros(size))
            client = server.client(rank, n_push=1, n_pull=1000)
            client.start({"theta": parameter})
            reads = 0
            if rank.rank < 2:
                for _ in range(pushes):
                    with torch.no_grad():
                        parameter.add_(1)
                    client.end_step({"theta": parameter})
                    client.drain()
                writers.release()
            else:
                out = {"theta": torch.zeros(size)}
                while not writers.acquire(blocking=False):
                    client.pull_now(out)
                    for part in out["theta"].split(size // 2):
                        assert part.min() == part.max(), "half an update"
                    reads += 1
            client.close()
            return reads

        assert min(run_ranks(4, body)[2:]) > 3


def test_mixed_dtypes_layouts_and_frozen_parameters() -> None:
    """Also more shards than some segments have elements."""

    def make(rank: int) -> dict[str, nn.Parameter]:
        g = torch.Generator().manual_seed(rank)  # the global one belongs to all threads
        return {
            "a": nn.Parameter(torch.randn(5, 3, generator=g)),
            "half": nn.Parameter(torch.randn(2, generator=g).to(torch.bfloat16)),
            "frozen": nn.Parameter(torch.full((4,), float(rank)), requires_grad=False),
            "images": nn.Parameter(torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last)),
            "double": nn.Parameter(torch.randn(3, dtype=torch.float64, generator=g)),
            "b": nn.Parameter(torch.randn((), generator=g)),
        }

    with Shards(3) as server:

        def body(rank: Rank) -> dict[str, nn.Parameter]:
            parameters = make(rank.rank)
            client = server.client(rank, n_push=1, n_pull=1)
            client.start(parameters)
            for name, parameter in parameters.items():
                if name != "frozen":
                    torch.testing.assert_close(parameter, make(0)[name], rtol=0, atol=0)
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.add_(parameter.requires_grad)
            rank.control.meet("all started")
            client.end_step(parameters)
            client.finish(parameters)
            rank.control.meet("all pushed")
            client.pull_now(parameters)
            rank.control.meet("all read")
            client.close()
            return parameters

        for rank, parameters in enumerate(run_ranks(2, body)):
            for name, expected in make(0).items():
                if name == "frozen":
                    assert (parameters[name] == rank).all()
                else:
                    atol = 0.05 if name == "half" else 1e-5
                    torch.testing.assert_close(parameters[name], nn.Parameter(expected + 2), rtol=0, atol=atol)


def test_a_parameter_that_is_unfrozen_later_is_refused_at_once() -> None:
    with Shards(1) as server:

        def body(rank: Rank) -> None:
            parameters = {"a": nn.Parameter(torch.zeros(2)), "late": nn.Parameter(torch.zeros(2), requires_grad=False)}
            client = server.client(rank, n_push=1000)
            client.start(parameters)
            client.end_step(parameters)
            parameters["late"].requires_grad_()
            with pytest.raises(RuntimeError, match="'late' requires a gradient, but did not when the training started"):
                client.end_step(parameters)
            client.close()

        run_ranks(1, body)


def test_a_second_training_begins_anew_on_the_same_shards() -> None:
    with Shards(2) as server:

        def body(rank: Rank) -> None:
            client = server.client(rank, n_push=1, n_pull=1)
            for training in (1, 2, 3):
                parameter = nn.Parameter(torch.full((SIZE,), 10.0 * training if rank.rank == 0 else 0.0))
                client.start({"theta": parameter})
                assert (parameter >= 10 * training).all()
                with torch.no_grad():
                    parameter.add_(1)
                client.end_step({"theta": parameter})
                client.finish({"theta": parameter})
                assert client.step == 1
                rank.control.meet("all pushed")
                client.pull_now({"theta": parameter})
                assert (parameter == 10 * training + 3).all()
                rank.control.meet("all read")
            client.close()

        run_ranks(3, body)
        until(lambda: all(shard.finished.is_set() for shard in server.servers))
