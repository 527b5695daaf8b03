"""One rank of ``python -m benchmarks.faults.storm --schemes torchft``: torchft 0.2's LocalSGD in a plain loop.

Each rank is a replica group of its own, with a store of its own; ``--lighthouse`` is the server at which they meet.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.faults.storm_rank import BATCH, Diary, data_of, make_layers, make_optimizer, make_rank_parser
from benchmarks.faults.storm_schemes import LOST_AFTER
from benchmarks.network.torchft_loop import own_address

PERIOD = 8
TIMEOUT = timedelta(seconds=LOST_AFTER)
"""Of a round; whoever is lost holds the others up for it."""


def serve(port: int) -> None:
    """Be the lighthouse."""
    from torchft._torchft import LighthouseServer

    lighthouse = LighthouseServer(
        f"0.0.0.0:{port}", 1, join_timeout_ms=1000, heartbeat_timeout_ms=int(1000 * LOST_AFTER)
    )
    with suppress(KeyboardInterrupt):
        signal.pause()
    lighthouse.shutdown()


def train(args: Any, rank: int) -> None:
    """Train until the process is ended."""
    from torchft.local_sgd import LocalSGD
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    torch.manual_seed(1)
    layers = make_layers()
    optimizer = make_optimizer(layers)
    address = own_address()
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)

    def state() -> dict[str, Any]:
        return {"layers": layers.state_dict(), "optimizer": optimizer.state_dict()}

    def load(state: dict[str, Any]) -> None:
        layers.load_state_dict(state["layers"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=1,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=timedelta(seconds=60),
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        replica_id=f"replica_{rank}",
        hostname=address,
    )
    diary = Diary(args.folder, rank, args.pace)
    generator = torch.Generator().manual_seed(1000 * os.getpid() + rank)
    loader = DataLoader(data_of(args.ranks), BATCH, shuffle=True, generator=generator)
    number = 0
    with LocalSGD(manager, layers, optimizer, PERIOD):
        while True:
            for inputs, targets in loader:
                diary.begin()
                number += 1
                optimizer.zero_grad()
                nn.functional.mse_loss(layers(inputs), targets).backward()
                optimizer.step()
                diary.end(number, layers)


def main() -> None:
    parser = make_rank_parser(__spec__, __doc__)
    parser.add_argument("--lighthouse", type=int, help="be that server, at this port")
    args = parser.parse_args()
    if args.lighthouse:
        serve(args.lighthouse)
    else:
        train(args, int(os.environ["LOCAL_RANK"]))


if __name__ == "__main__":
    main()
