"""The interpreter ends while threads of ours are in torch's native code: with its own exit code, and soon."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from environments import LEAN

THREADS = {
    "asks until it is told": "while not ends.is_set(): store.add('a', 1)",
    "comes back by itself": "store.wait(['never'], timedelta(seconds=1))",
    "is at its end": "store.add('a', 1)",
}
THREAD = """
    import sys, threading, time
    from datetime import timedelta
    from torch.distributed import TCPStore
    from lightning_gossip.control.helper_thread import HelperThread

    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = TCPStore("127.0.0.1", served.port, is_master=False, wait_for_workers=False)
    ends = threading.Event()

    def work():
        {}

    HelperThread(work, "helper", ends.set)
    time.sleep(0.1)
    sys.exit(3)
"""
GOSSIP = """
    import sys, threading
    from datetime import timedelta
    import torch
    from torch.distributed import TCPStore
    from lightning_gossip.exchange.plain import Gossip

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    have_exchanged = threading.Barrier(2)

    def train(rank):
        model = torch.nn.Linear(30, 30)
        gossip = Gossip(model, store=store, rank=rank, world_size=2, min_replicas=2, timeout=timedelta(seconds=20), {})
        while not gossip.stats.exchanges:
            with gossip.step():
                model(torch.ones(30)).sum().backward()
        have_exchanged.wait(20)

    threading.Thread(target=train, args=(1,), daemon=True).start()
    train(0)
    sys.exit(3)
"""


def exit_code_of(program: str) -> int:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=LEAN, capture_output=True, text=True, timeout=60)
    print(done.stderr)
    return done.returncode


@pytest.mark.one_in(3)
@pytest.mark.parametrize("thread", THREADS)
def test_a_thread(thread: str) -> None:
    assert exit_code_of(THREAD.format(THREADS[thread])) == 3


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", ["asynchronous=True", "period=2, delay=1", "shared_memory=False"])
def test_replicas_that_nobody_closed(options: str) -> None:
    assert exit_code_of(GOSSIP.format(options)) == 3
