"""Lightning Fabric: a strategy that launches ranks with a replica each, for :class:`~lightning_gossip.Gossip`.

::

    fabric = Fabric(accelerator="cpu", devices=4, strategy=ReplicaFabricStrategy())
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)
    with Gossip(model, alpha=0.5, period=8) as gossip:
        for batch in fabric.setup_dataloaders(loader):
            with gossip.step():
                optimizer.zero_grad()
                fabric.backward(loss(model, batch))
                optimizer.step()
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_gossip.arguments import check_choice
from lightning_gossip.strategies.lightning_names import FabricDDPStrategy


class ReplicaFabricStrategy(FabricDDPStrategy):
    """Fabric's DDP strategy without DDP: its launch, devices, samplers and collectives, and a replica on each rank.

    Modules are not wrapped, and gradients stay with their rank. ``fabric.save`` writes rank 0's replica: save the
    consensus model with it, in ``with gossip.consensus():``, and replicas by ``torch.save``, a file a rank.

    Args:
        launch: of Fabric's ``DDPStrategy``: ``accelerator``, ``parallel_devices``, ``cluster_environment``,
            ``checkpoint_io``, ``precision``, ``process_group_backend``, ``timeout``, ``start_method``.

    Raises:
        TypeError: for another argument, such as one of torch's DDP.
    """

    def __init__(self, **launch: Any) -> None:
        for name in launch:
            check_choice("an argument of ReplicaFabricStrategy", name, _LAUNCH)
        super().__init__(**launch)
        self._backward_sync_control = _NothingToSync()  # type: ignore[assignment]

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Return the module as it is."""
        return module


_LAUNCH = (
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision",
    "process_group_backend",
    "timeout",
    "start_method",
)


class _NothingToSync:
    """Lets ``fabric.no_backward_sync`` go by: no backward pass syncs."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager:
        return nullcontext()
