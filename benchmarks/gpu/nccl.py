"""One rank on NCCL, the backend that CUDA gets by default: it starts, trains, saves and goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.gpu.correctness import adamw
from benchmarks.gpu.ranks import make_trainer
from benchmarks.gpu.replay import STEPS, Batches, Regression, flat
from benchmarks.gpu.rows import Check, yes
from lightning_gossip import ElasticGossipStrategy
from lightning_gossip.transport.header import Header, Kind
from lightning_gossip.transport.nccl import NcclTransport


def all_checks(device: torch.device) -> Iterator[Check]:
    """Run everything on this rank, the only one, whose default group is on NCCL (on a CPU: on gloo)."""
    folder = Path(tempfile.mkdtemp())
    data = Batches(0, torch.float32).loader()
    states = []
    for path in (None, folder / "epoch=0.ckpt"):
        module = Regression(torch.float32, adamw)
        strategy = ElasticGossipStrategy()
        saves = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer = make_trainer(device, strategy, max_epochs=2, enable_checkpointing=True, callbacks=[saves])
        trainer.fit(module, data, data, ckpt_path=path)
        states.append(flat(module).cpu())
        backend = dist.get_backend()
    yield yes(
        "nccl",
        f"one rank on {backend} trains, saves and goes on",
        1,
        torch.equal(*states) and trainer.global_step == 2 * STEPS,
    )
    if device.type == "cuda":
        yield yes("nccl", "a rank's own snapshot comes back over its NCCL transport", 1, _to_itself(device))


def _to_itself(device: torch.device) -> bool:
    group: Any = dist.new_group(backend="nccl")
    transport = NcclTransport(group, device)
    nbytes = 2**20
    transport.room(nbytes, nbytes).copy_(torch.arange(nbytes, device=device) % 251)
    done = transport.post(Header(Kind.SNAPSHOT, 1, nbytes), (0,), (0,)).wait()
    same = torch.equal(done.received[0], transport.room(nbytes, nbytes))
    transport.close()
    return same
