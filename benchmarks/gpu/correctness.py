"""Trainings of several ranks on one device: replay, consensus, resume, mixed precision, compiled, Downpour."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from benchmarks.gpu.ranks import TIMEOUT, gather, make_trainer
from benchmarks.gpu.replay import STEPS, Batches, Regression, Replicas, flat
from benchmarks.gpu.rows import Check, yes
from lightning_gossip import (
    DiLoCoStrategy,
    DownpourStrategy,
    ElasticGossipStrategy,
    GossipStrategy,
    LocalSGDStrategy,
)
from lightning_gossip.strategies.all_reduced import AllReducedStrategy
from lightning_gossip.strategies.pairwise import PairwiseStrategy

GLOO: dict[str, Any] = {"process_group_backend": "gloo", "timeout": TIMEOUT}
REPLICA: dict[str, Any] = {"evaluate": "replica", **GLOO}
EXACT = 1e-12
"""Of float64, relative to the largest parameter."""


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def all_checks(device: torch.device) -> Iterator[Check]:
    """Run everything on this rank; the same checks on all ranks, told by each."""
    for check in (exactness, consensus, resume, mixed_precision, compiled, downpour):
        yield from check(device)


def exactness(device: torch.device) -> Iterator[Check]:
    """Compare replicas with the replay, in float64."""
    elastic, gossip = partial(ElasticGossipStrategy, **REPLICA), partial(GossipStrategy, **REPLICA)
    local_sgd, diloco = partial(LocalSGDStrategy, period=4, **REPLICA), partial(DiLoCoStrategy, period=4, **REPLICA)
    outer = partial(elastic, period=4, outer_lr=0.7, outer_momentum=0.9)
    bfloat16: dict[str, Any] = {"wire_dtype": torch.bfloat16}
    cases: list[tuple[str, PairwiseStrategy | AllReducedStrategy, float | str, Any]] = [
        ("elastic gossip, matching", elastic(), 0.5, adamw),
        ("elastic gossip over links", elastic(shared_memory=False), 0.5, sgd),
        ("elastic gossip, uniform at 1/2", elastic(alpha=0.3, probability=0.5, peers="uniform"), 0.3, sgd),
        ("elastic gossip, period 4, delay 3", elastic(period=4, delay=3), 0.5, adamw),
        ("elastic gossip, bfloat16 wire", elastic(wire_dtype=torch.bfloat16), 0.5, sgd),
        ("gossiping SGD, pull", gossip(peers="uniform"), "pull", sgd),
        ("gossiping SGD, push", gossip(variant="push", peers="uniform"), "push", adamw),
        ("LocalSGD", local_sgd(), 0.0, sgd),
        ("LocalSGD, delay 3, 4 fragments", local_sgd(delay=3, fragments=4), 0.0, adamw),
        ("DiLoCo", diloco(), 0.0, adamw),
        ("DiLoCo, delay 3", diloco(delay=3), 0.0, sgd),
        ("DiLoCo, 4 fragments", diloco(fragments=4), 0.0, adamw),
        ("DiLoCo, delay 3, 4 fragments, bfloat16 wire", diloco(delay=3, fragments=4, **bfloat16), 0.0, adamw),
        ("elastic gossip, outer step", outer(), 0.5, adamw),
        ("elastic gossip, outer step, uniform, delay 3", outer(alpha=0.3, peers="uniform", delay=3), 0.3, sgd),
        ("elastic gossip, outer step, bfloat16 wire", outer(**bfloat16), 0.5, adamw),
    ]
    for name, strategy, alpha, optimizer in cases:
        module = Regression(torch.float64, optimizer)
        train(device, module, strategy)
        replay = partial(Replicas(device, torch.float64, optimizer).train, dist.get_world_size(), strategy, alpha)
        yield Check("exactness", name, dist.get_world_size(), error(module, replay), EXACT)


def consensus(device: torch.device) -> Iterator[Check]:
    """Compare the consensus model with the mean of the replicas, and between the ranks."""
    ranks = dist.get_world_size()
    module, strategy = Regression(torch.float64, adamw), ElasticGossipStrategy(probability=0.25, **REPLICA)
    train(device, module, strategy)
    replicas = gather(flat(module).cpu())
    strategy.adopt_consensus()
    mean = torch.stack(replicas).mean(0)
    off = float((flat(module).cpu() - mean).abs().max() / mean.abs().max())
    yield Check("consensus", "the mean of the replicas", ranks, max(gather(off)), EXACT)
    module = Regression(torch.float64, adamw)
    trainer = train(device, module, ElasticGossipStrategy(probability=0.25, **GLOO), validate=True)
    held, losses = gather(flat(module).cpu()), gather(float(trainer.callback_metrics["val_loss"]))
    alike = all(torch.equal(held[0], other) for other in held) and len(set(losses)) == 1
    yield yes("consensus", "every rank holds it after fit, bit for bit", ranks, alike)


def resume(device: torch.device) -> Iterator[Check]:
    """Compare trainings that went on from a checkpoint with ones that were not interrupted, bit for bit."""
    elastic = partial(ElasticGossipStrategy, period=4, delay=3, **REPLICA)
    diloco = partial(DiLoCoStrategy, period=8, **REPLICA)
    cases: dict[str, Callable[[], Any]] = {
        "an exchange in flight": elastic,
        "elastic gossip with an outer step, in flight": partial(elastic, outer_lr=0.7, outer_momentum=0.9),
        "DiLoCo in mid-round": diloco,
        "DiLoCo, three of 4 fragments in flight": partial(diloco, delay=5, fragments=4),
        "DiLoCo, in flight on a bfloat16 wire": partial(diloco, delay=5, wire_dtype=torch.bfloat16),
    }
    for name, strategy in cases.items():
        same = _goes_on(device, strategy)
        text = f"mid-training, {name}, dropout and AdamW: bit for bit"
        yield yes("resume", text, dist.get_world_size(), same)


def _goes_on(device: torch.device, strategy: Callable[[], Any]) -> bool:
    folder = gather(tempfile.mkdtemp())[0]
    checkpoint = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    arguments: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True, "default_root_dir": folder}
    pl.seed_everything(11 + dist.get_rank(), verbose=False)
    whole = Regression(torch.float32, adamw, dropout=0.2)
    train(device, whole, strategy(), callbacks=[checkpoint], **arguments)
    resumed = Regression(torch.float32, adamw, dropout=0.2)
    path = str(Path(folder, "epoch=0.ckpt"))
    train(
        device,
        resumed,
        strategy(),
        callbacks=[ModelCheckpoint(dirpath=folder, filename="resumed")],
        ckpt_path=path,
        **arguments,
    )
    return all(gather(torch.equal(flat(whole).cpu(), flat(resumed).cpu())))


def mixed_precision(device: torch.device) -> Iterator[Check]:
    """Compare a training in bf16-mixed with the replay under autocast."""
    module, strategy = Regression(torch.float32, sgd), ElasticGossipStrategy(**REPLICA)
    train(device, module, strategy, precision="bf16-mixed")
    replicas = Replicas(device, torch.float32, sgd, autocast=torch.bfloat16)
    found = error(module, partial(replicas.train, dist.get_world_size(), strategy, 0.5))
    yield Check("precision", "bf16-mixed", dist.get_world_size(), found, 1e-5)


def compiled(device: torch.device) -> Iterator[Check]:
    """Compare a compiled module's training with the replay, which is not compiled."""
    module, strategy = Regression(torch.float32, sgd), ElasticGossipStrategy(**REPLICA)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    train(device, torch.compile(module, backend=backend), strategy)
    replicas = Replicas(device, torch.float32, sgd)
    found = error(module, partial(replicas.train, dist.get_world_size(), strategy, 0.5))
    # products are in TensorFloat-32, whose order of summing the compiler may choose
    yield Check(
        "compile", f"torch.compile ({backend})", dist.get_world_size(), found, 1e-2 if device.type == "cuda" else 1e-5
    )


def downpour(device: torch.device) -> Iterator[Check]:
    """Compare what the server holds with the start and all that the workers' optimizers made: nothing lost or twice."""
    for n_push, n_pull in ((1, 1), (3, 4)):
        module, made = Regression(torch.float64, sgd), Made()
        start = flat(module)
        train(device, module, DownpourStrategy(n_push=n_push, n_pull=n_pull, **GLOO), callbacks=[made])
        held = flat(module).cpu()
        total = start + torch.stack(gather(made.total)).sum(0)
        off = max(gather(float((held - total).abs().max() / total.abs().max())))
        name = f"the server holds what workers made, n_push {n_push}, n_pull {n_pull}"
        yield Check("downpour", name, dist.get_world_size(), off, 1e-10)


class Made(Callback):
    """Adds up what this rank's optimizer made."""

    total: Tensor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.total = torch.zeros_like(flat(pl_module)).cpu()
        [optimizer] = trainer.optimizers
        optimizer.register_step_pre_hook(lambda *_: self._before(pl_module))
        optimizer.register_step_post_hook(lambda *_: self._after(pl_module))

    def _before(self, module: nn.Module) -> None:
        self._parameters = flat(module)

    def _after(self, module: nn.Module) -> None:
        self.total += (flat(module) - self._parameters).cpu()


def train(
    device: torch.device,
    module: Any,
    strategy: Any,
    validate: bool = False,
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> pl.Trainer:
    """Fit ``module`` on this rank's batches, on all ranks."""
    data = Batches(dist.get_rank(), next(iter(module.parameters())).dtype)
    trainer = make_trainer(device, strategy, **({"max_epochs": 1} | kwargs))
    trainer.fit(module, data.loader(), data.loader() if validate else None, ckpt_path=ckpt_path)
    assert trainer.global_step == STEPS * (trainer.max_epochs or 1)
    return trainer


def error(module: nn.Module, replay: Callable[[], list[Tensor]]) -> float:
    """Return the largest difference of a replica to the replay, relative to the largest parameter, over all ranks."""
    expected = [replica.cpu() for replica in replay()] if dist.get_rank() == 0 else []
    replicas = gather(flat(module).cpu())
    if not expected:
        return gather(0.0)[0]
    off = [
        float((own - by_hand).abs().max() / by_hand.abs().max())
        for own, by_hand in zip(replicas, expected, strict=True)
    ]
    return gather(max(off))[0]
