"""Snapshots of parameters that their stream has not written yet: two ranks as threads, each with a stream of its own.

Before each exchange the stream gets work for a tenth of a second, and then the update. The host runs ahead of all of
it, so whoever looked at the parameters' memory at once would send what they were before. And it is left with writes to
memory that is free again: whoever took that memory for what arrives, on another stream, would find it overwritten.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import HashStore

from benchmarks.gpu.rows import Check, yes
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.rounds import Rounds
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.all_reduce import LinkAllReduce
from lightning_gossip.transport.link import Links
from lightning_gossip.transport.link_transport import LinkTransport

_STEPS = 5
_BUSY_SECONDS = 0.1
_CYCLES_A_SECOND = 1.7e9  # of a GPU, about: the delay is no measurement
_TIMEOUT = timedelta(seconds=60)
_SHARED_MEMORY, _LINKS, _ALL_REDUCE = "shared memory", "links", "LocalSGD's all-reduce"


def all_checks(device: torch.device, small: bool = False) -> Iterator[Check]:
    """Run every case; ``small``: with tensors for a rehearsal."""
    shapes = {
        "one large tensor": [2**14 if small else 2**26],
        "many small tensors": [1000] * (20 if small else 400),
    }
    for name, sizes in shapes.items():
        for side in (False, True):
            for how in (_SHARED_MEMORY, _LINKS, _ALL_REDUCE):
                where = "a side stream" if side else "the default stream"
                off, longest = stress(device, sizes, side, how)
                yield Check("streams", f"{name} on {where}, {how}: largest error", 2, off, 0.0)
                text = f"begin() returns while the stream is busy, {name} on {where}, {how}"
                if device.type == "cuda":
                    yield yes("streams", text, 2, longest < _BUSY_SECONDS / 2, f"{1e3 * longest:.1f} ms of host time")


def stress(device: torch.device, sizes: list[int], side: bool, how: str) -> tuple[float, float]:
    """Return the largest error of two replicas after some exchanges, and the longest time that ``begin()`` took.

    The first step is not timed: there memory is page-locked and links are made.
    """
    gc.collect()  # memory of the case before is given up now, and not within a call that is timed
    store = HashStore()
    found: dict[int, tuple[float, float]] = {}
    threads = [
        threading.Thread(target=lambda r=rank: found.update({r: _rank(r, store, device, sizes, side, how)}))
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < 2:
        raise RuntimeError("a rank of the streams' stress has failed: see above")
    return max(off for off, _ in found.values()), max(seconds for _, seconds in found.values())


def _rank(
    rank: int, store: HashStore, device: torch.device, sizes: list[int], side: bool, how: str
) -> tuple[float, float]:
    control = Control(lambda: store, rank, 2, _TIMEOUT)
    links = Links(store, f"rank{rank}", _TIMEOUT)
    start = _starts(how)[rank]
    parameters = {
        f"p{n}": torch.full((size,), start, device=device, requires_grad=True) for n, size in enumerate(sizes)
    }
    exchange: Exchange | Rounds
    if how == _ALL_REDUCE:
        exchange = Rounds(rank, 2, 1, OuterStep(), LinkAllReduce(links, control), lambda: parameters)
    else:
        transport = LinkTransport(links, control, how == _SHARED_MEMORY, pin_memory=device.type != "cpu")
        exchange = Exchange(rank, 2, Schedule("matching"), ElasticMixing(0.5), transport, lambda: parameters)
    streams: Any = torch.get_device_module(device)
    if device.type == "cuda":
        torch.cuda.synchronize()  # the parameters were made on another stream
    longest = 0.0
    try:
        with streams.stream(streams.Stream()) if side else nullcontext():
            if how == _ALL_REDUCE:  # a round without a drift: its start is where all stand now
                exchange.begin()
                exchange.end()
            for step in range(1, _STEPS + 1):
                _leave_writes_behind(device, parameters)
                _add(parameters, rank + 1)  # part of θ(t): what the snapshot must hold
                began = time.perf_counter()
                exchange.begin()
                longest = max(longest, time.perf_counter() - began if step > 1 else 0.0)
                _leave_writes_behind(device, parameters)
                _add(parameters, 2 * rank + 1)  # u(t): what it must not hold
                exchange.end()
        if device.type == "cuda":
            torch.cuda.synchronize()
        expected = _replay(_starts(how))[rank]
        return max(float((p.detach() - expected).abs().max()) for p in parameters.values()), longest
    finally:
        exchange.close()
        control.close(grace=2)


def _starts(how: str) -> list[float]:
    """Return where all elements of the two replicas begin; those of LocalSGD begin together."""
    return [0.0, 0.0] if how == _ALL_REDUCE else [0.0, 1.0]


def _replay(values: list[float]) -> list[float]:
    """Return what all elements of the two replicas are in the end: halves of small integers, exact in float32."""
    for _ in range(_STEPS):
        snapshots = [value + rank + 1 for rank, value in enumerate(values)]
        mean = sum(snapshots) / 2
        values = [mean + 2 * rank + 1 for rank in (0, 1)]
    return values


@torch.no_grad()
def _add(parameters: dict[str, Tensor], value: float) -> None:
    for p in parameters.values():
        p += value  # a kernel each


def _leave_writes_behind(device: torch.device, parameters: dict[str, Tensor]) -> None:
    """Free memory that the stream has still to write: whoever gets it next must not use it on another stream."""
    left = [torch.empty(sum(p.numel() for p in parameters.values()), device=device) for _ in range(3)]
    _keep_busy(device)
    for tensor in left:
        tensor.fill_(float("nan"))


def _keep_busy(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(int(_BUSY_SECONDS * _CYCLES_A_SECOND))
