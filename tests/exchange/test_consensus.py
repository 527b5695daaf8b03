"""The squares of which the consensus distance is made, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_gossip.exchange.consensus import squares_to


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_squares_count_imaginary_parts_and_are_taken_in_float32_at_least(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    ours, theirs = (torch.randn(1000, dtype=drawn, generator=generator).to(dtype) for _ in range(2))
    wide = np.complex128 if dtype.is_complex else np.float64
    x, y = (np.array(tensor.tolist(), dtype=wide) for tensor in (ours, theirs))
    expected = [np.sum(np.abs(x - y) ** 2), np.sum(np.abs(y) ** 2)]
    np.testing.assert_allclose(squares_to(ours, theirs), expected, rtol=1e-7)


def test_infinite_elements_on_which_all_agree_are_no_distance() -> None:
    ours, theirs = torch.tensor([np.inf, 1.0]), torch.tensor([np.inf, 3.0])
    assert squares_to(ours, theirs).tolist() == [4.0, np.inf]
