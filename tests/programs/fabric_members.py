"""A loop of Fabric that loses a rank: `fabric_members.py FOLDER RANK` trains on three, of which RANK kills itself."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_gossip import Gossip, ReplicaFabricStrategy


def main() -> None:
    folder, doomed = Path(sys.argv[1]), int(sys.argv[2])
    fabric = Fabric(accelerator="cpu", devices=3, strategy=ReplicaFabricStrategy(survives=True))
    fabric.launch()
    network = nn.Linear(4, 2)
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(fabric.global_rank))
    with Gossip(model, min_replicas=2) as gossip:
        for _ in range(60):
            with gossip.step():
                if fabric.global_rank == doomed and gossip.steps == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                optimizer.zero_grad()
                fabric.backward(model(x).square().mean())
                optimizer.step()
            if gossip.steps % 15 == 0:
                with gossip.consensus():
                    pass
        gossip.adopt_consensus()
    result = {"members": gossip.members, "steps": gossip.steps, "weight": network.weight.tolist()}
    (folder / f"result_{fabric.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
