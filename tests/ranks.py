"""The one helper that starts many ranks as threads of one process (design §9)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed import HashStore

from lightning_gossip.control.run import Control
from lightning_gossip.exchange.asynchronous import AsynchronousExchange
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.transport.link import Links
from lightning_gossip.transport.link_transport import LinkTransport

T = TypeVar("T")

SHARED_MEMORY = True
"""Whether exchanges read snapshots where they were written, unless they say; tests of both ways patch it."""


@dataclass
class Rank:
    """What a rank needs to take part: its number, and the run's control and links."""

    rank: int
    world_size: int
    control: Control
    links: Links
    clock: Callable[[], int] = lambda: 0
    store: Any = None

    def exchange(
        self,
        schedule: Any,
        rule: Any,
        parameters: Mapping[str, Tensor],
        shared_memory: bool | None = None,
        **kwargs: Any,
    ) -> Exchange:
        transport = LinkTransport(self.links, self.control, SHARED_MEMORY if shared_memory is None else shared_memory)
        return Exchange(self.rank, self.world_size, schedule, rule, transport, lambda: parameters, **kwargs)

    def asynchronous(
        self, schedule: Any, rule: Any, parameters: Mapping[str, Tensor], **kwargs: Any
    ) -> AsynchronousExchange:
        who = self.rank, self.world_size, schedule, rule, self.control, self.store
        return AsynchronousExchange(*who, lambda: parameters, **kwargs)


class Script:
    """Choices by heart: the pair that exchanges at a step."""

    def __init__(self, pairs: Mapping[int, tuple[int, int]]) -> None:
        self.pairs = pairs

    def choices(self, step: int, world_size: int) -> list[int]:
        choices = [-1] * world_size
        if step in self.pairs:
            a, b = self.pairs[step]
            choices[a], choices[b] = b, a
        return choices


def run_ranks(
    world_size: int,
    body: Callable[[Rank], T],
    timeout: timedelta = timedelta(seconds=20),
    expect_errors: bool = False,
) -> list[Any]:
    """Call ``body`` for each rank in a thread of its own; return the results, or errors where they are expected."""
    store = HashStore()
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        control = Control(lambda: store, rank, world_size, timeout, clock=lambda: me.clock())
        links = Links(store, f"rank{rank}", timeout)
        me = Rank(rank, world_size, control, links, store=store)
        try:
            results[rank] = body(me)
        except BaseException as error:  # noqa: BLE001 - given to the caller
            results[rank] = error
            control.stop("error", f"{type(error).__name__}: {error}", getattr(error, "partner", -1))
        finally:
            links.close()
            control.close(grace=2)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a rank hangs"
    if not expect_errors:
        for result in results:
            if isinstance(result, BaseException):
                raise result
    return results
