"""What a training sends, and how long it would take where each rank has a processor and a slow link of its own.

Time is computed as in ``benchmarks.scale``: a step's computing, measured (`step.py`), and bytes over a link's rate.

=================  ===================================================================================================
DDP                the all-reduce runs beside the backward pass, two thirds of a step, as far as it fits
PowerSGD           its step as measured, with what the compression computes, then three small all-reduces
post-local SGD     as DDP at first; then training waits for each all-reduce of parameters
LocalSGD, DiLoCo   a round runs beside the whole step at whose begin it is posted, as far as it fits
elastic gossip     likewise, and a snapshot goes to one partner: half of what an all-reduce of many ranks sends
=================  ===================================================================================================

Snapshots and mixing are left out: once in a period, they are small beside the steps (`benchmarks.exchange`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.text.schemes import POST_LOCAL_START, POWERSGD_START, Row
from lightning_gossip.rules.simulation import Machine, all_reduce_step

BANDWIDTH = 200e6
"""Bits a second of a rank's uplink, and of its downlink."""
LATENCY = 1e-4
"""Seconds from one rank to another."""


def bytes_sent(row: Row, trainer: Any, payload: int) -> float:
    """Return the bytes of payload that this rank has sent in training so far.

    Args:
        row: what is trained.
        trainer: in ``fit``.
        payload: bytes of the parameters.
    """
    exchange = getattr(trainer.strategy, "exchange", None)
    if exchange is not None:
        return float(exchange.stats.bytes_sent)
    return ring(row.ranks) * reduced(row, trainer.global_step, payload, compressed_bytes(trainer.strategy))


def ring(ranks: int) -> float:
    """Return what a rank sends in a ring all-reduce, in sizes of what is reduced."""
    return 2 * (ranks - 1) / ranks


def compressed_bytes(strategy: Any) -> float:
    """Return what PowerSGD's hook has handed to all-reduces since it compresses; 0 for others."""
    return 4.0 * getattr(getattr(strategy, "comm_state", None), "total_numel_after_compression", 0)


def reduced(row: Row, updates: int, payload: float, compressed: float) -> float:
    """Return the bytes that Lightning's DDP has all-reduced after so many updates, ``compressed`` among them."""
    if row.scheme.startswith("powersgd"):
        return min(updates, POWERSGD_START) * payload + compressed
    if row.scheme == "post-local":
        return (min(updates, POST_LOCAL_START - 1) + means(row, updates)) * payload
    return updates * payload


def means(row: Row, updates: int) -> int:
    """Return how often post-local SGD has averaged the replicas; its gradients are all-reduced before the first."""
    return 0 if updates < POST_LOCAL_START else 1 + (updates - POST_LOCAL_START) // row.period


@dataclass(frozen=True)
class Link:
    """A model of time.

    Args:
        compute: seconds of a step without communication.
        payload: bytes of the parameters.
        compressed: bytes that PowerSGD hands to all-reduces in an update; of its rows.
        compressing: seconds of PowerSGD's step on unlimited links; of its rows.
    """

    compute: float
    payload: float
    compressed: float = 0.0
    compressing: float = 0.0

    def seconds(self, row: Row, updates: int) -> float:
        """Return the time of so many updates."""
        machine = Machine(self.compute, self.payload, BANDWIDTH, LATENCY)
        if row.scheme == "ddp":
            return updates * all_reduce_step(machine, row.ranks, steps=1)
        if row.scheme.startswith("powersgd"):
            whole = min(updates, POWERSGD_START)
            small = self.compressing + self.all_reduce(row.ranks, self.compressed, calls=3)
            return whole * all_reduce_step(machine, row.ranks, steps=1) + (updates - whole) * small
        if row.scheme == "post-local":
            at_first = min(updates, POST_LOCAL_START - 1)
            waits = means(row, updates) * self.all_reduce(row.ranks, self.payload)
            local = (updates - at_first) * self.compute
            return at_first * all_reduce_step(machine, row.ranks, steps=1) + local + waits
        pairs = row.scheme.startswith("elastic")
        transfer = machine.transfer + LATENCY if pairs else self.all_reduce(row.ranks, self.payload)
        return updates * self.compute + updates // row.period * max(0.0, transfer - self.compute)

    def all_reduce(self, ranks: int, payload: float, calls: int = 1) -> float:
        """Return the time of all-reduces of ``payload`` bytes together, with nothing beside them."""
        transfer = Machine(self.compute, payload, BANDWIDTH, LATENCY).transfer
        return ring(ranks) * transfer + calls * 2 * (ranks - 1) * LATENCY
