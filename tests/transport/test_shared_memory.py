"""Snapshots read where they were written: never while they change, by nobody who can not, and without a trace."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, Script, run_ranks
from torch import nn
from waiting import until

from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.header import Header, Kind
from lightning_gossip.transport.interface import PartnerLost
from lightning_gossip.transport.link import Link
from lightning_gossip.transport.link_transport import LinkTransport
from lightning_gossip.transport.shared_memory import AVAILABLE, SLOTS, Address, Inbox, Outbox

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="anonymous shared memory is Linux's")


def descriptors() -> list[str]:
    """Return the anonymous memory that this process has open or mapped."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # a thread of a rank that has just ended closes its own meanwhile
            links.append(os.readlink(path))
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [text for text in (*links, *maps) if "memfd:lightning_gossip" in text]


@pytest.mark.processes
def test_another_process_reads_and_says_so() -> None:
    outbox = Outbox(100, readers=3)
    for slot, step in enumerate((7, 8)):
        outbox.slots[slot][:4] = torch.tensor([1, 2, 3, step], dtype=torch.uint8)
        outbox.announce(slot, Header(Kind.SNAPSHOT, step, 100, layout=2**55))
        outbox.lend(slot, reader=2, when=step)
    assert outbox.free_slot() is None
    program = (
        "import sys\nfrom lightning_gossip.transport.shared_memory import Address, Inbox\n"
        "inbox = Inbox.open(Address(*map(int, sys.argv[1:])), 3)\n"
        "header, memory = inbox.find(8)\n"
        "print(header, memory[:4].tolist(), inbox.find(6), inbox.find(9))\n"
        "print(inbox.has_begun(8), inbox.has_begun(9), inbox.owner_lives)\ninbox.finish(2, 7)\n"
    )
    address = outbox.address
    numbers = [str(n) for n in (address.pid, address.descriptor, address.token, address.slot_bytes)]
    done = subprocess.run([sys.executable, "-c", program, *numbers], capture_output=True, text=True, timeout=60)
    expected = f"{Header(Kind.SNAPSHOT, 8, 100, layout=2**55)!r} [1, 2, 3, 8] None None\nTrue False True\n"
    assert done.stdout == expected.replace("<Kind.SNAPSHOT: 1>", "1"), done.stderr
    assert outbox.free_slot() == 0, "the snapshot of step 7 was read"
    assert outbox.readers(1) == {2: 8}, "that of step 8 was not"


def test_what_can_not_be_seen_is_not_opened() -> None:
    outbox = Outbox(64, readers=2)
    address = outbox.address
    file = os.open(os.devnull, os.O_RDWR)
    try:
        inbox = Inbox.open(address, 2)
        assert inbox is not None
        assert Inbox.open(Address(), 2) is None, "no outbox at all"
        assert Inbox.open(replace(address, pid=2**22 + 1), 2) is None, "no such process"
        assert Inbox.open(replace(address, descriptor=file), 2) is None, "not an outbox"
        assert Inbox.open(replace(address, token=address.token ^ 1), 2) is None, "another outbox of that number"
        assert Inbox.open(replace(address, slot_bytes=2 * address.slot_bytes), 2) is None, "of another size"
        assert inbox.owner_lives
        outbox.close()
        assert not inbox.owner_lives
        assert Inbox.open(address, 2) is None
    finally:
        os.close(file)
    assert Address.from_tensor(address.to_tensor()) == address


@pytest.mark.processes
@pytest.mark.faults
def test_a_killed_owner_is_noticed_before_it_is_waited_for() -> None:
    """A killed process that nobody has reaped yet is a zombie: its number is still taken, its memory is not there."""
    program = (
        "import time\nfrom lightning_gossip.transport.shared_memory import Outbox\noutbox = Outbox(64, 2)\n"
        "a = outbox.address\nprint(a.pid, a.descriptor, a.token, a.slot_bytes, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        inbox = Inbox.open(Address(*map(int, process.stdout.readline().split())), 2)
        assert inbox is not None
        assert inbox.owner_lives
        process.send_signal(signal.SIGKILL)
        until(lambda: not inbox.owner_lives)
        assert process.returncode is None, "nobody has waited for it"


def test_memory_is_free_once_nobody_maps_it() -> None:
    gc.collect()
    before = descriptors()
    outbox = Outbox(64, readers=2)
    inbox = Inbox.open(outbox.address, 2)
    assert inbox is not None
    outbox.slots[0].fill_(5)
    outbox.announce(0, Header(Kind.SNAPSHOT, 1, 64))
    found = inbox.find(1)
    assert found is not None
    slot = found[1]
    del outbox, inbox, found
    gc.collect()
    assert (slot == 5).all(), "a reader keeps what it reads"
    assert len(descriptors()) > len(before)
    del slot
    gc.collect()
    assert descriptors() == before


def test_a_run_leaves_no_memory_behind() -> None:
    gc.collect()
    before = descriptors()

    def body(rank: Rank) -> None:
        exchange = rank.exchange(Schedule("uniform"), ElasticMixing(0.5), {"w": nn.Parameter(torch.ones(100))})
        for _ in range(10):
            exchange.begin()
            exchange.end()
        assert len(descriptors()) > len(before)
        rank.control.meet("all have seen it")
        exchange.close()

    run_ranks(4, body)
    gc.collect()
    assert descriptors() == before


def test_slow_readers_find_the_snapshot_as_it_was_and_the_owner_waits_for_them() -> None:
    """Ranks 1 and 2 read rank 0's first two snapshots late: there is no room for a third before one has read."""
    script = Schedule(Script({1: (0, 1), 2: (0, 2), 3: (0, 3)}))
    go_on, begun, was_set = threading.Event(), threading.Event(), []

    def body(rank: Rank) -> Any:
        parameter = nn.Parameter(torch.full((1000,), float(rank.rank)))
        exchange = rank.exchange(script, ElasticMixing(0.5), {"w": parameter})
        for step in range(1, 4):
            if rank.rank == 0 and step == 3:
                begun.set()
            exchange.begin()
            with torch.no_grad():
                if rank.rank == 0:
                    parameter.fill_(10.0 * step)  # its "optimizer"
            if rank.rank == 0 and step == 3:
                was_set.append(go_on.is_set())
            if rank.rank == step and step < 3:
                assert begun.wait(10)
                time.sleep(0.3)
                go_on.set()
            exchange.end()
        return parameter.detach().unique().tolist()

    results = run_ranks(4, body)
    assert SLOTS == 2
    assert was_set == [True], "the third snapshot would have overwritten the first"
    # rank 1 was at 1 and read 0; step 1 left rank 0 at 10 - (0 - 1) / 2, which rank 2, at 2, read
    assert results[1] == [0.5]
    assert results[2] == [2 - (2 - 10.5) / 2]


def test_who_never_reads_is_named() -> None:
    script = Schedule(Script({1: (0, 1), 2: (0, 2), 3: (0, 3)}))
    over = threading.Event()

    def body(rank: Rank) -> None:
        exchange = rank.exchange(script, ElasticMixing(0.5), {"w": nn.Parameter(torch.ones(10))})
        try:
            for step in range(1, 4):
                exchange.begin()
                if rank.rank == step and step < 3:
                    over.wait(10)
                exchange.end()
        finally:
            if rank.rank == 0:
                over.set()

    errors = run_ranks(4, body, timeout=timedelta(seconds=1), expect_errors=True)
    assert isinstance(errors[0], PartnerLost)
    assert str(errors[0]) == (
        "rank 0 lost its partner rank 1 at step 1: it did not read this rank's snapshot of that step for 1 s"
    )


def test_who_has_read_at_the_last_moment_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots are free between the last look at them and the search for who holds them."""

    def body(rank: Rank) -> bool:
        transport = LinkTransport(rank.links, rank.control)
        room = transport.room(64, 64)
        outbox = transport._outbox
        assert outbox is not None
        inbox = Inbox.open(outbox.address, 2)
        assert inbox is not None
        for slot in range(SLOTS):
            outbox.lend(slot, reader=1, when=5)

        def read_after_the_last_look(look: Callable[[], Any], *_: float) -> Any:
            found = look()
            inbox.finish(1, 5)
            return found

        monkeypatch.setattr(rank.control, "poll", read_after_the_last_look)
        same = transport.room(64, 64).data_ptr() == room.data_ptr()
        transport.close()
        return same

    assert run_ranks(2, lambda rank: rank.rank == 1 or body(rank)) == [True, True]


def test_ranks_that_do_not_see_each_others_memory_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 1 on one host, 2 and 3 on another, say: both roads in one exchange, and the same result."""
    host_of = {f"rank{rank}": rank // 2 for rank in range(4)}
    opened, sent = [], []
    open_, swap = Inbox.open, Link.swap

    def open_if_near(address: Address, readers: int) -> Inbox | None:
        own, peer = threading.current_thread().name.removeprefix("link-").split("-")
        opened.append(host_of[own] == host_of[peer])
        return open_(address, readers) if opened[-1] else None

    def counting(link: Link, outgoing: torch.Tensor | None, incoming: torch.Tensor | None) -> None:
        if outgoing is not None and outgoing.nbytes == 4096:
            sent.append((link.own, link.peer))
        swap(link, outgoing, incoming)

    monkeypatch.setattr(Inbox, "open", open_if_near)
    monkeypatch.setattr(Link, "swap", counting)

    def body(rank: Rank, shared_memory: bool) -> torch.Tensor:
        torch.manual_seed(rank.rank)
        parameter = nn.Parameter(torch.randn(1024, generator=torch.Generator().manual_seed(rank.rank)))
        exchange = rank.exchange(Schedule("uniform", seed=2), ElasticMixing(0.3), {"w": parameter}, shared_memory)
        for _ in range(12):
            exchange.begin()
            exchange.end()
        return parameter.detach().clone()

    mixed = run_ranks(4, lambda rank: body(rank, True))
    assert True in opened
    assert False in opened
    assert sent
    assert all(host_of[own] != host_of[peer] for own, peer in sent), "payloads travel between hosts only"
    sent.clear()
    apart = run_ranks(4, lambda rank: body(rank, False))
    assert any(host_of[own] == host_of[peer] for own, peer in sent)
    for a, b in zip(mixed, apart, strict=True):
        assert torch.equal(a, b)


def test_an_outbox_has_room_for_what_unfreezes_and_what_is_added_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    swap = Link.swap

    def counting(link: Link, outgoing: torch.Tensor | None, incoming: torch.Tensor | None) -> None:
        sent.extend(() if outgoing is None else (outgoing.nbytes,))
        swap(link, outgoing, incoming)

    monkeypatch.setattr(Link, "swap", counting)

    def body(rank: Rank) -> list[float]:
        value = float(rank.rank)
        large = nn.Parameter(torch.full((5000,), value), requires_grad=False)
        parameters = {"small": nn.Parameter(torch.full((3,), value)), "large": large}
        exchange = rank.exchange(Schedule(), ElasticMixing(0.5), parameters)
        seen = []
        for step in range(4):
            large.requires_grad_(step > 0)
            if step == 2:
                parameters["added"] = nn.Parameter(torch.full((9000,), value))
            if step == 3:
                del parameters["added"]
            exchange.begin()
            exchange.end()
            seen.append(large.detach().mean().item())
            if step == 2:
                seen.append(parameters["added"].detach().mean().item())
        return seen

    assert run_ranks(2, body) == [[0.0, 0.5, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.5, 0.5]]
    added = 64 + 4 * (5000 + 9000)
    assert [nbytes for nbytes in sent if nbytes > 1000] == [added] * 2, "only what is too large for the outbox"


def test_a_clock_that_is_set_back_finds_the_new_snapshots() -> None:
    """As the learning-rate finder does: it restores the state from before its steps, on all ranks."""

    def body(rank: Rank) -> list[float]:
        parameter = nn.Parameter(torch.full((10,), float(rank.rank)))
        exchange = rank.exchange(Schedule(), ElasticMixing(0.5), {"w": parameter})
        before = exchange.state_dict()
        seen = []
        for times in range(3):
            with torch.no_grad():
                parameter.fill_(10.0 * times + rank.rank)
            for _ in range(5):
                exchange.begin()
                exchange.end()
            seen.append(parameter[0].item())
            exchange.load_state_dict(before)
            assert exchange.step == 0
        return seen

    assert run_ranks(2, body) == [[0.5, 10.5, 20.5]] * 2
