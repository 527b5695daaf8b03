"""Copies beside training, on a device whose streams do nothing: the CPU. On CUDA: `python -m benchmarks.gpu`."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from ranks import Rank, Script, run_ranks
from torch import Tensor

from lightning_gossip.exchange import clock
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.exchange.staging import Staging
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport import shared_memory
from lightning_gossip.transport.all_reduce import LinkAllReduce
from lightning_gossip.transport.interface import Staged
from lightning_gossip.transport.link_transport import LinkTransport

HOST = torch.device("cpu")


def test_a_snapshot_is_staged_and_what_arrives_lands_in_a_place_of_its_own() -> None:
    staging, snapshot, room = Staging(HOST), torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    staging.before_packing()
    staged = staging.stage(snapshot, room)
    staged.ready()
    assert torch.equal(room, snapshot)
    first = staged.land(1, room)
    assert torch.equal(first, snapshot)
    assert first.data_ptr() not in (room.data_ptr(), snapshot.data_ptr())
    room.fill_(7)
    assert staged.land(1, room).data_ptr() == first.data_ptr(), "a payload's number is its place on the device"
    assert staged.land(2, room).data_ptr() != first.data_ptr()
    assert first.eq(7).all()


class SlowCopy(Staged):
    """A copy to the host that takes its time, or waits for ``gate``, and writes the room only then."""

    def __init__(self, snapshot: Tensor, room: Tensor, gate: threading.Event | None = None) -> None:
        self.landed_in: list[str] = []
        self._copied = threading.Event()

        def copy() -> None:
            if gate is None:
                time.sleep(0.05)
            else:
                gate.wait(10)
            room.copy_(snapshot)
            self._copied.set()

        threading.Thread(target=copy, daemon=True).start()

    def ready(self) -> None:
        assert self._copied.wait(10)

    def land(self, number: int, payload: Tensor) -> Tensor:
        self.landed_in.append(threading.current_thread().name)
        return payload.clone()


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("delay", [0, 1])
def test_a_room_is_sent_only_once_it_holds_the_snapshot(
    monkeypatch: pytest.MonkeyPatch, delay: int, near: bool
) -> None:
    copies: list[SlowCopy] = []
    monkeypatch.setattr(shared_memory._Mapped, "pin", lambda self: None)

    def snapshot(self: Exchange, layout: Any, tensors: Any, room: Tensor) -> tuple[Tensor, None, Staged]:
        own = clock.FlatBuffer.empty(layout, HOST)
        own.pack(tensors)
        room.zero_()
        copies.append(SlowCopy(own.storage.clone(), room))
        return own.storage, None, copies[-1]

    monkeypatch.setattr(Exchange, "_snapshot", snapshot)

    def body(me: Rank) -> Tensor:
        weight = torch.full((1000,), float(me.rank + 1), requires_grad=True)
        schedule = Schedule(Script({2: (0, 1), 4: (0, 1)}), period=2)
        transport = LinkTransport(me.links, me.control, shared_memory=near, pin_memory=near)
        rule = ElasticMixing(0.5)
        exchange = Exchange(me.rank, 2, schedule, rule, transport, lambda: {"weight": weight}, delay=delay)
        for _ in range(4 + delay):
            exchange.begin()
            with torch.no_grad():
                weight += me.rank + 1
            exchange.end()
        return weight.detach().clone()

    one, other = run_ranks(2, body)
    replay = torch.tensor([[1.0], [2.0]])
    for step in range(1, 5 + delay):
        if step in (2, 4):
            difference = replay - replay.flip(0)
        replay = replay + torch.tensor([[1.0], [2.0]])
        if step - delay in (2, 4):
            replay = replay - 0.5 * difference
    torch.testing.assert_close(torch.stack([one[:1], other[:1]]), replay)
    assert len(copies) == 4
    landed_in = [name for copy in copies for name in copy.landed_in]
    assert len(landed_in) == 4
    beside = "staging" if near else "link-"
    # where two ranks come to know each other's memory, training's thread fetches what is there
    assert sum(name.startswith(beside) for name in landed_in) == (2 if near else 4)


class GatedStaging(Staging):
    """Copies to the host that wait for ``gate``."""

    def __init__(self, copies: list[SlowCopy], gate: threading.Event) -> None:
        super().__init__(HOST)
        self.copies, self.gate = copies, gate

    def stage(self, snapshot: Tensor, room: Tensor) -> Staged:
        room.zero_()
        self.copies.append(copy := SlowCopy(snapshot.clone(), room, self.gate))
        return copy


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("delay", [0, 3])
def test_a_drift_is_sent_only_once_it_is_on_the_host_and_its_mean_lands_beside_training(
    monkeypatch: pytest.MonkeyPatch, delay: int, wire_dtype: torch.dtype | None
) -> None:
    copies: list[SlowCopy] = []
    gates = [threading.Event(), threading.Event()]

    def body(me: Rank) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(me.rank)
        model = {f"{layer}.weight": torch.linspace(-1, 1, 300).requires_grad_() for layer in "abc"}
        reducer = LinkAllReduce(me.links, me.control)
        rounds = Rounds(
            me.rank,
            2,
            4,
            OuterStep(0.7, 0.9),
            reducer,
            lambda: model,
            delay=delay,
            fragments=2,
            wire_dtype=wire_dtype,
        )
        for _ in range(13 + delay):
            gates[me.rank].clear()
            rounds.begin()  # it would wait in vain
            gates[me.rank].set()
            with torch.no_grad():
                for parameter in model.values():
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
            rounds.end()
        rounds.settle()
        return {name: p.detach().clone() for name, p in model.items()}

    unstaged = run_ranks(2, body)
    monkeypatch.setattr(Rounds, "_staging_of", lambda self, device: GatedStaging(copies, gates[self.rank]))
    for model, same in zip(run_ranks(2, body), unstaged, strict=True):
        assert all(torch.equal(value, same[name]) for name, value in model.items())
    landed_in = [name for copy in copies for name in copy.landed_in]
    assert len(landed_in) == len(copies) >= 12
    assert all(name.startswith("all-reduce-") for name in landed_in)


def test_replicas_on_the_host_are_not_staged() -> None:
    def body(me: Rank) -> bool:
        weight = torch.full((2,), float(me.rank), requires_grad=True)
        exchange = me.exchange(Schedule(Script({1: (0, 1)})), ElasticMixing(0.5), {"weight": weight})
        exchange.begin()
        exchange.end()
        assert weight.tolist() == [0.5, 0.5]
        return exchange._staging is None

    assert run_ranks(2, body) == [True, True]
