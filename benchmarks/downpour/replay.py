"""What staleness alone costs: Downpour on CIFAR-10 replayed by one process, in which the workers take turns.

    python -m benchmarks.downpour.replay --data-dir DIR [--pulls at-each-step at-push a-step-later] [--workers 3]

The rule of the package (design §3) without the package: no strategy, server or thread. Each worker in turn makes a
step; every n_push steps it adds to the server's parameters what it made since its last push, and begins anew from them
(``at-push``: the other workers' updates since then are its staleness, workers - 1 of them), or does so a step later,
what it made meanwhile added, as a worker does that never waits (``a-step-later``). With ``at-each-step`` it begins each
step from the server's parameters, as if a pull took no time: for n_push 1 that is SGD by a single process on the
workers' batches in turn. Network, data, learning rate and its schedule are those of ``accuracy`` on CIFAR-10.

One row a pass of all workers together over the training set in ``results/downpour_replay.csv``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
import torch
from image_data import DataNotFoundError
from shares import IndexSampler
from tensor_data import Labelled, Sets, TensorLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks import RESULTS
from benchmarks.downpour.experiments import EXPERIMENTS
from benchmarks.downpour.training import Data, evaluate
from benchmarks.shared.options import make_parser
from benchmarks.shared.rows import append, find, read

PULLS = ("at-each-step", "at-push", "a-step-later")
EXPERIMENT = EXPERIMENTS["cifar10"]


@dataclass(frozen=True)
class Setting:
    """One replay. ``lr`` is the single process': a worker's is this / n_push."""

    pull: str
    workers: int
    n_push: int
    lr: float
    passes: int
    seed: int


class Worker:
    """A replica (flat, as are all parameters here) and what it made since its last push."""

    def __init__(self, start: Tensor, batches: Iterator[Labelled]) -> None:
        self.replica = start.clone()
        self.made = torch.zeros_like(start)
        self.pulled: Tensor | None = None
        self.batches = batches

    def step(self, network: nn.Module, server: Tensor, setting: Setting, lr: float, step: int) -> None:
        """Make a step, the ``step``-th from 1 on, and change ``server`` in place where it ends with a push."""
        if setting.pull == "at-each-step":
            self.replica = server + self.made
        update = gradient(network, self.replica, *next(self.batches)).mul_(-lr)
        self.replica += update
        self.made += update
        if self.pulled is not None:
            self.replica, self.pulled = self.pulled + self.made, None
        if step % setting.n_push == 0:
            server += self.made
            self.made.zero_()
            if setting.pull == "at-push":
                self.replica = server.clone()
            elif setting.pull == "a-step-later":
                self.pulled = server.clone()


def gradient(network: nn.Module, parameters: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    vector_to_parameters(parameters, network.parameters())
    network.zero_grad()
    cross_entropy(network(inputs), labels).backward()
    return parameters_to_vector(p.grad for p in network.parameters() if p.grad is not None)


def walk(loader: TensorLoader) -> Iterator[Labelled]:
    """Return the batches of epoch after epoch, each in an order of its own."""
    epoch, sampler = 0, cast(IndexSampler, loader.sampler)
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def replay(setting: Setting, sets: Sets) -> Iterator[dict[str, float]]:
    """Train, and return after each pass what the server's model is worth."""
    pl.seed_everything(setting.seed, verbose=False)
    network = EXPERIMENT.network()
    server = parameters_to_vector(network.parameters()).detach().clone()
    data = Data(sets, EXPERIMENT.shares, EXPERIMENT.batch, setting.seed)
    loaders = [data.loader(rank, setting.workers) for rank in range(setting.workers)]
    workers = [Worker(server, walk(loader)) for loader in loaders]
    rate = torch.optim.SGD([server], lr=setting.lr / setting.n_push)  # only its learning rate is used
    assert EXPERIMENT.schedule is not None
    schedule = EXPERIMENT.schedule(rate)
    steps, begin = len(loaders[0]) // setting.workers, time.perf_counter()
    for number in range(1, setting.passes + 1):
        lr = rate.param_groups[0]["lr"]
        for step in range((number - 1) * steps + 1, number * steps + 1):
            for worker in workers:
                worker.step(network, server, setting, lr, step)
        vector_to_parameters(server, network.parameters())
        point = {"pass": number, "worker_lr": lr} | evaluate(network, sets)
        schedule.step(point["validation_loss"])
        yield point | {"seconds": time.perf_counter() - begin}


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--pulls", choices=PULLS, nargs="+", default=PULLS, help="when a worker takes the server's parameters")
    add("--workers", type=int, default=3)
    add("--n-push", type=int, default=1)
    add("--lr", type=float, default=EXPERIMENT.lr, help="of the single process; a worker's is this / n_push")
    add("--passes", type=int, default=14, help="over the training set, by all workers together")
    add("--seed", type=int, default=EXPERIMENT.seeds[0])
    add("--data-dir", type=Path, default=None, help="as for the examples")
    add("--out", type=Path, default=RESULTS / "downpour_replay.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        sets = EXPERIMENT.load(args.seed, args.data_dir)
    except DataNotFoundError as error:
        parser.error(str(error))
    for pull in args.pulls:
        setting = asdict(Setting(pull, args.workers, args.n_push, args.lr, args.passes, args.seed))
        if find(read(args.out), setting):
            continue
        points = []
        for point in replay(Setting(**setting), sets):
            points.append(setting | point)
            print(f"{pull}: pass {point['pass']}, test accuracy {point['test_accuracy']:.4f}", flush=True)
        append(args.out, points, digits=6)


if __name__ == "__main__":
    main()
