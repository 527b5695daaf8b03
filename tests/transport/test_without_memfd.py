"""Where a process can not have shared memory, its exchanges go over links, and nothing else changes."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Linear, fit
from ranks import Rank, Script, run_ranks
from torch import nn

from lightning_gossip import ElasticGossipStrategy
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport import shared_memory


class Without(Linear):
    """Has no `memfd_create` on some ranks, as in a sandbox."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = ranks

    def on_fit_start(self) -> None:
        def refuse(*_: Any) -> int:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        if self.global_rank in self.ranks:
            os.memfd_create = refuse  # type: ignore[assignment]


@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)], ids=str)
def test_a_fit_without_memfd_on_some_ranks(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    def train(module: Linear) -> list[dict[str, Any]]:
        torch.manual_seed(1)
        module.load_state_dict({"layer.weight": torch.ones(1, 3), "layer.bias": torch.zeros(1)})
        return fit(tmp_path, module, ElasticGossipStrategy(start_method="fork"), max_epochs=2)

    for ours, theirs in zip(train(Without(ranks)), train(Linear()), strict=True):
        assert ours["step"] == theirs["step"] == 12
        assert all(torch.equal(ours["state"][name], value) for name, value in theirs["state"].items())


FAULTS = {
    "no memfd_create": ("memfd_create", OSError(errno.ENOSYS, "Function not implemented")),
    "forbidden": ("memfd_create", PermissionError(errno.EPERM, "Operation not permitted")),
    "too many files": ("memfd_create", OSError(errno.EMFILE, "Too many open files")),
    "no room": ("ftruncate", OSError(errno.ENOSPC, "No space left on device")),
    "no memory": ("mmap", OSError(errno.ENOMEM, "Cannot allocate memory")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ranks", [(0, 1, 2), (1,)], ids=str)
def test_whatever_is_refused_and_on_whom(monkeypatch: pytest.MonkeyPatch, fault: str, ranks: tuple[int, ...]) -> None:
    """Three ranks exchange in pairs; those with shared memory read it, the others get their snapshots all the same."""
    function, error = FAULTS[fault]
    module: Any = mmap if function == "mmap" else os
    original, refused = getattr(module, function), threading.local()

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if getattr(refused, "now", False):
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, sometimes)
    schedule = Schedule(Script({1: (0, 1), 2: (1, 2), 3: (0, 2), 4: (0, 1)}))

    def body(rank: Rank) -> tuple[float, bool]:
        refused.now = rank.rank in ranks
        parameter = nn.Parameter(torch.full((4,), float(rank.rank)))
        exchange = rank.exchange(schedule, ElasticMixing(0.5), {"theta": parameter}, shared_memory=True)
        for _ in range(4):
            exchange.begin()
            exchange.end()
        return parameter[0].item(), exchange._transport._outbox is not None  # type: ignore[attr-defined]

    results = run_ranks(3, body)
    expected = torch.tensor([0.0, 1.0, 2.0])
    for a, b in ((0, 1), (1, 2), (0, 2), (0, 1)):
        expected[[a, b]] = expected[[a, b]].mean()
    assert [value for value, _ in results] == expected.tolist()
    assert [has for _, has in results] == [rank not in ranks for rank in range(3)]


def test_a_reader_that_can_not_map_what_it_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = shared_memory.Outbox(100, 2)

    def refuse(*_: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert shared_memory.Inbox.open(outbox.address, 2) is None
