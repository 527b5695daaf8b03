"""The outer step by itself: torch's SGD with Nesterov momentum, bit for bit; what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gossip.rules.outer import OuterStep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.4, 0.0), (1.0, 0.99)])
def test_the_step_is_torchs_nesterov_bit_for_bit(lr: float, momentum: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = nn.Parameter(torch.randn(1003, generator=generator).to(dtype))
    ours, velocity = theirs.detach().clone(), torch.zeros(1003, dtype=dtype) if momentum else None
    optimizer = torch.optim.SGD([theirs], lr=lr, momentum=momentum, nesterov=momentum > 0)
    for _ in range(20):
        theirs.grad = torch.randn(1003, generator=generator).to(dtype)
        before = ours.clone()
        moved = OuterStep(lr, momentum).descend(ours, velocity, theirs.grad)
        optimizer.step()
        assert torch.equal(ours, theirs.detach())
        torch.testing.assert_close(before + moved, ours, rtol=2 * (eps := torch.finfo(dtype).eps), atol=32 * eps)


def test_a_replica_of_its_own_makes_the_same_step() -> None:
    """Without mixing, y is where DiLoCo's step of one replica leads."""
    generator = torch.Generator().manual_seed(0)
    outer = OuterStep(0.7, 0.9)
    ours, theirs, velocity, other = (torch.zeros(7, dtype=torch.float64) for _ in range(4))
    for _ in range(10):
        drift = torch.randn(7, generator=generator, dtype=torch.float64)
        ours = outer.propose(ours + drift, ours, velocity)
        outer.descend(theirs, other, -drift)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("lr", "momentum", "message"),
    [
        (0, 0.9, r"`outer_lr` must be a number in \(0, inf\), got 0"),
        (float("nan"), 0.9, r"`outer_lr` must be a number in \(0, inf\), got nan"),
        ("1", 0.9, r"`outer_lr` must be a number in \(0, inf\), got '1'"),
        (1, 1, r"`outer_momentum` must be a number in \[0, 1\), got 1"),
        (1, -0.1, r"`outer_momentum` must be a number in \[0, 1\), got -0.1"),
    ],
)
def test_arguments_out_of_range_are_refused(lr: float, momentum: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OuterStep(lr, momentum)


def test_only_one_and_zero_are_plain() -> None:
    assert OuterStep().is_plain
    assert not OuterStep(0.9, 0).is_plain
    assert not OuterStep(1, 0.5).is_plain
