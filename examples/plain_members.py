"""Elastic gossip in a plain PyTorch loop whose ranks may die and come back, without Lightning:

    lightning-gossip store --port 29500 &                              # on a machine that stays
    for rank in 0 1 2; do python examples/plain_members.py --rank $rank & done; wait

Kill any of the ranks: the others go on. Start it again with the same arguments, and it joins them as one of them is.
"""

from __future__ import annotations

import argparse

import torch
from plain_loop import accuracy, blobs
from torch import nn
from torch.distributed import TCPStore

from lightning_gossip import Gossip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--min-replicas", type=int, default=1, help="end where fewer are left")
    parser.add_argument("--store", default="127.0.0.1:29500", help="where it is, default: %(default)s")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--until", type=int, default=0, help="go on past that until so many ranks are there")
    parser.add_argument("--period", type=int, default=4)
    parser.add_argument("--asynchronous", action="store_true", help="at each rank's own pace: nobody waits")
    args = parser.parse_args()

    host, port = args.store.split(":")
    store = TCPStore(host, int(port))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data, test = blobs(512, seed=1), blobs(512, seed=2)
    who = {"store": store, "rank": args.rank, "world_size": args.ranks, "min_replicas": args.min_replicas}
    how = {"period": args.period, "asynchronous": args.asynchronous, "on_heal": optimizer.state.clear}

    with Gossip(model, alpha=0.5, **how, **who, state=optimizer.state_dict) as gossip:
        if gossip.given is not None:  # this process joins the others, in the place of one that they have lost
            optimizer.load_state_dict(gossip.given)
            print(f"rank {args.rank} joins at step {gossip.steps}", flush=True)
        while gossip.steps < args.steps or len(gossip.members) < args.until:
            draw = torch.Generator().manual_seed(gossip.steps * args.ranks + args.rank)  # each its own, at every step
            rows = torch.randint(len(data), (16,), generator=draw)
            x, y = data[rows]
            with gossip.step():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            if gossip.steps % 40 == 0:
                with gossip.consensus() as distance:
                    if gossip.members[0] == args.rank:  # of those that are there
                        there = f"ranks {', '.join(map(str, gossip.members))}"
                        told = f"accuracy {accuracy(model, test):.3f}, distance {distance:.4f}"
                        print(f"step {gossip.steps}: {told}, {there}", flush=True)
        gossip.adopt_consensus()
    print(f"rank {args.rank}: the consensus model's accuracy is {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
