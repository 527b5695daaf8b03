"""Optimizers on the server, checkpoints of server and workers, the warm start, and workers that must keep up."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Rank, run_ranks
from shards import Shards
from torch import nn
from waiting import until

from lightning_gossip.parameter_server import snapshot
from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.optimizers import ELEMENT_WISE, ServerOptimizer
from lightning_gossip.parameter_server.protocol import ProtocolError, Setup
from lightning_gossip.parameter_server.shard_links import ShardLost

SIZE = 5
OPTIMIZERS: dict[str, Any] = {
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.05, betas=(0.8, 0.99)),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.3),
}


class NumpyOptimizer:
    """The optimizers again, from their papers, in numpy: returns what a step adds to the parameters."""

    def __init__(self, name: str) -> None:
        self.name, self.t = name, 0
        self.m = self.v = np.zeros(SIZE)

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        self.t += 1
        if self.name == "momentum":
            self.m = 0.9 * self.m + gradient
            return -0.1 * self.m
        if self.name == "adagrad":
            self.v = self.v + gradient**2
            return -0.3 * gradient / (np.sqrt(self.v) + 1e-10)
        self.m = 0.8 * self.m + 0.2 * gradient
        self.v = 0.99 * self.v + 0.01 * gradient**2
        return -0.05 * self.m / (1 - 0.8**self.t) / (np.sqrt(self.v / (1 - 0.99**self.t)) + 1e-8)


def made(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=SIZE)


def train(client: Any, parameter: nn.Parameter, first: int, last: int) -> None:
    """Train in step with the server, so that a run can be repeated exactly."""
    for t in range(first, last + 1):
        with torch.no_grad():
            parameter.add_(torch.tensor(made(t)))
        client.end_step({"theta": parameter})
        client.drain()


def pulled(client: Any) -> np.ndarray:
    out = {"theta": torch.zeros(SIZE, dtype=torch.float64)}
    client.pull_now(out)
    return out["theta"].numpy()


def theta(value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full((SIZE,), value, dtype=torch.float64))


# -- optimizers on the server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_server_optimizers_equal_their_replay(name: str) -> None:
    """Each push of 3 steps is one step of the optimizer, with minus the displacement as the gradient."""
    with Shards(2) as server:

        def body(rank: Rank) -> None:
            parameter, replay, expected = theta(), NumpyOptimizer(name), np.zeros(SIZE)
            client = server.client(rank, n_push=3, n_pull=3, server_optimizer=OPTIMIZERS[name])
            client.start({"theta": parameter})
            for first in range(1, 61, 3):
                train(client, parameter, first, first + 2)
                expected = expected + replay(-(made(first) + made(first + 1) + made(first + 2)))
                np.testing.assert_allclose(pulled(client), expected, rtol=0, atol=1e-12)
            client.close()

        run_ranks(1, body)


@pytest.mark.parametrize("path", ELEMENT_WISE)
def test_allowed_optimizers_are_element_wise(path: str) -> None:
    """A cut tensor's parts move as the whole one, which is what lets shards hold parts."""
    if path.endswith("ASGD"):
        keywords: dict[str, Any] = {"t0": 2}
    else:
        keywords = {"momentum": 0.9} if path.endswith("SGD") else {}
    optimizer = ServerOptimizer(path, keywords)
    whole = torch.linspace(-1, 1, 10).requires_grad_()
    parts = [part.clone().requires_grad_() for part in whole.detach().split([3, 7])]
    steppers = [optimizer.build([whole]), optimizer.build(parts)]
    for t in range(5):
        whole.grad = torch.tensor(np.random.default_rng(t).normal(size=10), dtype=torch.float32)
        for part, gradient in zip(parts, whole.grad.split([3, 7]), strict=True):
            part.grad = gradient
        for stepper in steppers:
            stepper.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in parts]), whole.detach(), rtol=0, atol=0)


class Custom(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "has to be element-wise.*LBFGS"),
        (torch.optim.Muon, "has to be element-wise.*Muon"),
        (torch.optim.SparseAdam, "has to be element-wise.*SparseAdam"),
        (torch.optim.Adafactor, "has to be element-wise.*Adafactor"),
        (Custom, "has to be element-wise.*Custom"),
        ("torch.optim.LBFGS", "has to be element-wise"),
        (torch.optim.SGD([torch.zeros(1)]), "has to be element-wise"),
        (functools.partial(torch.optim.SGD, 0.1), "keywords only"),  # type: ignore[arg-type]
        (functools.partial(torch.optim.SGD, lr=torch.tensor(0.1)), "JSON"),
        (functools.partial(torch.optim.SGD, lr=float("nan")), "JSON"),
        (functools.partial(torch.optim.SGD, learning_rate=0.1), "take its keywords"),  # type: ignore[call-arg]
        (functools.partial(torch.optim.SGD, lr=-1.0), "take its keywords"),
        (functools.partial(torch.optim.Adam, capturable=True), "can not be given `capturable`"),
    ],
)
def test_other_optimizers_are_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`server_optimizer` must .*{message}"):
        ServerOptimizer.of(optimizer)


@pytest.mark.parametrize("path", ["os.system", "torch.optim.LBFGS", "torch.load", "builtins.eval", "SGD", ""])
def test_a_shard_makes_no_other_class_from_a_path_that_arrives(path: str) -> None:
    setup = Setup(1, 0, 1, ("float32",), (3,), 0).to_json()
    with pytest.raises(ProtocolError, match="element-wise"):
        Setup.from_json({**setup, "optimizer": [path, {}]})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("addresses", []),
        ("addresses", "host:1"),
        ("addresses", ["host:1", "host:1"]),
        ("addresses", ["host"]),
        ("addresses", ["host:99999"]),
        ("n_push", 0),
        ("n_pull", 1.5),
        ("max_staleness", -1),
        ("warmup_steps", True),
        ("server_optimizer", "SGD"),
    ],
)
def test_arguments_are_checked(argument: str, value: Any) -> None:
    arguments: dict[str, Any] = {"addresses": ["host:1"], "control": None}
    with pytest.raises(ValueError, match=f"`{argument}` must"):
        DownpourClient(**{**arguments, argument: value})


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards_after", [2, 3])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "none"])
def test_a_resumed_run_is_the_unbroken_one(name: str, shards_after: int, tmp_path: Any) -> None:
    """Bit for bit, also in the middle of pushes (3) and pulls (4), and on another number of shards."""
    options = {"n_push": 3, "n_pull": 4, "server_optimizer": OPTIMIZERS.get(name)}
    results: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def run(server: Shards, part: str) -> None:
        def body(rank: Rank) -> None:
            parameter = theta()
            client = server.client(rank, **options)
            if part == "second":
                saved = torch.load(tmp_path / "state.pt", weights_only=True)
                with torch.no_grad():
                    parameter.copy_(saved["theta"])
                client.load_state_dict(saved["worker"])
                client.start({"theta": parameter}, saved["server"])
                assert client.step == 10
            else:
                client.start({"theta": parameter})
            train(client, parameter, 11 if part == "second" else 1, 10 if part == "first" else 25)
            if part == "first":
                state = {"theta": parameter.detach(), "worker": client.state_dict(), "server": client.server_state()}
                torch.save(state, tmp_path / "state.pt")
                client.close()
                return
            client.finish({"theta": parameter})
            results[part] = parameter.detach().numpy().copy(), pulled(client)
            assert client.stats.pushes == 9
            client.close()

        run_ranks(1, body)

    with Shards(2) as server:
        run(server, "unbroken")
    with Shards(2) as server:
        run(server, "first")
    with Shards(shards_after) as server:
        run(server, "second")
    for resumed, unbroken in zip(results["second"], results["unbroken"], strict=True):
        np.testing.assert_array_equal(resumed, unbroken)


def test_what_was_asked_for_but_not_applied_is_not_lost_by_a_checkpoint() -> None:
    """A pull under way, and one applied after a push (a reference in two parts): nothing made is lost or doubled."""
    with Shards(2) as server, Shards(2) as other:
        saved: dict[int, Any] = {}

        def before(rank: Rank) -> None:
            parameter = theta()
            client = server.client(rank, n_push=2, n_pull=3)
            client.start({"theta": parameter})
            if rank.rank == 1:
                train(client, parameter, 1, 4)
                rank.control.meet("pushed")
            else:
                rank.control.meet("pushed")
                train(client, parameter, 1, 2)
                with server.shard().lock:  # asked at 3, not answered until after the push of 4
                    for t in (3, 4):
                        with torch.no_grad():
                            parameter.add_(torch.tensor(made(t)))
                        client.end_step({"theta": parameter})
                client.drain()
                train(client, parameter, 5, 6)
            worker = client.state_dict()
            rank.control.meet("drained")
            saved[rank.rank] = (parameter.detach().clone(), worker, client.server_state() if rank.rank == 0 else None)
            rank.control.meet("saved")
            client.close()

        def after(rank: Rank) -> np.ndarray:
            value, worker, state = saved[rank.rank]
            parameter = nn.Parameter(value)
            client = other.client(rank, n_push=2, n_pull=3)
            client.load_state_dict(worker)
            client.start({"theta": parameter}, state)
            np.testing.assert_array_equal(parameter.detach().numpy(), saved[rank.rank][0].numpy())
            train(client, parameter, client.step + 1, client.step + 1)
            client.finish({"theta": parameter})
            rank.control.meet("pushed")
            final = pulled(client)
            rank.control.meet("read")
            client.close()
            return final

        run_ranks(2, before)
        for final in run_ranks(2, after):
            expected = sum(made(t) for t in range(1, 8)) + sum(made(t) for t in range(1, 6))
            np.testing.assert_allclose(final, expected, rtol=0, atol=1e-12)


def test_a_server_goes_on_with_other_workers_and_another_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    """From a checkpoint of 2 workers with Adam, 1 worker with Adagrad: only the optimizer begins anew."""
    with Shards(2) as server, Shards(1) as other:
        saved: dict[str, Any] = {}

        def before(rank: Rank) -> None:
            parameter = theta(1.0)
            client = server.client(rank, n_push=1, n_pull=1, server_optimizer=OPTIMIZERS["adam"])
            client.start({"theta": parameter})
            train(client, parameter, 1, 5)
            rank.control.meet("trained")
            if rank.rank == 0:
                saved.update(client.server_state())
            rank.control.meet("saved")
            client.close()

        def after(rank: Rank) -> None:
            parameter = theta()
            client = other.client(rank, n_push=1, n_pull=1, server_optimizer=OPTIMIZERS["adagrad"])
            client.start({"theta": parameter}, saved)
            np.testing.assert_array_equal(parameter.detach().numpy(), saved["parameters"][0].numpy())
            train(client, parameter, 1, 1)
            assert client.stats.staleness == 0
            expected = saved["parameters"][0].numpy() + NumpyOptimizer("adagrad")(-made(1))
            np.testing.assert_allclose(pulled(client), expected, rtol=0, atol=1e-12)
            assert client._traffic is not None
            with pytest.raises(ValueError, match="belongs to other parameters"):
                snapshot.load(client._traffic.displacement.cut, {**saved, "layout": 1}, 2, True, {})
            client.close()

        run_ranks(2, before)
        assert saved["version"] == 10
        run_ranks(1, after)
    assert "begins anew" in caplog.text


# -- the warm start, and keeping up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["by itself", "early", "with the training"])
def test_worker_0_warms_up_alone(ends: str) -> None:
    """The others begin from what it made, whether its warm-up ends in time, is cut short, or outlasts the training."""
    with Shards(2) as server:
        steps = 6 if ends == "by itself" else 4
        made_first = sum(made(t) for t in range(1, steps + 1))
        began = time.monotonic()  # of all: on a crowded machine a thread may begin later than another

        def body(rank: Rank) -> None:
            parameter = theta()
            client = server.client(rank, n_push=4, n_pull=4, warmup_steps=6 if ends == "by itself" else 100)
            client.start({"theta": parameter})
            if rank.rank == 0:
                for t in range(1, steps + 1):
                    time.sleep(0.05)
                    train(client, parameter, t, t)
                if ends == "early":
                    client.end_warmup({"theta": parameter})
                elif ends == "with the training":
                    client.finish({"theta": parameter})
            else:
                assert time.monotonic() - began > 0.05 * steps
                np.testing.assert_allclose(parameter.detach().numpy(), made_first, rtol=0, atol=1e-12)
                assert client.step == 0
            rank.control.meet("warm")
            client.close()

        run_ranks(3, body)


@pytest.mark.parametrize("how", ["from its state", "from the server's state", "from a step"])
def test_a_training_that_goes_on_has_no_warm_up(how: str) -> None:
    """The first one ended at the latest when the state was saved."""
    with Shards(1) as server:

        def body(rank: Rank) -> None:
            parameter = theta()
            client = server.client(rank, warmup_steps=100, n_push=2)
            client.start({"theta": parameter})
            assert not server.shard().ready
            train(client, parameter, 1, 3)
            client.end_warmup({"theta": parameter})
            worker, state = client.state_dict(), client.server_state()
            client.abandon()
            if how == "from its state":
                client.load_state_dict(worker)
            elif how == "from a step":
                client.continue_from(3)
            client.start({"theta": parameter}, None if how == "from a step" else state)
            assert server.shard().ready
            assert client.step == 3
            train(client, parameter, 4, 4)
            np.testing.assert_allclose(pulled(client), sum(made(t) for t in range(1, 5)), rtol=0, atol=1e-12)
            client.close()

        run_ranks(1, body)


@pytest.mark.parametrize("trainable", ["a", "b", "ab"])
def test_a_state_is_loaded_whatever_is_frozen_at_that_moment(trainable: str) -> None:
    """As where a hook freezes ``b`` only after the strategy was set up."""
    with Shards(1) as server:

        def body(rank: Rank) -> None:
            parameters = {"a": theta(), "b": theta().requires_grad_(False)}
            client = server.client(rank)
            client.start(parameters)
            worker, state = client.state_dict(), client.server_state()
            client.load_state_dict(worker)
            client.start({name: theta().requires_grad_(name in trainable) for name in "ab"}, state)
            client.end_step(parameters)
            client.load_state_dict(worker)
            with pytest.raises(ValueError, match="state belongs to other parameters"):
                client.start({"b": theta()}, state)
            client.close()

        run_ranks(1, body)


def test_a_push_of_others_in_the_warm_up_is_refused() -> None:
    with Shards(1) as server:
        setup = Setup(2, 0, 1, ("float32",), (1,), 0)
        roster = server.servers[0].roster
        shard = roster.join(0, setup)
        shard.initialise(1, [torch.zeros(1)], ready=False)
        shard.push(0, 1, [torch.ones(1)])
        with pytest.raises(ProtocolError, match="worker 1 pushed while worker 0 warms up"):
            shard.push(1, 1, [torch.ones(1)])
        with pytest.raises(ProtocolError, match="training 2 is not the one under way"):
            shard.push(0, 2, [torch.ones(1)])
        assert shard.version == 1


@pytest.mark.parametrize("max_staleness", [None, 3])
def test_a_worker_that_is_too_far_behind_waits_for_a_pull(max_staleness: int | None) -> None:
    with Shards(2) as server:

        def body(rank: Rank) -> None:
            parameter = theta()
            slow = rank.rank == 1
            client = server.client(rank, n_push=1 if not slow else 50, n_pull=50, max_staleness=max_staleness)
            client.start({"theta": parameter})
            rank.control.meet("started")
            for t in range(1, 11):
                if not slow:
                    train(client, parameter, t, t)
                rank.control.meet("pushed")
                if slow:
                    behind = server.shard().version
                    client.end_step({"theta": parameter})
                    asked: Any = client._links
                    until(lambda: all(f.done() for f in asked._last))  # noqa: B023 - called at once
                    seen = parameter.detach().numpy()
                    versions = [sum((made(s) for s in range(1, v + 1)), np.zeros(SIZE)) for v in range(behind + 1)]
                    distance = [int(np.abs(v - seen).max() < 1e-9) for v in versions][::-1].index(1)
                    # what it knows is a step old
                    assert max_staleness is None or distance <= max_staleness + 1
                rank.control.meet("looked")
            assert client.stats.pulls == (0 if not slow else 1 if max_staleness is None else 3)
            client.close()

        run_ranks(2, body)


def test_waiting_for_a_pull_blocks_until_it_is_there() -> None:
    with Shards(1) as server:

        def body(rank: Rank) -> None:
            parameter = theta()
            client = server.client(rank, n_push=1, n_pull=50, max_staleness=0)
            client.start({"theta": parameter})
            rank.control.meet("started")
            if rank.rank == 0:
                train(client, parameter, 1, 1)
            rank.control.meet("pushed")
            if rank.rank == 1:
                train(client, parameter, 1, 1)  # the acknowledgement tells of the other's push
                lock = server.shard().lock
                lock.acquire()
                threading.Timer(0.3, lock.release).start()
                client.end_step({"theta": parameter})
                assert 0.25 < client.stats.wait_seconds <= client.stats.call_seconds
                np.testing.assert_allclose(parameter.detach().numpy(), 2 * made(1), rtol=0, atol=1e-12)
            rank.control.meet("looked")
            client.close()

        run_ranks(2, body)


def test_differently_set_up_workers_are_refused_with_the_reason() -> None:
    with Shards(1) as server:

        def body(rank: Rank) -> None:
            optimizer = None if rank.rank == 0 else torch.optim.Adam
            client = server.client(rank, n_push=1, server_optimizer=optimizer)
            if rank.rank == 0:
                client.start({"theta": theta()})
                rank.control.meet("started")
            else:
                rank.control.meet("started")
                with pytest.raises(
                    ShardLost, match=r"worker 1 lost .* shard 0 .*: it refused: .*differently: optimizer"
                ):
                    client.start({"theta": theta()})
            rank.control.meet("refused")
            if rank.rank == 0:
                client.end_step({"theta": theta()})
                client.drain()
                assert client.stats.pushes == 1
            client.close()

        run_ranks(2, body)
