"""Gossip in a plain loop: equal to the strategies' training, resumed or not, on torch's default group or another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from asynchronous_replay import replay
from forked import Linear, fit, regression
from lightning.fabric import Fabric
from processes import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_gossip import ElasticGossipStrategy, Gossip, GossipStrategy, ReplicaFabricStrategy
from lightning_gossip.rules.mixing import ElasticMixing, PullMixing

RANKS, EPOCHS = 4, 3

SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "elastic": (ElasticGossipStrategy, {"alpha": 0.3}),
    "elastic uniform": (ElasticGossipStrategy, {"peers": "uniform", "probability": 0.7, "seed": 5}),
    "elastic delayed": (ElasticGossipStrategy, {"period": 2, "delay": 1, "wire_dtype": "bfloat16"}),
    "elastic with an outer step": (ElasticGossipStrategy, {"period": 2, "outer_lr": 0.7, "outer_momentum": 0.9}),
    "pull": (GossipStrategy, {"variant": "pull", "peers": "uniform"}),
    "push": (GossipStrategy, {"variant": "push", "peers": "ring", "shared_memory": False}),
}


class InOrder(pl.LightningDataModule):
    """Each rank reads every n-th row, in order."""

    def train_dataloader(self) -> Any:
        trainer: Any = self.trainer
        return share(trainer.global_rank, trainer.world_size)


def share(rank: int, ranks: int) -> Any:
    x, y = regression().tensors
    return DataLoader(TensorDataset(x[rank::ranks], y[rank::ranks]), 4)


def train(gossip: Gossip, model: Linear, optimizer: torch.optim.Optimizer, rank: int, epochs: int) -> None:
    for _ in range(epochs):
        for batch in share(rank, RANKS):
            with gossip.step():
                optimizer.zero_grad()
                nn.functional.mse_loss(model.layer(batch[0]).squeeze(1), batch[1]).backward()
                optimizer.step()


def made() -> tuple[Linear, Any]:
    pl.seed_everything(3, verbose=False)
    model = Linear()
    return model, model.configure_optimizers()


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_loop_equals_the_strategys_training_plain_resumed_or_in_fabric(tmp_path: Path, name: str) -> None:
    strategy, arguments = SCHEMES[name]
    pl.seed_everything(3, verbose=False)
    expected = fit(
        tmp_path,
        Linear(),
        strategy(**arguments, evaluate="replica", start_method="fork"),
        devices=RANKS,
        max_epochs=EPOCHS,
        train=InOrder(),
        use_distributed_sampler=False,
    )
    ours = {"variant": "elastic"} | arguments

    def unbroken(rank: int) -> dict[str, Tensor]:
        model, optimizer = made()
        with Gossip(model, **ours) as gossip:
            train(gossip, model, optimizer, rank, EPOCHS)
        assert gossip.steps == EPOCHS * 3
        return copied(model)

    def broken(rank: int) -> dict[str, Any]:
        model, optimizer = made()
        with Gossip(model, **ours) as gossip:
            train(gossip, model, optimizer, rank, 1)
            return {
                "model": copied(model),
                "optimizer": optimizer.state_dict(),
                "gossip": gossip.state_dict(),
            }

    def resumed(rank: int) -> dict[str, Tensor]:
        model, optimizer = made()
        with Gossip(model, **ours) as gossip:
            model.load_state_dict(saved[rank]["model"])
            optimizer.load_state_dict(saved[rank]["optimizer"])
            gossip.load_state_dict(saved[rank]["gossip"])
            train(gossip, model, optimizer, rank, EPOCHS - 1)
        return copied(model)

    def launched(fabric: Fabric) -> None:
        model, optimizer = fabric.setup(*made())
        with Gossip(model, **ours) as gossip:
            train(gossip, model, optimizer, fabric.global_rank, EPOCHS)
        torch.save(copied(model), tmp_path / f"fabric_{fabric.global_rank}.pt")

    whole = run_processes(tmp_path, RANKS, unbroken)
    saved = run_processes(tmp_path, RANKS, broken)
    parts = run_processes(tmp_path, RANKS, resumed)
    Fabric(accelerator="cpu", strategy=ReplicaFabricStrategy(start_method="fork"), devices=RANKS).launch(launched)
    for rank in range(RANKS):
        of_fabric = torch.load(tmp_path / f"fabric_{rank}.pt")
        for key, value in expected[rank]["state"].items():
            torch.testing.assert_close(whole[rank][key], value, rtol=0, atol=1e-12)
            torch.testing.assert_close(parts[rank][key], value, rtol=0, atol=1e-12)
            torch.testing.assert_close(of_fabric[key], value, rtol=0, atol=1e-12)
    assert not torch.equal(whole[0]["layer.weight"], whole[1]["layer.weight"])


def test_the_consensus_is_the_mean_and_the_replicas_come_back(tmp_path: Path) -> None:
    def body(rank: int) -> Any:
        model, optimizer = made()
        with Gossip(model, period=2) as gossip:
            train(gossip, model, optimizer, rank, 1)
            replica = copied(model)
            with gossip.consensus() as distance:
                mean = copied(model)
            back = copied(model)
            adopted = gossip.adopt_consensus()
        return replica, mean, back, copied(model), distance, adopted

    ranks = run_processes(tmp_path, RANKS, body)
    for key in ("layer.weight", "layer.bias"):
        mean = torch.stack([rank[0][key] for rank in ranks]).mean(0)
        for replica, seen, back, adopted, *_ in ranks:
            torch.testing.assert_close(seen[key], mean, rtol=0, atol=1e-14)
            torch.testing.assert_close(adopted[key], mean, rtol=0, atol=1e-14)
            assert torch.equal(back[key], replica[key])
    flat = torch.stack([torch.cat([rank[0][key].flatten() for key in rank[0]]) for rank in ranks])
    distance = ((flat - flat.mean(0)).square().sum(1).mean().sqrt() / flat.mean(0).norm()).item()
    assert [rank[4] for rank in ranks] == pytest.approx([distance] * RANKS, rel=1e-12)
    assert [rank[5] for rank in ranks] == pytest.approx([distance] * RANKS, rel=1e-12)


def test_a_group_of_some_ranks_gossips_by_itself(tmp_path: Path) -> None:
    """Two groups of two: each has its mean, and neither that of all."""

    def body(rank: int) -> Any:
        groups: list[Any] = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        model, optimizer = made()
        with torch.no_grad():
            model.layer.bias.fill_(float(rank))
        with Gossip(model, period=4, process_group=groups[rank % 2]) as gossip:
            begun = model.layer.bias.item()
            train(gossip, model, optimizer, rank, 1)
            own = copied(model)
            gossip.adopt_consensus()
        return begun, own, copied(model)

    ranks = run_processes(tmp_path, RANKS, body)
    assert [begun for begun, *_ in ranks] == [0.0, 1.0, 0.0, 1.0]
    for rank, (_, _, mean) in enumerate(ranks):
        expected = (ranks[rank][1]["layer.bias"] + ranks[(rank + 2) % 4][1]["layer.bias"]) / 2
        torch.testing.assert_close(mean["layer.bias"], expected, rtol=0, atol=1e-14)


def test_ranks_with_unequal_numbers_of_batches_meet_at_an_epochs_end(tmp_path: Path) -> None:
    def body(rank: int) -> Any:
        model, _ = made()
        with Gossip(model) as gossip:
            for _ in range(2):
                for _ in range(3 + rank):
                    with gossip.step():
                        pass
                gossip.wait_for_all()
            return gossip.steps

    assert run_processes(tmp_path, 2, body) == [8, 8]


class Theta(nn.Module):
    """One parameter of five numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))


LR = 0.1


def goal(rank: int, step: int) -> Tensor:
    return torch.arange(5, dtype=torch.float64) * (rank + 1) + step % 7


@pytest.mark.one_in(2)
@pytest.mark.parametrize("by_hand", [False, True], ids=["optimizer", "by hand"])
@pytest.mark.parametrize("variant", ["elastic", "pull"])
def test_asynchronous_gossip_equals_its_replay_whoever_is_slow(tmp_path: Path, variant: Any, by_hand: bool) -> None:
    """Also over a consensus in the middle; the mean moves by the optimizers alone where pairs are symmetric."""
    steps = (60, 90, 40, 70)

    def body(rank: int) -> Any:
        model = Theta()
        optimizer = torch.optim.SGD(model.parameters(), LR)
        updates = torch.zeros(5, dtype=torch.float64)
        with Gossip(model, variant, alpha=0.4, peers="uniform", period=2, asynchronous=True) as gossip:
            exchange: Any = gossip._running
            exchange.records = []
            for step in range(1, steps[rank] + 1):
                with gossip.step():
                    time.sleep(0.005 * (1 + rank))  # an exchange takes its time on a busy machine
                    gradient = model.theta.grad = model.theta.detach() - goal(rank, step)
                    updates -= LR * gradient
                    if by_hand:
                        gossip.shut()
                        with torch.no_grad():
                            model.theta.sub_(LR * gradient)
                    else:
                        optimizer.step()
                if step == steps[rank] // 2:
                    with gossip.consensus():
                        pass
            gossip.adopt_consensus()
            counts = gossip.stats
        return exchange.records, model.theta.detach(), updates, counts

    ranks = run_processes(tmp_path, RANKS, body)
    begun = dict.fromkeys(range(RANKS), np.zeros(5))
    rule = ElasticMixing(0.4) if variant == "elastic" else PullMixing()
    ends = replay(
        begun,
        dict(enumerate(steps)),
        {rank: records for rank, (records, *_) in enumerate(ranks)},
        lambda theta, rank, step: -LR * (theta - goal(rank, step).numpy()),
        lambda partners: rule.weight(partners),
    )
    mean = np.mean(list(ends.values()), axis=0)
    for _, adopted, _, counts in ranks:
        np.testing.assert_allclose(adopted.numpy(), mean, rtol=0, atol=1e-12)
        assert counts.exchanges > 5
    if variant == "elastic":
        moved = torch.stack([updates for _, _, updates, _ in ranks]).mean(0).numpy()
        np.testing.assert_allclose(mean, moved, rtol=0, atol=1e-12)


@pytest.mark.faults
def test_the_others_are_told_what_ended_a_rank(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        model, optimizer = made()
        with Gossip(model) as gossip:
            train(gossip, model, optimizer, rank, 1)
            if rank == 1:
                raise ValueError("boom")
            train(gossip, model, optimizer, rank, 100)

    texts = run_processes(tmp_path, 2, body, expect_errors=True)
    assert "ValueError: boom" in texts[1]
    assert "RunStopped" in texts[0]
    assert "rank 1" in texts[0]
    assert "ValueError: boom" in texts[0]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        Gossip(nn.Linear(2, 2))

    def body(rank: int) -> None:
        wrapped = DistributedDataParallel(nn.Linear(2, 2))
        refused: list[tuple[dict[str, Any], str]] = [
            ({"module": wrapped}, "must not be wrapped in DDP"),
            ({"variant": "elastik"}, "`variant` must be one of 'elastic', 'pull', 'push'"),
            ({"variant": "pull", "outer_momentum": 0.9}, "are for elastic gossip"),
            ({"delay": 1}, "`delay` must be an integer from 0 to 0"),
            ({"delay": 1, "period": 2, "asynchronous": True}, "`delay` must be 0 with `asynchronous=True`, got 1"),
            ({"asynchronous": "yes"}, "`asynchronous` must be"),
            ({"alpha": 0}, "`alpha` must be"),
            ({"wire_dtype": "bf16"}, "say 'bfloat16'"),
        ]
        for arguments, told in refused:
            with pytest.raises(ValueError, match=told):
                Gossip(**{"module": nn.Linear(2, 2), **arguments})
        with pytest.raises(RuntimeError, match="different models"):
            Gossip(nn.Linear(2, 2 + rank))

    run_processes(tmp_path, 2, body)


def test_the_fabric_strategy_launches_and_no_more() -> None:
    with pytest.raises(ValueError, match=r"one of 'accelerator', .* got 'find_unused_parameters'"):
        ReplicaFabricStrategy(find_unused_parameters=True)
