"""Links: what they take from the run's store, what becomes of them, and headers that do not fit."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn
from torch.distributed import HashStore, PrefixStore, TCPStore
from waiting import until

from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.schedule import Schedule
from lightning_gossip.transport.header import Header, Kind, LinkError
from lightning_gossip.transport.link import Link, Links, gloo_device

LIMIT = timedelta(seconds=20)


def connections(port: int) -> int:
    """Return how many connections the server at ``port`` of this host has."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="connections are counted in /proc")
def test_all_links_of_a_process_share_its_connection_to_the_store() -> None:
    ends = 6
    server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    processes = [Links(server.clone(), f"rank{rank}", LIMIT) for rank in range(ends)]
    before = connections(server.port)
    assert before >= ends
    arriving = []
    for rank, links in enumerate(processes):  # all at once, in each other's way
        for peer in set(range(ends)) - {rank}:
            link = links.to(f"rank{peer}")

            def greet(link: Link = link, rank: int = rank) -> int:
                link.send(Header(Kind.NEAR, rank, 0))
                step = link.receive_header().step
                link.flush()
                return step

            arriving.append((peer, link.submit(greet)))
    assert all(future.result(20) == peer for peer, future in arriving)
    assert connections(server.port) == before
    for links in processes:
        links.close()


def test_a_link_is_closed_while_gloo_waits_for_the_other_ends_address() -> None:
    store = HashStore()
    PrefixStore("link/a/b", store).set("b", "here")  # and never more
    link = Link(store, gloo_device(), "a", "b", LIMIT)
    future = link.submit(lambda: link.receive_header())
    until(lambda: store.check(["link/a/b/0/0"]))
    start = time.monotonic()
    link.close()
    with pytest.raises(LinkError, match="the link between a and b is closed"):
        future.result(5)
    assert time.monotonic() - start < 2


def test_links_leave_no_keys_behind() -> None:
    server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    for generation in range(3):
        ends = [Links(server.clone(), own, LIMIT) for own in "ab"]
        for end in ends:
            end.reset(generation)
        there, back = (links.to(peer) for links, peer in zip(ends, "ba", strict=True))

        def ask(link: Link = there, step: int = generation) -> int:
            link.send(Header(Kind.NEAR, step, 0))
            return link.receive_header().step

        def answer(link: Link = back) -> None:
            step = link.receive_header().step
            link.send(Header(Kind.NEAR, step + 1, 0))
            link.flush()

        answered = back.submit(answer)
        assert there.submit(ask).result(10) == generation + 1
        answered.result(10)
        for end in ends:
            end.close()
        assert server.num_keys() == 0


def test_a_link_that_failed_keeps_no_thread_though_nobody_closes_it() -> None:
    link = Link(HashStore(), gloo_device(), "a", "b", LIMIT)
    asked = threading.Event()

    def fails() -> None:
        asked.wait(10)
        raise ValueError("no more")

    failing, behind = link.submit(fails), link.submit(lambda: "never done")
    asked.set()
    with pytest.raises(ValueError, match="no more"):
        failing.result(10)
    for future in (behind, link.submit(lambda: "nor this")):
        with pytest.raises(LinkError, match="the link between a and b is closed"):
            future.result(10)
    assert link.is_closed
    until(lambda: all(thread.name != "link-a-b" for thread in threading.enumerate()))


@pytest.mark.parametrize("shared_memory", [True, False])
def test_near_partners_give_their_link_up(shared_memory: bool) -> None:
    def link_threads(prefix: str) -> int:
        return sum(thread.name.startswith(prefix) for thread in threading.enumerate())

    def body(rank: Rank) -> int:
        before = link_threads(f"link-rank{rank.rank}-")
        rank.control.meet("the start")
        parameters = {"w": nn.Parameter(torch.full((8,), float(rank.rank)))}
        exchange = rank.exchange(Schedule("exponential"), ElasticMixing(0.5), parameters, shared_memory)
        for _ in range(6):
            exchange.begin()
            exchange.end()
        rank.control.meet("all have seen each partner more than once")
        now = link_threads(f"link-rank{rank.rank}-")
        rank.control.meet("all have counted")
        return now - before

    assert run_ranks(4, body) == [0 if shared_memory else 2] * 4


@pytest.mark.parametrize(
    "sent",
    [
        Header(Kind.SNAPSHOT, 2, 64, 7),  # another step
        Header(Kind.SNAPSHOT, 1, 128, 7),  # larger than the buffer: gloo would abort the process
        Header(99, 1, 64, 7),  # unknown kind
        Header(Kind.SNAPSHOT, 1, 64, 8),  # another layout
    ],
)
def test_a_header_that_does_not_fit_changes_nothing(sent: Header) -> None:
    expected = Header(Kind.SNAPSHOT, 1, 64, 7)
    seen = threading.Event()

    def body(rank: Rank) -> Any:
        link = rank.links.to(f"rank{1 - rank.rank}")
        if rank.rank == 0:
            link.submit(lambda: link.send(sent, torch.ones(sent.nbytes, dtype=torch.uint8))).result(10)
            seen.wait(10)  # the link stays open
            return None
        incoming = torch.zeros(64, dtype=torch.uint8)

        def receive() -> None:
            header = link.receive_header()
            if header != expected:
                raise LinkError(f"{header}")
            link.receive(incoming)

        with pytest.raises(LinkError, match="Header"):
            link.submit(receive).result(10)
        with pytest.raises(LinkError, match="is closed"):
            link.submit(receive).result(10)
        seen.set()
        return incoming.sum().item()

    assert run_ranks(2, body)[1] == 0


def test_garbage_is_no_header() -> None:
    with pytest.raises(LinkError, match="no header of this version"):
        Header.from_tensor(torch.arange(8))
    header = Header(1, 2, 3, 4, 5, 6)
    assert Header.from_tensor(header.to_tensor()) == header
