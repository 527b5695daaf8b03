"""The one helper that starts shards inside the test's process."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from ranks import Rank
from torch.distributed import HashStore, Store

from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.server import ShardServer
from lightning_gossip.parameter_server.shard import Shard
from lightning_gossip.transport.link import gloo_device


@dataclass
class Shards:
    """Shards in threads of this process; a context manager."""

    count: int
    timeout: timedelta = timedelta(seconds=20)
    servers: list[ShardServer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stores = {f"shard:{number + 1}": HashStore() for number in range(self.count)}
        self.addresses = tuple(self._stores)
        for address, store in self._stores.items():
            self.servers.append(ShardServer(store, partial(_itself, store), gloo_device(), self.timeout, address))

    def connect(self, address: str, timeout: timedelta) -> Store:
        return self._stores[address]

    def client(self, rank: Rank, **kwargs: Any) -> DownpourClient:
        return DownpourClient(self.addresses, rank.control, connect=self.connect, **kwargs)

    def shard(self, number: int = 0) -> Shard:
        shard = self.servers[number].roster.shard
        assert shard is not None
        return shard

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self.servers:
            server.close()


def _itself(store: Store) -> Store:
    return store
