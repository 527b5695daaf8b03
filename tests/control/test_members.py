"""The table of control/members.py without threads or a store, then its log under every order of what ranks do."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore

from lightning_gossip.control.member_log import MemberLog
from lightning_gossip.control.members import JOINED, JOINING, LEFT, LOST, Change, Members, StepNotKnown
from lightning_gossip.control.process_id import is_gone, own_process

pytestmark = pytest.mark.faults


def change(number: int, seat: int, kind: str = LOST, incarnation: int = 0) -> Change:
    return Change(number, kind, seat, incarnation, by=0, step=7, cause="SIGKILL")


def test_a_loss_holds_from_its_step_on_and_nobody_waits_for_it_before() -> None:
    members = Members(4)
    members.hold_horizon(20)
    members.read(change(1, 2))
    assert members.present == (0, 1, 3), "nobody waits for it"
    assert members.at(20) == (0, 1, 2, 3), "it is drawn as long as not all know"
    with pytest.raises(ValueError, match="while entry 1 has no step"):
        members.hold_horizon(30)
    assert members.step_for([20, 25, 11]) == 26
    members.hold_from(1, 26)
    members.hold_horizon(30)
    assert members.at(25) == (0, 1, 2, 3)
    assert members.at(26) == (0, 1, 3)
    with pytest.raises(StepNotKnown, match="at step 31 is not known: the horizon is 30"):
        members.at(31)


def test_steps_of_entries_never_fall() -> None:
    members = Members(4)
    members.read(change(1, 2))
    members.hold_from(1, 50)
    members.read(change(2, 3))
    assert members.step_for([10]) == 50, "who had the furthest horizon may be the one that is lost"
    with pytest.raises(ValueError, match="holds from step 49, before 50"):
        members.hold_from(2, 49)


def test_a_meeting_folds_the_log() -> None:
    members = Members(4)
    members.hold_horizon(100)
    members.read(change(1, 2))
    members.hold_from(1, 101)
    members.read(change(2, 0))
    assert members.fold(1) == (0, 1, 3), "the word named those that were left then"
    assert members.at(50) == (0, 1, 3), "whatever the step: the clock may be set back"
    members.hold_from(2, 101)
    members.hold_horizon(120)
    assert members.at(110) == (1, 3)


def test_a_loss_is_declared_once_and_a_seat_is_joined_under_a_later_incarnation() -> None:
    members = Members(3)
    assert members.may_append(LOST, 1, 0)
    assert not members.may_append(JOINING, 1, 1), "it is taken"
    members.read(change(1, 1))
    assert not members.may_append(LOST, 1, 0)
    assert not members.may_append(LEFT, 1, 0)
    assert not members.may_append(JOINING, 1, 0), "its old process' number"
    assert not members.may_append(JOINED, 1, 1), "nobody has taken it in"
    with pytest.raises(ValueError, match="contradicts"):
        members.read(change(2, 1))
    members.read(change(2, 1, JOINING, 2))  # a process that had claimed the seat as 1 died before it was taken in
    assert members.present == (0, 2, 1), "who joins comes last"
    assert members.whole == (0, 2)
    assert not members.may_append(JOINING, 1, 3), "it is taken"
    assert not members.may_append(LOST, 1, 0), "the word about the process of before comes too late"
    assert not members.may_append(JOINED, 1, 1)
    members.read(change(3, 1, JOINED, 2))
    assert members.whole == (0, 2, 1)
    assert not members.may_append(JOINED, 1, 2)
    assert members.may_append(LOST, 1, 2)
    with pytest.raises(ValueError, match="entry 5 of the log was read after entry 3"):
        members.read(change(5, 0))


def test_who_is_joining_meets_and_is_drawn_once_it_has_joined() -> None:
    members = Members(3)
    for number, (kind, step) in enumerate([(LOST, 10), (JOINING, 20), (JOINED, 30)], start=1):
        members.read(change(number, 0, kind, 1 if number > 1 else 0))
        members.hold_from(number, step)
    members.hold_horizon(40)
    steps = (9, 10, 20, 30)
    assert [members.at(step) for step in steps] == [(0, 1, 2), (1, 2), (1, 2), (0, 1, 2)]
    assert [members.all_at(step) for step in steps] == [(0, 1, 2), (1, 2), (0, 1, 2), (0, 1, 2)]
    assert [members.incarnation_at(step, 0) for step in steps] == [0, 0, 1, 1]
    assert members.incarnations_of(1, (0, 1)) == (0, 0)
    assert members.fold(2) == (1, 2, 0), "rank 0's duties stay with rank 1"
    assert members.at(0) == (1, 2)
    assert members.incarnations_of(2, (1, 2, 0)) == (0, 0, 1)


def test_who_is_lost_while_joining_is_counted_no_more() -> None:
    members = Members(2)
    for number, (kind, incarnation) in enumerate([(LEFT, 0), (JOINING, 1), (LOST, 1), (JOINING, 2)], start=1):
        members.read(change(number, 1, kind, incarnation))
    assert (members.present, members.whole) == ((0, 1), (0,))


class Killed(BaseException):
    pass


class Turns:
    """Lets one thread at a time touch the store, drawn at random: every order of operations comes up."""

    def __init__(self, seed: int, threads: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.running = threads
        self.waiting: dict[int, threading.Event] = {}
        self.lock = threading.Lock()

    def take(self, rank: int) -> None:
        event = threading.Event()
        with self.lock:
            self.waiting[rank] = event
            self._next()
        assert event.wait(20)

    def leave(self) -> None:
        with self.lock:
            self.running -= 1
            self._next()

    def _next(self) -> None:
        if self.waiting and len(self.waiting) == self.running:
            rank = sorted(self.waiting)[int(self.rng.integers(len(self.waiting)))]
            self.waiting.pop(rank).set()


class Seen:
    """The store as one rank sees it; it dies at its ``dies_at``-th operation."""

    def __init__(self, store: Any, turns: Turns, rank: int, dies_at: int) -> None:
        self.store, self.turns, self.rank, self.left = store, turns, rank, dies_at

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.store, name)

        def in_turn(*args: Any) -> Any:
            self.turns.take(self.rank)
            self.left -= 1
            if self.left == 0:
                raise Killed
            return operation(*args)

        return in_turn


@pytest.mark.parametrize("seed", range(100))
def test_all_members_agree_by_step_whatever_the_order(seed: int) -> None:
    """Ranks move their horizons on and declare losses, and some die between any two operations on the store."""
    rng = np.random.default_rng(seed)
    seats = int(rng.integers(2, 6))
    store, turns = HashStore(), Turns(seed, seats)
    logs = [Members(seats) for _ in range(seats)]
    drawn: list[dict[int, tuple[int, ...]]] = [{} for _ in range(seats)]
    dead: set[int] = set()
    errors: list[BaseException] = []

    def live(rank: int) -> None:
        mine = np.random.default_rng([seed, rank])
        dies_at = int(mine.integers(1, 60)) if rank and mine.random() < 0.5 else 0
        seen: Any = Seen(store, turns, rank, dies_at)
        log = MemberLog(logs[rank], rank, lambda change: None)
        step = 0
        try:
            for _ in range(12):
                for other in sorted(dead):
                    if mine.random() < 0.7:
                        log.append(seen, LOST, other, 0, step, "its process is gone")
                log.extend(seen, step + int(mine.integers(1, 6)))
                if rank not in log.present:
                    return
                while step < log.horizon and mine.random() < 0.9:
                    step += 1
                    drawn[rank][step] = log.at(step)
        except Killed:
            dead.add(rank)
        except BaseException as error:  # noqa: BLE001 - given to the test
            errors.append(error)
        finally:
            turns.leave()

    threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(seats)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    for step in range(1, 80):
        lists = {mine[step] for mine in drawn if step in mine}
        assert len(lists) <= 1, f"step {step} was drawn among {lists}"
    entries = [json.loads(store.get(f"change/{n}")) for n in range(1, 20) if store.check([f"change/{n}"])]
    declared = [entry["seat"] for entry in entries]
    assert len(declared) == len(set(declared)), "a loss was declared twice"
    assert set(declared) <= dead


def test_a_process_is_told_from_a_later_one_of_its_number() -> None:
    own = own_process()
    assert not is_gone(own)
    host, pid, started = own.rsplit("|", 2)
    assert is_gone(f"{host}|{pid}|{int(started) - 1}"), "its number is taken again"
    assert is_gone(f"{host}|{2**22 + 1}|{started}")
    assert not is_gone(f"elsewhere|{2**22 + 1}|{started}"), "nobody can tell from here"


def test_who_is_whole_by_a_part_of_the_log_is_the_same_whatever_came_after() -> None:
    members = Members(3)
    members.read(change(1, 0))
    members.read(change(2, 0, JOINING, incarnation=1))
    members.read(change(3, 0, JOINED, incarnation=1))
    members.read(change(4, 1))
    assert members.whole_by(2) == (1, 2), "the donor of those that met by then"
    assert members.whole_by(3) == (1, 2, 0), "who joins takes no duties away"
    assert members.whole_by(4) == members.whole == (2, 0)
