"""Accuracy at equal wall time with one slow rank: real trainings, on a clock that is computed.

    python -m benchmarks.scale.training --data-dir DIR     # trains what is not there yet, and prints the table
    python -m benchmarks.scale.training --table            # of the rows that are there; --plot draws them

MNIST in the thesis' set-up on 4 ranks: every rank's steps are those of its network, on batches that are dealt as they
are asked for; only what a step and a message take is computed (28 ms, and 10 Gbit/s). So uneven ranks are exactly as
uneven as they are meant to be, and nothing else that runs on the machine changes a result. Rank 0 takes 3 times as
long; time is counted in the epochs of 4 even ranks.

By step the others go at the pace of the slow one: what they have reached after a time is what even ranks have after a
third of it, so one training by step gives both.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import DataNotFoundError, ImageData
from models import mlp
from shares import mixed_seed
from tensor_data import Labelled, Sets
from torch.nn.functional import cross_entropy
from typing_extensions import override

from benchmarks import RESULTS
from benchmarks.shared.options import at_least, listed, make_parser
from benchmarks.shared.plots import draw, new_figure, panels
from benchmarks.shared.rows import Row, append, find, read
from benchmarks.shared.tables import show
from benchmarks.shared.workloads import TASKS
from lightning_gossip.exchange.events import Events
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.simulation import Machine, Replicas, Setting, Uneven, simulate

FILE, PLOT = "scale_training.csv", "scale_training.png"
RANKS, BATCH = 4, 32
LR, MOMENTUM = 0.001, 0.99
PERIOD = 8
SLOW = 3
MACHINE = Machine(compute=0.028, payload=TASKS["mlp"].bytes, bandwidth=10e9)

SETUPS = {
    "asynchronous, one slow": (SLOW, 1, 1, 1),
    "asynchronous, three alone": (1, 1, 1),
    "asynchronous, nearly even": (1.03, 0.99, 1.01, 0.97),
    "asynchronous, even": (1, 1, 1, 1),
    "by step, even": None,
}
"""By name, what a step takes on every rank under asynchronous gossip, to that of a fast one."""


@dataclass
class Networks:
    """Replicas of the thesis' network, and what they are trained on.

    Attributes:
        values: all parameters; shape ``(ranks, parameters)``, float32. The networks' own are views of them.
        curve: what was seen at the end of each epoch's time: steps made by all ranks, and more (see :meth:`look`).
    """

    ranks: int
    data: Sets
    seed: int
    curve: list[dict[str, float]] = field(default_factory=list)
    made: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.networks = [mlp() for _ in range(self.ranks)]
        sizes = [parameter.numel() for parameter in self.networks[0].parameters()]
        self.values = torch.empty(self.ranks, sum(sizes))
        start = torch.cat([parameter.detach().flatten() for parameter in self.networks[0].parameters()])
        for network, row in zip(self.networks, self.values, strict=True):
            row.copy_(start)
            for parameter, part in zip(network.parameters(), row.split(sizes), strict=True):
                parameter.data = part.view_as(parameter)
        self._sizes = sizes
        self._optimizers = [
            torch.optim.SGD(network.parameters(), LR, MOMENTUM, nesterov=True) for network in self.networks
        ]
        self._batches = self._deal()

    def _deal(self) -> Iterator[Labelled]:
        """Give out batches one by one, epoch by epoch, to whoever asks."""
        train = self.data.train
        for epoch in range(10_000):
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, 0, "order"))
            order = torch.randperm(len(train.labels), generator=generator)
            yield from map(train.part, order.split(BATCH)[: len(order) // BATCH])

    def step(self, rank: int) -> None:
        """Make one step of ``rank``."""
        inputs, labels = next(self._batches)
        self._optimizers[rank].zero_grad()
        cross_entropy(self.networks[rank](inputs), labels).backward()
        self._optimizers[rank].step()
        self.made += 1

    def look(self) -> None:
        """Note the accuracy of the consensus on the test set, in percent, and the consensus distance."""
        consensus = mlp().eval()
        mean = self.values.mean(dim=0)
        for parameter, part in zip(consensus.parameters(), mean.split(self._sizes), strict=True):
            parameter.data = part.view_as(parameter)
        inputs, labels = self.data.test
        with torch.no_grad():
            right = sum(
                int((consensus(x).argmax(dim=1) == y).sum())
                for x, y in zip(inputs.split(1000), labels.split(1000), strict=True)
            )
        distance = (self.values - mean).square().sum(dim=1).mean().sqrt()
        seen = {"accuracy": 100 * right / len(labels), "distance": float(distance), "samples": self.made * BATCH}
        self.curve.append(seen)


class Asynchronous(Events):
    """Networks under asynchronous gossip.

    Args:
        networks: to be trained.
        speeds: what a step takes on every rank, to :data:`MACHINE`'s.
        look_every: median steps from one look to the next.
    """

    def __init__(self, networks: Networks, speeds: Sequence[float], look_every: int) -> None:
        machine = Uneven(**vars(MACHINE), speeds=tuple(speeds))
        setting = Setting("matching", period=PERIOD, seed=networks.seed)
        super().__init__(setting, machine, replicas=[row.numpy() for row in networks.values])
        self._networks, self._every, self._looks = networks, look_every, 0

    @override
    def update(self, number: int) -> None:
        self._networks.step(number)

    @override
    def look(self) -> None:
        if self._looks and self._looks % self._every == 0:  # steps that end at this very moment are not made yet
            self._networks.look()
        self._looks += 1


class ByStep(Replicas):
    """Networks under gossip by step; arguments as of :class:`Asynchronous`."""

    def __init__(self, networks: Networks, look_every: int) -> None:
        super().__init__(networks.values[:, :0], noise=0, rule=ElasticMixing(0.5))
        self.values = networks.values
        self._networks, self._every, self._looks = networks, look_every, 0

    @override
    def update(self) -> None:
        for rank in range(self._networks.ranks):
            self._networks.step(rank)

    @override
    def look(self) -> None:
        self._looks += 1
        if self._looks % self._every == 0:
            self._networks.look()


def train(setup: str, data: Sets, seed: int, epochs: int) -> list[dict[str, float]]:
    """Train for the time of ``epochs`` of 4 even ranks; return what was seen at the end of each."""
    steps = len(data.train.labels) // (RANKS * BATCH)
    speeds = SETUPS[setup]
    if speeds is None:
        networks = Networks(RANKS, data, seed)
        simulate(Setting("matching", period=PERIOD, seed=seed), RANKS, epochs * steps, [ByStep(networks, steps)])
    else:
        networks = Networks(len(speeds), data, seed)
        Asynchronous(networks, speeds, steps).run((epochs * steps + 1.5) * MACHINE.compute)
    return networks.curve


def run(args: Any) -> None:
    """Train what is not there yet; a training's rows are added at its end."""
    data = ImageData(Namespace(data_dir=args.data_dir, validation=8800, validate_on="held-out", seed=1234), "mnist")
    data.prepare_data()
    sets = data.load()
    for seed in args.seeds:
        for setup in args.setups:
            key = {"setup": setup, "seed": seed, "epochs": args.epochs}
            if find(read(args.out / FILE), key):
                continue
            began = time.monotonic()
            curve = train(setup, sets, seed, args.epochs)
            append(args.out / FILE, [key | {"epoch": n} | seen for n, seen in enumerate(curve, start=1)], digits=6)
            print(f"{setup}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


def series(rows: Sequence[Row], setup: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return times, in epochs of even ranks, and what was seen; shape ``(seeds, epochs)``."""
    of_seeds: dict[str, list[float]] = {}
    for row in find(rows, {"setup": setup}):
        of_seeds.setdefault(row["seed"], []).append(float(row[key]))
    values = np.array(list(of_seeds.values()))
    return np.arange(1, values.shape[-1] + 1, dtype=float), values


def curves(rows: Sequence[Row], key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return :func:`series` by name, that of gossip by step with a slow rank among them, up to the same time."""
    found = {setup: series(rows, setup, key) for setup in SETUPS if find(rows, {"setup": setup})}
    if (even := found.get("by step, even")) is not None:
        times, values = even
        found["by step, one slow"] = SLOW * times[: len(times) // SLOW], values[:, : len(times) // SLOW]
    return found


def print_table(rows: Sequence[Row]) -> None:
    """Print the last epoch's median over seeds, with the least and the most."""
    shown = []
    for setup, (times, values) in curves(rows, "accuracy").items():
        distances = curves(rows, "distance")[setup][1][:, -1]
        last = values[:, -1]
        accuracy = f"{np.median(last):.2f} ({last.min():.2f}–{last.max():.2f})"
        shown.append((setup, f"{times[-1]:g}", str(len(last)), accuracy, f"{np.median(distances):.2f}"))
    show("MNIST at equal wall time", ("set-up", "time", "seeds", "test %", "consensus distance"), shown)


def plot(rows: Sequence[Row]) -> Any:
    """Draw accuracy and consensus distance against time, as bands over the seeds."""
    figure = new_figure(9, 3.6)
    left, right = panels(figure, 2, share_y=False)
    for axes, key, label in ((left, "accuracy", "test accuracy, %"), (right, "distance", "consensus distance")):
        for setup, (times, values) in curves(rows, key).items():
            style = "--" if setup.startswith("by step") else "-"  # with even ranks both kinds make the same curve
            [line] = axes.plot(times, np.median(values, axis=0), style, label=setup)
            axes.fill_between(times, values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
        axes.set_xlabel("time, epochs of even ranks")
        axes.set_ylabel(label)
    left.set_ylim(bottom=94)
    left.legend()
    return figure


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    parser.add_argument("--data-dir", type=Path, help="of torchvision's MNIST; downloaded by default")
    names = "; ".join(SETUPS)
    parser.add_argument("--setups", choices=SETUPS, nargs="+", default=list(SETUPS), metavar="NAME", help=names)
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2])
    parser.add_argument("--epochs", type=at_least(1), default=25)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="print what is there and train nothing")
    parser.add_argument("--plot", action="store_true", help="draw what is there and train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not (args.table or args.plot):
        try:
            run(args)
        except DataNotFoundError as error:
            parser.error(str(error))
    rows = read(args.out / FILE)
    if args.plot:
        draw({args.out / PLOT: lambda: plot(rows)})
    print_table(rows)


if __name__ == "__main__":
    main()
