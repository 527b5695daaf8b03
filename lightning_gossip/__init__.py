"""PyTorch Lightning strategies for decentralised training: replicas that gossip, or talk to a parameter server."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_gossip.callbacks import GossipMonitor
from lightning_gossip.loggers import RankTensorBoardLogger
from lightning_gossip.schedule import WeightedPeers
from lightning_gossip.strategies import ElasticGossipStrategy, GossipStrategy

__version__ = "0.1.0"

__all__ = [
    "ElasticGossipStrategy",
    "GossipMonitor",
    "GossipStrategy",
    "RankTensorBoardLogger",
    "WeightedPeers",
    "__version__",
]

for _name, _strategy in (("gossip", GossipStrategy), ("elastic_gossip", ElasticGossipStrategy)):
    for _suffix, _start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
        StrategyRegistry.register(
            f"{_name}{_suffix}",
            _strategy,
            description=f"{_strategy.__name__} with `start_method` '{_start_method}'",
            override=True,
            start_method=_start_method,
        )
