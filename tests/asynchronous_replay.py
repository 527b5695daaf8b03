"""Asynchronous gossip again, in numpy, from the records of who exchanged what with whom (design §11)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lightning_gossip.exchange.asynchronous import Applied

Update = Callable[[np.ndarray, int, int], np.ndarray]
"""What rank's optimizer adds at a step of its own, given its parameters."""


def replay(
    start: Mapping[int, np.ndarray],
    steps: Mapping[int, int],
    records: Mapping[int, Sequence[Applied]],
    update: Update,
    weight: Callable[[int], float],
    rounding: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> dict[int, np.ndarray]:
    """Return the parameters of each rank after its last step, and what was applied behind it.

    A rank's step is made as soon as the snapshots are there that it applies: in whatever order the ranks ran, this one
    gives the same.

    Args:
        start: by rank, the parameters before the first step.
        steps: by rank, how many it made.
        records: by rank, what it applied.
        update: of the optimizers.
        weight: of the summed difference to so many partners.
        rounding: of a snapshot, on both sides.
    """
    theta = {rank: value.copy() for rank, value in start.items()}
    at = {rank: [theta[rank].copy()] for rank in start}  # by moment
    due = {rank: {record.moment: record for record in applied} for rank, applied in records.items()}
    step = dict.fromkeys(start, 0)

    def has_next(rank: int) -> bool:
        record = due[rank].get(len(at[rank]))
        return step[rank] < steps[rank] or (record is not None and record.between)

    while any(has_next(rank) for rank in start):
        moved = False
        for rank in start:
            while has_next(rank):
                record = due[rank].get(len(at[rank]))
                if record is not None and any(len(at[k]) <= moment for k, moment in record.others):
                    break
                if record is None or not record.between:
                    step[rank] += 1
                    theta[rank] = theta[rank] + update(theta[rank], rank, step[rank])
                if record is not None:
                    own = rounding(at[rank][record.own])
                    difference = sum(own - rounding(at[k][moment]) for k, moment in record.others)
                    theta[rank] = theta[rank] - weight(len(record.others)) * difference
                at[rank].append(theta[rank].copy())
                moved = True
        assert moved, "the records contradict one another"
    return theta
