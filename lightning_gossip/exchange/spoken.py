"""What two ends of a link say to each other in an exchange, and how payloads pass (the words: :mod:`agreement`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_gossip.exchange.agreement import Word
from lightning_gossip.exchange.snapshots import Snapshot
from lightning_gossip.transport.header import Header, LinkError, SendFailed
from lightning_gossip.transport.link import Link


def pass_payloads(
    link: Link, own: Snapshot | None, incoming: Tensor | None, step: int, whole: Callable[[], None]
) -> None:
    """Send ``own`` and receive ``incoming`` (1-D, uint8), of which one may be None; return once both ends have theirs.

    Args:
        link: between the two.
        own, incoming: what passes.
        step: of this rank.
        whole: called once what was incoming is whole.

    Raises:
        LinkError, RuntimeError: if the other end is gone, or says something else.
    """
    try:
        link.swap(None if own is None else own.payload, incoming)
    except SendFailed as error:
        if error.received is not None:
            whole()
        raise
    whole()
    link.send(Header(Word.HELD, step, 0))
    if (heard := link.receive_header()).kind != Word.HELD:
        raise LinkError(f"{link.peer} sent a message of kind {heard.kind} in the place of a word that it holds all")
    link.flush()  # not before: the other end receives this once it has said the same


def may_go_on(link: Link) -> bool:
    """Hear whether who was answered still wants an exchange.

    Raises:
        LinkError, RuntimeError: if the other end is gone, or says something else.
    """
    heard = link.receive_header()
    if heard.kind not in (Word.GO, Word.VOID):
        raise LinkError(f"{link.peer} sent a message of kind {heard.kind} after an answer")
    return heard.kind == Word.GO
