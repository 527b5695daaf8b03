"""The consensus model of Downpour SGD: what the server holds (design §1)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_gossip.exchange.consensus import Consensus, squares_to
from lightning_gossip.exchange.flat import FlatBuffer
from lightning_gossip.exchange.models import group_rank, group_size, shared_parameters


class Server(Protocol):
    """Where the server's parameters come from: a :class:`DownpourClient`, or :class:`KeptParameters`."""

    @property
    def names(self) -> Collection[str]:
        """Of the parameters that the server holds; the same on all ranks."""

    def drain(self) -> None:
        """Wait until what this worker sent is on the server."""

    def pull_now(self, into: Mapping[str, Tensor]) -> None:
        """Copy the server's parameters into tensors of their names."""


class KeptParameters:
    """What the server held at the end of a training.

    Args:
        names: of its parameters.
        parameters: by name, where they are to be pulled.
    """

    def __init__(self, names: Collection[str], parameters: Mapping[str, Tensor]) -> None:
        self.names = names
        self._parameters = parameters

    def drain(self) -> None:
        """Nothing is under way."""

    def pull_now(self, into: Mapping[str, Tensor]) -> None:
        """See :meth:`Server.pull_now`."""
        for name in self.names:
            into[name].copy_(self._parameters[name])


class ServerConsensus(Consensus):
    """The server's parameters, with buffers as under gossip.

    All that was sent is on the server when rank 0 asks for its parameters, once for all ranks. What the server does not
    hold, such as a momentum encoder's parameters, is averaged. Where there is no server, or where some worker has put
    something else in place of its replica, such as an average of its own, it is the mean of what is there, as under
    gossip.

    Args:
        module: this worker's replica.
        server: returns what knows the server's parameters, or None where nothing does; on all ranks alike.
        meet: waits for all ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        server: Callable[[], Server | None],
        meet: Callable[[str], None],
    ) -> None:
        super().__init__(module)
        self._server = server
        self._meet = meet
        self._noted: dict[str, Tensor] = {}
        self._pulled: dict[str, Tensor] = {}

    @override
    def prepare(self) -> None:
        """Pull the server's parameters on rank 0, so that nobody waits in a collective for a shard."""
        self._pulled = {}
        if (server := self._server()) is not None:
            server.drain()
            self._meet("all pushes are on the server")
            if group_rank() == 0:
                self._pulled = self._pull(server)

    def _pull(self, server: Server) -> dict[str, Tensor]:
        values = {name: p.data.clone() for name, p in self._module.named_parameters() if name in server.names}
        server.pull_now(values)
        return values

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
        views = parameters.views
        # where rank 0 was lost after it had pulled, another is rank 0 now
        values = views if group_rank() else self._pulled or self._pull(server)
        names = [name for name in views if name in server.names]
        own, held = (FlatBuffer.packed({name: tensors[name] for name in names}) for tensors in (views, values))
        squares = torch.zeros(2, dtype=torch.float64)
        for replica, consensus in zip(own.segments, held.segments, strict=True):
            if group_size() > 1:
                dist.broadcast(consensus.view(torch.uint8), src=0)
            squares += squares_to(replica, consensus)
        held.copy_to({name: views[name] for name in names})
        rest = {name: view for name, view in views.items() if name not in server.names}
        averaged = FlatBuffer.packed(rest)
        squares += super()._build(averaged)
        averaged.copy_to(rest)
        return squares
