"""What a training sends, and how long it would take where each rank has a processor and a slow link of its own."""

from __future__ import annotations

from typing import Any

from benchmarks.scale.model import Machine, all_reduce_step
from benchmarks.text.schemes import POST_LOCAL_START, POWERSGD_START, Row

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
        # gradients of all updates but the last before the first mean, and means
        first = POST_LOCAL_START
        means = 0 if updates < first else 1 + (updates - first) // row.period
        return (min(updates, first - 1) + means) * payload
    return updates * payload
