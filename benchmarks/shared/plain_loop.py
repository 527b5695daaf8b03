"""Set-ups in a plain PyTorch loop, for what can not run under Lightning: this one trains a replica that never talks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn

from benchmarks.shared.side_by_side import Block, Setup
from benchmarks.shared.workloads import Batch, Model, loss


class PlainSetup(Setup):
    """A replica that never talks."""

    def __init__(self, name: str, reference: str | None = None) -> None:
        super().__init__(name, name if reference is None else reference)

    def train(self, model: Model, data: Iterable[Batch], block: Block) -> None:
        """See :meth:`Setup.train`."""
        self.loop(model.network, model.configure_optimizers(), data, block)

    def loop(
        self, network: nn.Module, optimizer: torch.optim.Optimizer | None, data: Iterable[Batch], block: Block
    ) -> None:
        """Train; ``optimizer`` is None where the network's wrapper steps by itself."""
        block.start()
        for inputs, labels in islice(data, block.plan.total):
            value = loss(network(inputs), labels)
            if optimizer is not None:
                optimizer.zero_grad()
            value.backward()
            if optimizer is not None:
                optimizer.step()
            block.tick()
