"""That all ranks start from rank 0's values, however their tensors lie in memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.distributed import HashStore, PrefixStore

from lightning_gossip.exchange.models import rank_zeros, take
from lightning_gossip.transport.link import ProcessGroupGloo


@pytest.fixture
def gloo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give each thread a gloo group of its own, as the default one is its process'; return how one joins."""
    groups, store = threading.local(), HashStore()

    def join(rank: Rank) -> None:
        groups.own = ProcessGroupGloo(PrefixStore("gloo", store), rank.rank, rank.world_size, rank.control.timeout)

    def broadcast(tensor: Tensor, group: None, group_src: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = group_src, 0
        groups.own.broadcast([tensor], options).wait()

    def all_gather(tensors: list[Tensor], tensor: Tensor, group: None) -> None:
        groups.own.allgather([tensors], [tensor]).wait()

    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: groups.own.size())
    return join


DTYPES = (torch.int16, torch.uint16, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.complex64)


def test_every_rank_has_rank_zeros_values_and_nothing_else_changes(gloo: Any) -> None:
    def body(rank: Rank) -> list[Tensor]:
        gloo(rank)
        memory = torch.arange(24.0).view(4, 6) + 100 * rank.rank
        rows, columns = torch.arange(6.0).view(2, 3), torch.zeros(3, 2).t()
        images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(rank.rank))
        module = nn.Module()
        module.part = nn.Parameter(memory[:, 1:3])
        module.order = nn.Parameter(columns if rank.rank else rows)
        module.images = nn.Parameter(images.contiguous(memory_format=torch.channels_last))
        module.register_buffer("scalar", torch.tensor(rank.rank))
        module.register_buffer("empty", torch.empty(0))
        for dtype in DTYPES:
            module.register_buffer(f"of_{dtype}".replace(".", "_"), torch.full((3,), 1 - rank.rank, dtype=dtype))
        take(module, rank_zeros(module))
        around = torch.cat((memory[:, :1], memory[:, 3:]), dim=1) - 100 * rank.rank
        return [around, *(tensor.detach() for tensor in (*module.parameters(), *module.buffers()))]

    first, second = run_ranks(2, body)
    around, part, order = first[:3]
    assert around.tolist() == [[6.0 * row + column for column in (0, 3, 4, 5)] for row in range(4)]
    assert part.tolist() == [[1, 2], [7, 8], [13, 14], [19, 20]]
    assert order.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert all((buffer == 1).all() for buffer in first[-len(DTYPES) :])
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
