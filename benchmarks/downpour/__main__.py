"""What a parameter server costs, without Lightning: its CPU use, bytes and staleness against workers and shards.

    python -m benchmarks.downpour [--seconds 8] [--step-ms 35] [--n-push 5]

Real shard processes on this host; the workers are threads of one process that sleep for a step's time and hold the
thesis' MNIST network (2.9 million float32 parameters), so that nothing but Downpour needs a core. One row a setting in
``results/downpour_server.csv``; those that are there already are not run again.

What the server's model is worth, and what training sees of Downpour, say this benchmark's other parts: ``accuracy``,
``replay``, ``step`` and ``straggler``, each ``python -m benchmarks.downpour.PART``.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import HashStore

from benchmarks import RESULTS
from benchmarks.shared.machine import cores
from benchmarks.shared.options import make_parser
from benchmarks.shared.rows import append, find, read
from benchmarks.shared.workloads import perceptron
from lightning_gossip.control.run import Control
from lightning_gossip.parameter_server.client import DownpourClient
from lightning_gossip.parameter_server.process import ShardProcess
from lightning_gossip.parameter_server.traffic import Answered

WORKERS = (1, 2, 3, 4, 6, 8)
SHARDS = (1, 2)
LIMIT = timedelta(minutes=2)


@dataclass
class Row:
    """One setting and what came of it: rates over all workers, the mean ``call_ms`` and the median step."""

    workers: int
    shards: int
    n_push: int
    n_pull: int
    step_ms: float
    seconds: float
    cores: int
    server_cores_used: float = 0.0
    server_cpu_ms_per_push: float = 0.0
    pushes_per_second: float = 0.0
    pushes_due_per_second: float = 0.0
    pulls_per_second: float = 0.0
    sent_mb_per_second: float = 0.0
    staleness_mean: float = 0.0
    staleness_max: int = 0
    step_with_downpour_ms: float = 0.0
    call_ms: float = 0.0
    call_share: float = 0.0


@dataclass
class Run:
    """What one worker saw."""

    pushes: int = 0
    pulls: int = 0
    bytes_sent: int = 0
    staleness: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(row: Row) -> Row:
    runs = [Run() for _ in range(row.workers)]
    store, begun, over = HashStore(), threading.Barrier(row.workers + 1), threading.Event()
    with ExitStack() as stack:
        shards = [stack.enter_context(ShardProcess(timeout=LIMIT)) for _ in range(row.shards)]
        addresses = [shard.address for shard in shards]

        def work(rank: int) -> None:
            run, answers = runs[rank], list[Answered]()
            control = Control(lambda: store, rank, row.workers, LIMIT)
            parameters = dict(perceptron().named_parameters())
            client = DownpourClient(addresses, control, n_push=row.n_push, n_pull=row.n_pull, on_answer=answers.append)
            client.start(parameters)
            for _ in range(2 * row.n_push):  # fills the buffers
                client.end_step(parameters)
                client.drain()
            answers.clear()
            sent = client.stats.bytes_sent
            begun.wait()
            while not over.is_set():
                begin = time.perf_counter()
                time.sleep(row.step_ms / 1000)
                client.end_step(parameters)
                run.steps.append(time.perf_counter() - begin)
                run.calls.append(client.stats.call_seconds)
            run.staleness = [a.staleness for a in answers if a.kind == "push"]
            run.pushes, run.pulls = len(run.staleness), sum(a.kind == "pull" for a in answers)
            run.bytes_sent = client.stats.bytes_sent - sent
            client.finish(parameters)
            client.close()
            control.close(grace=5)

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(row.workers)]
        for thread in threads:
            thread.start()
        begun.wait(LIMIT.total_seconds())
        cpu, clock = sum(cpu_seconds(s.pid) for s in shards), time.perf_counter()
        time.sleep(row.seconds)
        cpu, clock = sum(cpu_seconds(s.pid) for s in shards) - cpu, time.perf_counter() - clock
        over.set()
        for thread in threads:
            thread.join(LIMIT.total_seconds())
    return summarize(row, runs, cpu, clock)


def summarize(row: Row, runs: list[Run], cpu: float, clock: float) -> Row:
    pushes = sum(run.pushes for run in runs)
    staleness = [s for run in runs for s in run.staleness]
    steps = [s for run in runs for s in run.steps]
    calls = [c for run in runs for c in run.calls]
    row.server_cores_used = cpu / clock
    row.server_cpu_ms_per_push = 1000 * cpu / pushes
    row.pushes_per_second = pushes / clock
    row.pushes_due_per_second = len(steps) / row.n_push / clock
    row.pulls_per_second = sum(run.pulls for run in runs) / clock
    row.sent_mb_per_second = sum(run.bytes_sent for run in runs) / clock / 1e6
    row.staleness_mean = statistics.mean(staleness)
    row.staleness_max = max(staleness)
    row.step_with_downpour_ms = 1000 * statistics.median(steps)
    row.call_ms = 1000 * statistics.mean(calls)
    row.call_share = sum(calls) / sum(steps)
    return row


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="measured, a setting")
    parser.add_argument("--step-ms", type=float, default=35.0, help="a step's time without Downpour")
    parser.add_argument("--n-push", type=int, default=5)
    parser.add_argument("--n-pull", type=int, default=None, help="as --n-push by default: one round trip for both")
    parser.add_argument("--out", type=Path, default=RESULTS / "downpour_server.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n_pull = arguments.n_push if arguments.n_pull is None else arguments.n_pull
    keys = ("workers", "shards", "n_push", "n_pull", "step_ms", "seconds", "cores")
    for shards in SHARDS:
        for workers in WORKERS:
            row = Row(workers, shards, arguments.n_push, n_pull, arguments.step_ms, arguments.seconds, cores())
            given = {key: str(getattr(row, key)) for key in keys}
            if find(read(arguments.out), given):
                continue
            append(arguments.out, [asdict(measure(row)) | given])
            print(read(arguments.out)[-1], flush=True)


if __name__ == "__main__":
    main()
