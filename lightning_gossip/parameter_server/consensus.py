"""The consensus model of Downpour SGD: what the server holds (design §1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_gossip.exchange.consensus import Consensus, squares_to
from lightning_gossip.exchange.flat import FlatBuffer
from lightning_gossip.exchange.models import shared_parameters


class Server(Protocol):
    """Where the server's parameters come from: a :class:`DownpourClient`, or :class:`KeptParameters`."""

    def drain(self) -> None:
        """Wait until what this worker sent is on the server."""

    def pull_now(self, into: Mapping[str, Tensor]) -> None:
        """Copy the server's parameters into tensors of their names."""


class KeptParameters:
    """What the server held at the end of a training.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def drain(self) -> None:
        """Nothing is under way."""

    def pull_now(self, into: Mapping[str, Tensor]) -> None:
        """See :meth:`Server.pull_now`."""
        for name, value in self._parameters.items():
            into[name].copy_(value)


class ServerConsensus(Consensus):
    """The server's parameters, with buffers as under gossip.

    All that was sent is on the server when rank 0 asks for its parameters, once for all ranks. What the server does not
    hold (frozen parameters that differ) is rank 0's. Where there is no server, or where some worker has put something
    else in place of its replica, such as an average of its own, it is the mean of what is there, as under gossip.

    Args:
        module: this worker's replica.
        rank: of this worker.
        world_size: number of workers.
        server: returns what knows the server's parameters, or None where nothing does; on all ranks alike.
        meet: waits for all ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: int,
        world_size: int,
        server: Callable[[], Server | None],
        meet: Callable[[str], None],
    ) -> None:
        super().__init__(module, world_size)
        self._rank = rank
        self._server = server
        self._meet = meet
        self._noted: dict[str, Tensor] = {}

    @override
    def note(self) -> None:
        self._noted = {
            name: p.detach().clone() for name, p in shared_parameters(self._module).items() if p.requires_grad
        }

    @override
    def _flag(self) -> bool:
        """Return whether others have replaced what :meth:`note` saw."""
        noted, self._noted = self._noted, {}
        parameters = shared_parameters(self._module)
        return any(name not in parameters or not torch.equal(p, parameters[name]) for name, p in noted.items())

    @override
    def _build(self, parameters: FlatBuffer) -> Tensor:
        server = self._server()
        if server is None or self._flagged:
            return super()._build(parameters)
        replica = {name: p.data for name, p in shared_parameters(self._module).items()}
        server.drain()
        self._meet("all pushes are on the server")
        if self._rank == 0:
            server.pull_now(replica)
        held = FlatBuffer.empty(parameters.layout, parameters.storage.device)
        held.pack(replica)
        self._meet("the server's parameters are here")  # so that nobody waits in a collective for a shard
        squares = torch.zeros(2, dtype=torch.float64)
        for own, consensus in zip(parameters.segments, held.segments, strict=True):
            if self._world_size > 1:
                dist.broadcast(consensus.view(torch.uint8), src=0)
            squares += squares_to(own, consensus)
            own.copy_(consensus)
        return squares
