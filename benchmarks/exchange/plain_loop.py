"""Set-ups in a plain PyTorch loop: torch's DDP, and decent-dp, which needs one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.shared.plain_loop import PlainSetup
from benchmarks.shared.side_by_side import Block
from benchmarks.shared.workloads import Batch, Model


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
