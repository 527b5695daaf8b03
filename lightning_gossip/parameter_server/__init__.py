"""Downpour's parameter server and its client, without Lightning (Dean et al. 2012, §4.1; design §3, §7)."""

from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.process import ShardProcess
from lightning_gossip.parameter_server.shard_links import ShardLost, check_addresses
from lightning_gossip.parameter_server.traffic import Answered, DownpourStats

__all__ = ["Answered", "DownpourClient", "DownpourStats", "ShardLost", "ShardProcess", "check_addresses"]
