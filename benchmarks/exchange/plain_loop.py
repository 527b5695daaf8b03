"""Set-ups in a plain PyTorch loop: nothing, torch's DDP, and decent-dp, which needs one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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


class PlainDDPSetup(PlainSetup):
    """torch's ``DistributedDataParallel``."""

    def train(self, model: Model, data: Iterable[Batch], block: Block) -> None:
        """See :meth:`Setup.train`."""
        self.loop(DistributedDataParallel(model.network), model.configure_optimizers(), data, block)


class DecentSetup(PlainSetup):
    """decent-dp 0.2.3: one partner a step (its ``ring``), the transfer beside the next step's forward pass."""

    def train(self, model: Model, data: Iterable[Batch], block: Block) -> None:
        """See :meth:`Setup.train`."""
        from decent_dp.ddp import DecentralizedDataParallel

        make: Callable[..., torch.optim.Optimizer] = model.optimizer
        network = DecentralizedDataParallel(
            model.network, lambda named: make(parameter for _, parameter in named), topology="ring"
        )
        self.loop(network, None, data, block)
        network.global_avg(will_revert=False)  # waits for what is under way
        for group in network._topo._registry.values():
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
