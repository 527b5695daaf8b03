"""What a replica does with what it received: pure functions on tensors (design §3).

A rule is told what every rank chose, and answers with the transfers of one rank and the weight of what arrives:

    θ_i(t+1) = θ_i(t) + u_i(t) − weight · Σ_{k ∈ receive_from} (s_i − s_k)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gossip.schedule import Choices


@dataclass(frozen=True, slots=True)
class Transfers:
    """The ranks to which a rank sends its snapshot and from which it receives theirs, each ascending."""

    send_to: tuple[int, ...]
    receive_from: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.send_to or self.receive_from)


class MixingRule(ABC):
    """How choices become transfers, and how much of a difference is taken over."""

    @abstractmethod
    def transfers(self, choices: Choices, rank: int) -> Transfers:
        """Return the transfers of ``rank``, given everybody's choices (shape ``(world_size,)``, -1 for none)."""

    @abstractmethod
    def weight(self, received: int) -> float:
        """Return the weight of the summed difference to ``received`` (at least 1) partners."""


@dataclass(frozen=True, slots=True)
class ElasticMixing(MixingRule):
    """Elastic gossip (Pramod 2018, arXiv:1812.02407): symmetric, so the mean of the replicas stays.

    θ_i ← θ_i + u_i − α Σ_{k ∈ K_i} (s_i − s_k), K_i the rank that i chose and those that chose i.
    """

    alpha: float

    def transfers(self, choices: Choices, rank: int) -> Transfers:
        """Both ways with every partner."""
        partners = tuple(sorted({*_chosen(choices, rank), *_choosers(choices, rank)}))
        return Transfers(send_to=partners, receive_from=partners)

    def weight(self, received: int) -> float:
        """α, whatever the number of partners."""
        return self.alpha


class PullMixing(MixingRule):
    """Gossiping SGD, pull (Jin et al. 2016, arXiv:1611.04581): θ_i ← θ_i + u_i − ½ (s_i − s_k), k chosen by i."""

    def transfers(self, choices: Choices, rank: int) -> Transfers:
        """From the rank that was chosen, to those that chose."""
        return Transfers(send_to=_choosers(choices, rank), receive_from=_chosen(choices, rank))

    def weight(self, received: int) -> float:
        """One half: the mean of two."""
        return 0.5


class PushMixing(MixingRule):
    """Gossiping SGD, push (Jin et al. 2016): θ_i ← θ_i + u_i − 1/(c+1) Σ_{k ∈ C} (s_i − s_k), C chose i, |C| = c."""

    def transfers(self, choices: Choices, rank: int) -> Transfers:
        """To the rank that was chosen, from those that chose."""
        return Transfers(send_to=_chosen(choices, rank), receive_from=_choosers(choices, rank))

    def weight(self, received: int) -> float:
        """1 / (c + 1): the mean of c + 1."""
        return 1.0 / (received + 1)


def sum_of_differences(own: Tensor, received: Sequence[Tensor], out: Tensor) -> Tensor:
    """Write Σ_k (own − received_k), in the given order, into ``out`` and return it.

    Args:
        own: snapshot of this rank, 1-D, in the wire's dtype.
        received: snapshots of its partners, shaped and typed as ``own``; in ascending rank, so that a replay of the
            sum is exact. Their contents are lost.
        out: 1-D, in the dtype in which to subtract and sum; it may be ``received[0]``, and no other.
    """
    wide = own.to(out.dtype)
    torch.sub(wide, received[0], out=out)
    for snapshot in received[1:]:
        # rounded by itself before it is added: the partner computes exactly its negative
        in_place = snapshot.dtype == out.dtype
        out += torch.sub(wide, snapshot, out=snapshot) if in_place else wide - snapshot
    return out


def _chosen(choices: Choices, rank: int) -> tuple[int, ...]:
    return (int(choices[rank]),) if choices[rank] >= 0 else ()


def _choosers(choices: Choices, rank: int) -> tuple[int, ...]:
    return tuple(np.flatnonzero(choices == rank).tolist())
