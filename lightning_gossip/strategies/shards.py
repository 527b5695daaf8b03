"""Which rank starts which shards of a Downpour training, and where they listen."""

from __future__ import annotations

from datetime import timedelta

from lightning_gossip.parameter_server.process import ShardProcess, own_address, shares
from lightning_gossip.strategies.surviving import SurvivingStrategy


def start_shards(strategy: SurvivingStrategy, count: int, processes: list[ShardProcess]) -> list[str]:
    """Start this node's shards, and return the addresses of all, in their order; a collective.

    Args:
        strategy: of this rank.
        count: of shards.
        processes: where those are put that this rank has started.
    """
    host, seconds, store = host_of(strategy), strategy.timeout_seconds, None
    if strategy.survives and (environment := strategy.cluster_environment):
        seconds = max(seconds, strategy.lost_after.total_seconds())
        store = f"{environment.main_address}:{environment.main_port}"
    addresses: dict[int, str] = {}
    # who starts some may be lost
    while missing := [shard for shard in range(count) if shard not in addresses]:
        own = shares(missing, strategy.members, strategy.num_processes).get(strategy.global_rank, [])
        started = {shard: ShardProcess(host, timeout=timedelta(seconds=seconds), run_store=store) for shard in own}
        processes += started.values()
        listening = strategy.gather({shard: process.address for shard, process in started.items()})
        addresses |= {shard: address for some in listening for shard, address in some.items()}
    return [addresses[shard] for shard in range(count)]


def host_of(strategy: SurvivingStrategy) -> str:
    """Return the address under which all ranks reach this node; a collective.

    Node 0 goes by where the others are: there the name of the main address may stand for 127.0.1.1.
    """
    if strategy.num_nodes == 1 or strategy.cluster_environment is None:
        return "127.0.0.1"
    main = strategy.cluster_environment.main_address
    towards_main = "" if strategy.node_rank == 0 else own_address(main)
    others = filter(None, strategy.gather(towards_main))
    return towards_main or own_address(next(others, main))
