"""Two exchanges of 12 MB between two processes; prints who takes part at the end, and how long each exchange took."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
from torch import nn
from torch.distributed import PrefixStore, TCPStore

from lightning_gossip.control.member_control import MemberControl, Survival
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.link import Links
from lightning_gossip.transport.link_transport import LinkTransport


def main(rank: int, host: str, port: int) -> None:
    store = TCPStore(host, port, None, rank == 0, timedelta(seconds=60), wait_for_workers=False)
    step = 0
    control = MemberControl(
        lambda: PrefixStore("run", store.clone()),
        rank,
        2,
        timedelta(seconds=60),
        Survival(lost_after=timedelta(seconds=5)),
        clock=lambda: step,
    )
    links = Links(store.clone(), f"rank{rank}", timedelta(seconds=60))
    parameter = nn.Parameter(torch.full((3_000_000,), float(rank)))
    exchange = Exchange(
        rank,
        2,
        Schedule("matching"),
        ElasticMixing(0.5),
        LinkTransport(links, control, shared_memory=False),
        lambda: {"parameter": parameter},
        members=control.members_at,
    )
    control.begin(60)
    seconds = []
    for step in (1, 2):  # noqa: B007 - the clock
        start = time.monotonic()
        exchange.begin()
        exchange.end()
        seconds.append(time.monotonic() - start)
    control.meet("the end")
    print(json.dumps({"members": control.members, "seconds": seconds, "value": float(parameter.mean())}), flush=True)
    exchange.close()
    control.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
