"""The Lightning strategies: one file a strategy, over the shared base."""

from lightning_gossip.strategies.downpour import DownpourStrategy
from lightning_gossip.strategies.elastic_gossip import ElasticGossipStrategy
from lightning_gossip.strategies.gossip import GossipStrategy

__all__ = ["DownpourStrategy", "ElasticGossipStrategy", "GossipStrategy"]
