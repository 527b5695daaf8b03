"""What a replica does with what it received: pure functions on tensors (design §3).

A rule is told what every rank chose, and answers with the transfers of one rank and the weight of what arrives:

    θ_i(t+1) = θ_i(t) + u_i(t) − weight · Σ_{k ∈ receive_from} (s_i − s_k)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gossip.rules.schedule import Choices

CHUNK = 2**17
"""Elements: a few copies of them stay in a core's cache."""


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


@torch.no_grad()
def mix(
    targets: Sequence[Tensor], own: Tensor, received: Sequence[Tensor], weight: float, scratch: Tensor | None = None
) -> bool:
    """Subtract weight · Σ_k (own − received_k) from ``targets``, in one pass over each.

    It stops where a difference is not finite: that is seen while it lies in the cache, not in a pass of its own. What
    was subtracted until then is added again: but for a rounding, the targets are as they were.

    The last come first: the optimizer has just left them in the cache, and the first layers are there for what follows.

    Args:
        targets: tensors of one dtype, in which differences are taken and summed.
        own: snapshot of this rank, 1-D, in the wire's dtype: the targets of then, laid end to end.
        received: snapshots of its partners, shaped and typed as ``own``; in ascending rank, so that a replay of the
            sum is exact. At least one.
        weight: of the sum.
        scratch: 1-D, typed as the targets: as many elements are worked on together, few enough that a difference
            never leaves the cache. None: all at once.

    Returns:
        Whether all differences were finite, and so were subtracted.
    """
    chunk = own.numel() if scratch is None else scratch.numel()

    def difference(stretch: slice, dtype: torch.dtype) -> Tensor:
        size = stretch.stop - stretch.start
        fits = scratch is not None and size <= chunk  # not so a tensor that can not be cut
        out = scratch[:size] if scratch is not None and fits else torch.empty_like(own[stretch], dtype=dtype)
        return sum_of_differences(own[stretch], [snapshot[stretch] for snapshot in received], out)

    done: list[tuple[slice, list[Tensor]]] = []
    for stretch, pieces in reversed(list(_cut(targets, max(1, chunk)))):
        moves = difference(stretch, pieces[0].dtype)
        if not is_finite(moves):
            for earlier, mixed in done:
                _add(mixed, difference(earlier, mixed[0].dtype), weight)
            return False
        _add(pieces, moves, -weight)
        done.append((stretch, pieces))
    return True


def _add(pieces: list[Tensor], flat: Tensor, weight: float) -> None:
    """Add weight · ``flat`` (1-D) to ``pieces``, which lie end to end in it."""
    if len(pieces) == 1:
        pieces[0].add_(flat.view(pieces[0].shape), alpha=weight)
    else:
        parts = flat.split([piece.numel() for piece in pieces])
        views = [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
        torch._foreach_add_(pieces, views, alpha=weight)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: a sum carries them on, much faster than a look at each.

    A sum may also overflow by itself.
    """
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def sum_of_differences(own: Tensor, received: Sequence[Tensor], out: Tensor) -> Tensor:
    """Write Σ_k (own − received_k), taken and summed in the dtype of ``out`` and in the given order, to ``out``."""
    wide = own.to(out.dtype)
    torch.sub(wide, received[0], out=out)
    for snapshot in received[1:]:
        out += wide - snapshot  # rounded by itself before it is added: the partner computes exactly its negative
    return out


def _cut(tensors: Sequence[Tensor], chunk: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Cut tensors laid end to end into stretches of about ``chunk`` elements; small ones stay together.

    Yields the stretch's place in the whole, and views of the tensors there. One that is not contiguous is not cut.
    """
    end, pieces, size = 0, list[Tensor](), 0
    for tensor in tensors:
        cuttable = tensor.numel() > chunk and tensor.is_contiguous()
        for piece in tensor.view(-1).split(chunk) if cuttable else (tensor,):
            if pieces and size + piece.numel() > chunk:
                yield slice(end - size, end), pieces
                pieces, size = [], 0
            pieces.append(piece)
            size += piece.numel()
            end += piece.numel()
    if size:
        yield slice(end - size, end), pieces


def _chosen(choices: Choices, rank: int) -> tuple[int, ...]:
    return (int(choices[rank]),) if choices[rank] >= 0 else ()


def _choosers(choices: Choices, rank: int) -> tuple[int, ...]:
    return tuple(np.flatnonzero(choices == rank).tolist())
