"""Elastic gossip in a plain PyTorch loop, without Lightning:

    torchrun --nproc-per-node 4 examples/plain_loop.py --epochs 5

and, to go on with it: `--epochs 10 --resume`. At the end stand the consensus model's test accuracy and its distance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_gossip import Gossip


def blobs(rows: int, seed: int) -> TensorDataset:
    """Two classes, told apart by the sum of eight features."""
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean()
    model.train()
    return float(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--period", type=int, default=4)
    parser.add_argument("--asynchronous", action="store_true", help="at each rank's own pace: nobody waits")
    parser.add_argument("--folder", type=Path, default=Path("runs/plain_loop"))
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(1)
    file = args.folder / f"rank_{dist.get_rank()}.pt"
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data, test = blobs(512, seed=1), blobs(512, seed=2)
    sampler: DistributedSampler = DistributedSampler(data)
    loader = DataLoader(data, 16, sampler=sampler)

    with Gossip(model, alpha=0.5, period=args.period, asynchronous=args.asynchronous) as gossip:
        first = 0
        if args.resume:
            saved = torch.load(file)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            gossip.load_state_dict(saved["gossip"])
            first = saved["epoch"]
        for epoch in range(first, args.epochs):
            sampler.set_epoch(epoch)
            for x, y in loader:
                with gossip.step():  # what is sent and received in a round travels beside this
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
            with gossip.consensus() as distance:  # the mean of the replicas, for a moment
                if dist.get_rank() == 0:
                    print(f"epoch {epoch + 1}: accuracy {accuracy(model, test):.3f}, distance {distance:.4f}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "gossip": gossip.state_dict()}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"epoch": args.epochs}, file)
        gossip.adopt_consensus()
    if dist.get_rank() == 0:
        print(f"consensus model: accuracy {accuracy(model, test):.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
