"""torchft 0.2's LocalSGD and DiLoCo, in a plain loop: each rank is a replica group of its own.

Optional (``pip install torchft==0.2.0``): where it is not installed, these set-ups are left out.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterable
from contextlib import closing
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.shared.plain_loop import PlainSetup
from benchmarks.shared.side_by_side import Block, Plan
from benchmarks.shared.workloads import Batch, Model

MISSING = "torchft is not installed (pip install torchft==0.2.0)"

OUTER: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
"""Of torch's SGD in the outer step."""


def is_installed() -> bool:
    return importlib.util.find_spec("torchft") is not None


class TorchftSetup(PlainSetup):
    """LocalSGD or DiLoCo with torchft's manager and its gloo.

    Args:
        name, reference: see :class:`~benchmarks.shared.side_by_side.Setup`.
        period: steps from one round of a parameter to its next.
        steps: counted, a block: a multiple of the period.
        timeout: of every wait.
        fragments: of DiLoCo, by layers; 0 for LocalSGD.
        delay: steps from sending a fragment to applying it, less than ``period / fragments``.
    """

    def __init__(
        self,
        name: str,
        reference: str,
        period: int,
        steps: int,
        timeout: timedelta,
        fragments: int = 0,
        delay: int = 0,
    ) -> None:
        super().__init__(name, reference)
        self.period, self.steps, self.timeout = period, steps, timeout
        self.fragments, self.delay = fragments, delay

    def plan(self, plan: Plan) -> Plan:
        """See :meth:`~benchmarks.shared.side_by_side.Setup.plan`."""
        return Plan(self.steps, 2 * self.period, plan.cool_down, plan.seed, plan.timeout)

    def train(self, model: Model, data: Iterable[Batch], block: Block) -> None:
        """See :meth:`~benchmarks.shared.side_by_side.Setup.train`."""
        from torchft._torchft import LighthouseServer
        from torchft.local_sgd import DiLoCo, LocalSGD
        from torchft.manager import Manager
        from torchft.process_group import ProcessGroupGloo

        rank, ranks, own = dist.get_rank(), dist.get_world_size(), own_address()
        lighthouse = LighthouseServer("0.0.0.0:0", ranks, join_timeout_ms=1000) if rank == 0 else None
        port = [lighthouse.address().rpartition(":")[2] if lighthouse is not None else ""]
        dist.broadcast_object_list(port)
        store = dist.TCPStore(own, 0, is_master=True, wait_for_workers=False)
        manager = Manager(
            ProcessGroupGloo(timeout=self.timeout),
            load_state_dict=lambda state: None,
            state_dict=dict,
            min_replica_size=ranks,
            use_async_quorum=False,
            timeout=self.timeout,
            quorum_timeout=self.timeout,
            rank=0,
            world_size=1,
            store_addr=own,
            store_port=store.port,
            lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{port[0]}",
            replica_id=f"replica_{rank}",
            hostname=own,
            init_sync=False,  # all ranks begin with one model
        )
        optimizer = model.configure_optimizers()
        scheme: Any
        if self.fragments:
            parts = by_layers(model.network, self.fragments)
            outer = [torch.optim.SGD(part.parameters(), **OUTER) for part in parts]
            scheme = DiLoCo(manager, parts, optimizer, outer, self.period, fragment_sync_delay=self.delay)
        else:
            scheme = LocalSGD(manager, model.network, optimizer, self.period)
        with closing(_Shutdown(manager)):
            with scheme:
                self.loop(model.network, optimizer, data, block)
            dist.barrier()
        if lighthouse is not None:
            lighthouse.shutdown()


class _Shutdown:
    def __init__(self, manager: Any) -> None:
        self.close = manager.shutdown


def own_address() -> str:
    """Return this rank's address on the interface that reaches rank 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))
        return str(probe.getsockname()[0])


def by_layers(network: nn.Module, fragments: int) -> list[nn.Module]:
    """Return the children that have parameters, dealt to ``fragments`` modules in turn.

    Raises:
        ValueError: if there are fewer such children.
    """
    layers = [layer for layer in network.children() if any(True for _ in layer.parameters())]
    if len(layers) < fragments:
        raise ValueError(f"`fragments` must be at most {len(layers)}, the layers of this network, got {fragments}")
    return [nn.ModuleList(layers[place::fragments]) for place in range(fragments)]
