"""The consensus model of Downpour SGD: what the server holds (design §1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_gossip.consensus import Consensus, squares_to
from lightning_gossip.flat import FlatBuffer
from lightning_gossip.parameter_server.client import DownpourClient


class ServerConsensus(Consensus):
    """The server's parameters, with the mean of the workers' floating-point buffers.

    All that was sent is on the server when rank 0 asks for its parameters, once for all ranks. What the server does not
    hold (frozen parameters) and buffers without a mean are rank 0's. Where no training is under way on the server, it
    is the mean of the replicas, as under gossip.

    Args:
        module: this worker's replica.
        rank: of this worker.
        world_size: number of workers.
        client: returns this worker's client while its training is under way, else None; on all ranks alike.
        meet: waits for all ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: int,
        world_size: int,
        client: Callable[[], DownpourClient | None],
        meet: Callable[[str], None],
    ) -> None:
        super().__init__(module, world_size)
        self._rank = rank
        self._client = client
        self._meet = meet

    @override
    def _build(self, parameters: FlatBuffer) -> Tensor:
        client = self._client()
        if client is None:
            return super()._build(parameters)
        replica = {name: p.data for name, p in self._module.named_parameters()}
        client.drain()
        self._meet("all pushes are on the server")
        if self._rank == 0:
            client.pull_now(replica)
        server = FlatBuffer.empty(parameters.layout, parameters.storage.device)
        server.pack(replica)
        self._meet("the server's parameters are here")  # so that nobody waits in a collective for a shard
        squares = torch.zeros(2, dtype=torch.float64)
        for own, consensus in zip(parameters.segments, server.segments, strict=True):
            if self._world_size > 1:
                dist.broadcast(consensus.view(torch.uint8), src=0)
            squares += squares_to(own, consensus)
            own.copy_(consensus)
        return squares
