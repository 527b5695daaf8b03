"""NCCL's way of moving snapshots between GPUs."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gossip.transport.header import Header
from lightning_gossip.transport.interface import Posted, Rooms, Staged, Transferred, Transport


class NcclTransport(Transport):
    """One ``batch_isend_irecv`` a step on a group of its own, from device memory.

    NCCL has no headers and does not raise in ``wait``: a mismatch or a dead partner shows as a hang of the stream,
    which NCCL's own watchdog ends. Written from its documentation; it has run with one rank, which sent to
    itself (``benchmarks/gpu``), and never between two.

    Args:
        group: of all ranks, on which nothing else runs.
        device: of this rank.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._rooms = Rooms(device)  # 0: what is sent; then what arrives
        dist.barrier(group=group)  # NCCL wants the first call on a group to be a collective by all ranks

    def room(self, nbytes: int, at_most: int) -> Tensor:
        """See :meth:`Transport.room`; nobody else reads it."""
        self._rooms.resize(nbytes)
        return self._rooms[0]

    def post(
        self,
        header: Header,
        send_to: Collection[int],
        receive_from: Collection[int],
        staged: Staged | None = None,
    ) -> Posted:
        """See :meth:`Transport.post`."""
        received = {partner: self._rooms[number] for number, partner in enumerate(receive_from, start=1)}
        operations = []
        for partner in sorted({*send_to, *receive_from}):
            if partner in send_to:
                operations.append(dist.P2POp(dist.isend, self._rooms[0], partner, self._group))
            if partner in received:
                operations.append(dist.P2POp(dist.irecv, received[partner], partner, self._group))
        return _PostedOnStream(dist.batch_isend_irecv(operations), Transferred(received, send_to))

    def rewind(self) -> None:
        """Nothing: NCCL has no headers."""

    def reset(self, generation: int) -> None:
        """Nothing: unequal numbers of batches, and so skipped partners, are refused on NCCL."""

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        dist.destroy_process_group(self._group)


class _PostedOnStream(Posted):
    def __init__(self, works: list[dist.Work], transferred: Transferred) -> None:
        self._works = works
        self._transferred = transferred

    def wait(self) -> Transferred:
        for work in self._works:
            work.wait()
        return self._transferred

    def release(self) -> None:
        """Nothing: the stream orders what comes next."""
