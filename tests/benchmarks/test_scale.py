"""benchmarks/scale: asynchronous ranks beside ranks by step."""

from __future__ import annotations

import pytest

from benchmarks.scale import asynchronous


def test_asynchronous_ranks_of_one_pace_do_what_they_do_by_step() -> None:
    even = asynchronous.compute(16, 0.0, 1, steps=64)
    assert even["exchanges_a_round"] == pytest.approx(1, abs=0.02)
    assert even["busy"] == 0
    assert even["distance"] == pytest.approx(even["by_step_distance"], rel=0.2)


@pytest.mark.parametrize("period", [1, 8])
def test_uneven_ranks_wait_for_nobody_asynchronously(period: int) -> None:
    uneven = asynchronous.compute(16, 0.5, period, steps=64)
    assert uneven["steps_to_alone"] > 0.98
    assert uneven["by_step_to_alone"] < 0.7
    assert uneven["exchanges_a_round"] > 0.6
