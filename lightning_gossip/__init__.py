"""PyTorch Lightning strategies for decentralised training: replicas that gossip, or talk to a parameter server."""

import sys

__version__ = "0.1.0"

__all__ = [
    "DownpourStrategy",
    "ElasticGossipStrategy",
    "GossipMonitor",
    "GossipStrategy",
    "RankTensorBoardLogger",
    "WeightedPeers",
    "__version__",
]

# a parameter server's process (`python -m lightning_gossip.parameter_server`) imports this package too, and has no use
# for Lightning, which takes seconds and some hundred MB
if "lightning_gossip.parameter_server" not in sys.orig_argv:
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_gossip.monitoring.loggers import RankTensorBoardLogger
    from lightning_gossip.monitoring.monitor import GossipMonitor
    from lightning_gossip.rules.schedule import WeightedPeers
    from lightning_gossip.strategies.downpour import DownpourStrategy
    from lightning_gossip.strategies.elastic_gossip import ElasticGossipStrategy
    from lightning_gossip.strategies.gossip import GossipStrategy

    for _name, _strategy in (
        ("gossip", GossipStrategy),
        ("elastic_gossip", ElasticGossipStrategy),
        ("downpour", DownpourStrategy),
    ):
        for _suffix, _start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            StrategyRegistry.register(
                f"{_name}{_suffix}",
                _strategy,
                description=f"{_strategy.__name__} with `start_method` '{_start_method}'",
                override=True,
                start_method=_start_method,
            )
