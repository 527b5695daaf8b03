"""torch's default group among members: one that is lost, and whose process still lives, is waited for by nobody."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from lightning_gossip.control.meeting import Meeting
from lightning_gossip.transport import group as group_of_torch
from lightning_gossip.transport.group import DefaultGroup

pytestmark = [pytest.mark.processes, pytest.mark.faults]

LONG = timedelta(seconds=40)
SOON = 10  # seconds


class Loss:
    """Of rank 1, seen by rank 0 as its thread sees it: it notes the loss, and wakes the group."""

    def __init__(self, group: DefaultGroup) -> None:
        self._group = group
        self.seen = False

    def happen(self) -> None:
        self.seen = True
        self._group.wake(1)

    def after(self, called: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``called``, after which the loss happens."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = called(*args, **kwargs)
            self.happen()
            return result

        return call


def between_meeting_and_collective(group: DefaultGroup, loss: Loss) -> None:
    loss.happen()


def when_the_last_key_was_read(group: DefaultGroup, loss: Loss) -> None:
    """There is no group yet to be woken, and nobody looks any more whether one is lost."""
    make = dist.init_process_group

    def made(*args: Any, **kwargs: Any) -> None:
        group.wake(1)
        make(*args, **kwargs)
        loss.seen = True

    dist.init_process_group = made


def before_the_timeout_is_set(group: DefaultGroup, loss: Loss) -> None:
    vars(group_of_torch)["_set_timeout"] = loss.after(vars(group_of_torch)["_set_timeout"])


def within_the_collective(group: DefaultGroup, loss: Loss) -> None:
    dist.all_reduce = before(loss.happen, dist.all_reduce)


def before(first: Callable[[], None], called: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        first()
        return called(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("moment", "anew"),
    [
        (between_meeting_and_collective, False),
        (within_the_collective, False),
        (between_meeting_and_collective, True),
        (when_the_last_key_was_read, True),
        (before_the_timeout_is_set, True),
        (within_the_collective, True),
    ],
)
def test_nobody_waits_for_one_that_is_lost(
    tmp_path: Path, moment: Callable[[DefaultGroup, Loss], None], anew: bool
) -> None:
    """Rank 1 has met, and then does nothing more; the group of before is used, or one made anew."""

    def body(rank: int) -> float:
        store: Any = dist.distributed_c10d._get_default_store()
        dist.barrier()
        dist.destroy_process_group()
        group = DefaultGroup(rank)
        loss = Loss(group)

        def once(number: int) -> None:
            with group.collective():
                group.follow(Meeting(0, False, False, number, (0, 1), (0, 0)), store, lambda: loss.seen, LONG)
                if rank == 0:
                    dist.all_reduce(torch.ones(1))

        if not anew:
            with group.collective():
                group.follow(Meeting(0, False, False, 1, (0, 1), (0, 0)), store, lambda: False, LONG)
                dist.all_reduce(torch.ones(1))
        if rank == 0:
            moment(group, loss)
        began = time.monotonic()
        if rank == 1:
            with suppress(RuntimeError):  # where rank 0 has given the group up before it was there
                once(2)
            store.wait(["through"], LONG)
            store.set("seen", "")
            return 0.0
        with pytest.raises(RuntimeError):
            once(2)
        seconds = time.monotonic() - began
        store.set("through", "")
        store.wait(["seen"], LONG)  # the store is of this process
        return seconds

    seconds, _ = run_processes(tmp_path, 2, body)
    assert seconds < SOON
