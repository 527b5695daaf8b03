"""Elastic gossip in a loop of Lightning Fabric, which launches the ranks:

    python examples/fabric_loop.py --devices 4 --epochs 5

and, to go on with it: `--epochs 10 --resume`. At the end stand the consensus model's test accuracy and its distance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.fabric import Fabric
from plain_loop import accuracy, blobs
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_gossip import Gossip, ReplicaFabricStrategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--period", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/fabric_loop"))
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=args.devices, strategy=ReplicaFabricStrategy())
    fabric.launch()
    fabric.seed_everything(1)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9))
    data, test = blobs(512, seed=1), blobs(512, seed=2)
    sampler: DistributedSampler = DistributedSampler(data, fabric.world_size, fabric.global_rank)
    loader = DataLoader(data, 16, sampler=sampler)  # Fabric's own would count epochs anew in a training that goes on
    file = args.folder / f"rank_{fabric.global_rank}.pt"

    with Gossip(model, alpha=0.5, period=args.period) as gossip:
        first = 0
        if args.resume:
            saved = torch.load(file)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            gossip.load_state_dict(saved["gossip"])
            first = saved["epoch"]
        for epoch in range(first, args.epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                x, y = fabric.to_device(batch)
                with gossip.step():  # what is sent and received in a round travels beside this
                    optimizer.zero_grad()
                    fabric.backward(nn.functional.cross_entropy(model(x), y))
                    optimizer.step()
            with gossip.consensus() as distance:  # the mean of the replicas, for a moment
                fabric.print(f"epoch {epoch + 1}: accuracy {accuracy(model, test):.3f}, distance {distance:.4f}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "gossip": gossip.state_dict()}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"epoch": args.epochs}, file)
        gossip.adopt_consensus()
    fabric.print(f"consensus model: accuracy {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
