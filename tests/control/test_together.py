"""What members do together: what breaks is repeated, what all find out alike is not."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import timedelta

from survivors import all_at_once
from torch.distributed import HashStore

from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import MemberControl, Survival
from lightning_gossip.control.together import Disagreement, together


def outcomes(size: int, attempt: object, min_replicas: int = 1) -> list[BaseException | object]:
    """Return what each of so many members gets of ``attempt``, which is called with its rank and the meeting."""
    store, found = HashStore(), list[BaseException | object]([None] * size)

    def body(rank: int) -> None:
        survival = Survival(min_replicas, timedelta(seconds=10), f"threads|{rank}|0", lambda process: False)
        control = MemberControl(lambda: store, rank, size, timedelta(seconds=20), survival)
        try:
            control.begin(10)
            found[rank] = together(control, lambda: control.meet("it"), lambda meeting: attempt(rank, meeting))  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - given to the test
            found[rank] = error
            control.leave(f"{type(error).__name__}: {error}")
        control.close()

    all_at_once(size, body)
    return found


def test_what_all_find_out_alike_ends_all_and_is_not_repeated() -> None:
    calls = Counter[int]()

    def attempt(rank: int, meeting: Meeting) -> None:
        calls[rank] += 1
        raise Disagreement("they differ")

    found = outcomes(3, attempt)
    assert [str(error) for error in found] == ["they differ"] * 3, "nobody goes on without the others"
    assert calls == {0: 1, 1: 1, 2: 1}


def test_where_it_breaks_on_one_all_look_again() -> None:
    lock, calls = threading.Lock(), Counter[int]()

    def attempt(rank: int, meeting: Meeting) -> str:
        with lock:
            calls[rank] += 1
        if rank == 1 and calls[rank] == 1:
            raise RuntimeError("a connection was dropped")
        raise Disagreement("they differ")

    found = outcomes(3, attempt)
    assert [str(error) for error in found] == ["they differ"] * 3
    assert calls == {0: 2, 1: 2, 2: 2}
