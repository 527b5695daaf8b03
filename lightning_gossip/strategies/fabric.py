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

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_gossip.arguments import check_choice
from lightning_gossip.strategies.launchers import ReplicaSubprocessLauncher
from lightning_gossip.strategies.lightning_names import FabricDDPStrategy
from lightning_gossip.strategies.meeting import TIMEOUT


class ReplicaFabricStrategy(FabricDDPStrategy):
    """Fabric's DDP strategy without DDP: its launch, devices, samplers and collectives, and a replica on each rank.

    Modules are not wrapped, and gradients stay with their rank. ``fabric.save`` writes rank 0's replica: save the
    consensus model with it, in ``with gossip.consensus():``, and replicas by ``torch.save``, a file a rank.

    With ``survives=True`` the ranks of a :class:`~lightning_gossip.Gossip` with ``min_replicas`` go on without one that
    is lost, the launching process included: Fabric's own launcher would end them all. Fabric's collectives
    (``barrier``, ``broadcast``, ``all_gather``, ``all_reduce``) still need every rank: after a loss use those of the
    ``Gossip``. Nobody joins such a run, for Fabric's process group takes in nobody: where ranks are to come back, start
    them without Fabric's launch and give the ``Gossip`` a ``store``.

    Args:
        survives: whether ranks go on where the launching process, or another, is lost; with ``start_method="popen"``,
            which is the default. The run's store then stands in a process of its own.
        launch: of Fabric's ``DDPStrategy``: ``accelerator``, ``parallel_devices``, ``cluster_environment``,
            ``checkpoint_io``, ``precision``, ``process_group_backend``, ``timeout``, ``start_method``.

    Raises:
        ValueError: for another argument, such as one of torch's DDP, or one that is not allowed.
    """

    def __init__(self, survives: bool = False, **launch: Any) -> None:
        for name in launch:
            check_choice("an argument of ReplicaFabricStrategy", name, _LAUNCH)
        self.survives = check_choice("survives", survives, (True, False))
        if survives and (method := launch.get("start_method", "popen")) != "popen":
            raise ValueError(f"`start_method` must be 'popen' with `survives=True`, got {method!r}")
        super().__init__(**launch)
        self._backward_sync_control = _NothingToSync()  # type: ignore[assignment]

    @override
    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        if not self.survives or environment is None:
            super()._configure_launcher()
            return
        os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")  # torch looks for it where a rank holds no store
        self._launcher = ReplicaSubprocessLauncher(
            environment,
            self.num_processes,
            self.num_nodes,
            report=lambda rank, how: True,  # the others see it for themselves
            timeout=(self._timeout or TIMEOUT).total_seconds(),
            survives=True,
        )

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
