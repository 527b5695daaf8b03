"""One that comes to a seat while all others end, or die: it waits for nobody (design §10)."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from joiners import let_all_come_soon
from torch.distributed import HashStore

from lightning_gossip.control.joining import claim_seat
from lightning_gossip.control.member_control import MemberControl, RunOver, Survival
from lightning_gossip.control.stop import RunStopped

LONG = timedelta(seconds=60)
SURVIVAL = Survival(1, timedelta(seconds=1), "", lambda process: False)  # whose processes can not be seen


def control_of(store: HashStore, rank: int, incarnation: int = 0) -> MemberControl:
    survival = Survival(1, SURVIVAL.lost_after, f"host{rank}|{incarnation}|0", SURVIVAL.is_gone)
    return MemberControl(lambda: store, rank, 3, LONG, survival, incarnation)


def die(member: MemberControl) -> None:
    """Leave no word, and beat no more."""
    member._closing.set()
    member._pause.set()
    member._thread.join()


def close(member: MemberControl) -> None:
    member.close()


def await_donor(joiner: MemberControl) -> None:
    joiner.ask()
    joiner.await_donor()


def await_beginning(joiner: MemberControl) -> None:
    joiner.await_members(lambda: None)


@pytest.mark.parametrize("end", [die, close])
@pytest.mark.parametrize("wait", [await_donor, await_beginning])
def test_who_comes_to_be_alone_is_told_so(
    wait: Callable[[MemberControl], None], end: Callable[[MemberControl], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_all_come_soon(monkeypatch)
    store = HashStore()
    members = [control_of(store, rank) for rank in range(2)]
    members[0].declare_lost(2, "it never came")
    joiner = control_of(store, 2, claim_seat(store, 2, 3, SURVIVAL))
    for member in members:
        end(member)
    began = time.monotonic()
    with pytest.raises(RunStopped, match="nobody is left who could take in rank 2"):
        wait(joiner)
    assert time.monotonic() - began < 20
    joiner.close()


def test_a_seat_whose_holder_is_silent_is_claimed_though_nobody_is_left_to_declare_it_lost() -> None:
    """Its host can not be seen, and is gone; so are all that would have watched it."""
    store = HashStore()
    for rank in range(3):
        die(control_of(store, rank))
    began = time.monotonic()
    assert claim_seat(store, 1, 3, SURVIVAL) == 1
    assert SURVIVAL.lost_after.total_seconds() <= time.monotonic() - began < 20


def test_training_that_is_over_is_said_before_that() -> None:
    store = HashStore()
    members = [control_of(store, rank) for rank in range(2)]
    members[0].declare_lost(2, "it never came")
    joiner = control_of(store, 2, 1)
    members[1].tell_over("a checkpoint")
    for member in members:
        member.close()
    with pytest.raises(RunOver, match="a checkpoint"):
        await_beginning(joiner)
    joiner.close()
