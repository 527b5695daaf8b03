"""PyTorch Lightning strategies for decentralised training: replicas that gossip, or talk to a parameter server.

A process imports what it needs: the public names are looked up when they are first used, and the strategies' names are
registered with Lightning when *it* is imported, before or after this package. So a parameter server's shard, the run's
store or ``lightning-gossip --help`` start without Lightning, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_gossip.strategies.lightning_family import use_lightning
from lightning_gossip.strategies.registration import STRATEGIES, register_with_lightning

if TYPE_CHECKING:
    from lightning_gossip.exchange.plain import Gossip
    from lightning_gossip.monitoring.loggers import RankTensorBoardLogger
    from lightning_gossip.monitoring.monitor import GossipMonitor
    from lightning_gossip.rules.schedule import WeightedPeers
    from lightning_gossip.strategies.diloco import DiLoCoStrategy
    from lightning_gossip.strategies.downpour import DownpourStrategy
    from lightning_gossip.strategies.elastic_gossip import ElasticGossipStrategy
    from lightning_gossip.strategies.fabric import ReplicaFabricStrategy
    from lightning_gossip.strategies.gossip import GossipStrategy
    from lightning_gossip.strategies.local_sgd import LocalSGDStrategy

__version__ = "0.2.0"

__all__ = [
    "DiLoCoStrategy",
    "DownpourStrategy",
    "ElasticGossipStrategy",
    "Gossip",
    "GossipMonitor",
    "GossipStrategy",
    "LocalSGDStrategy",
    "RankTensorBoardLogger",
    "ReplicaFabricStrategy",
    "WeightedPeers",
    "__version__",
    "use_lightning",
]

_HOMES = {
    "Gossip": "exchange.plain",
    "GossipMonitor": "monitoring.monitor",
    "RankTensorBoardLogger": "monitoring.loggers",
    "ReplicaFabricStrategy": "strategies.fabric",
    "WeightedPeers": "rules.schedule",
} | {class_name: f"strategies.{name}" for name, class_name in STRATEGIES.items()}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next look-up finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_lightning()
