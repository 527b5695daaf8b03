"""The rows of the thesis' tables (arXiv:1812.02407): what each id means, and the command of ours that trains it.

An id is method-workers[-probability][-alpha]: ``AR-4`` all-reduce, ``NC-4`` no communication, ``EG-4-0.031`` elastic
gossip at probability 1/32 and α = 0.5, ``EG-4-0.031-0.25`` at α = 0.25, ``GS-4-0.125`` gossiping SGD (pull),
``GS-4-tau8`` the same every 8 steps, ``EG-4-tau8d7`` elastic gossip every 8 steps and applied 7 steps late (ours).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

SEED = 1234
"""The thesis' only one."""
PROBABILITIES = {"0.5": 1 / 2, "0.125": 1 / 8, "0.031": 1 / 32, "0.008": 1 / 128, "0.002": 1 / 512, "0.0005": 1 / 2048}
"""Of taking part in a step, by the rounded number that stands in an id."""
METHODS = {
    "AR": ("all-reduce", "all-reduce"),
    "NC": ("no-communication", "none"),
    "EG": ("elastic-gossip", "elastic-gossip"),
    "GS": ("gossiping-sgd-pull", "gossip"),
}
"""The thesis' name of each method and the examples' ``--strategy``."""
DEFAULT_ALPHA = 0.5
_ID = re.compile(
    r"(?P<method>AR|NC|EG|GS)-(?P<workers>[1-9]\d*)(-(?P<rate>\d+\.\d+|tau[1-9]\d*(d[1-9]\d*)?))?(-(?P<alpha>\d+(\.\d+)?))?"
)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        id: as in the thesis.
        method: a key of :data:`METHODS`.
        workers: replicas.
        probability: of a worker to choose a partner in a round; None without gossip.
        period: steps from one round to the next.
        alpha: of elastic gossip; None for others.
        delay: steps from posting an exchange to applying it.
    """

    id: str
    method: str
    workers: int
    probability: float | None = None
    period: int = 1
    alpha: float | None = None
    delay: int = 0

    @property
    def rate(self) -> float:
        """Rounds a step that a worker begins, on the mean: 1 for all-reduce, 0 without communication."""
        return self.probability / self.period if self.probability is not None else float(self.method == "AR")

    @property
    def place(self) -> tuple[int, float, str, float]:
        """What rows are sorted by in tables and legends: all-reduce first, then by falling rate."""
        return self.workers, -math.inf if self.method == "AR" else -self.rate, self.method, self.alpha or self.period

    @property
    def options(self) -> list[str]:
        """The examples' options for this row."""
        options = ["--strategy", METHODS[self.method][1], "--devices", str(self.workers)]
        if self.probability is not None:
            options += ["--probability", f"{self.probability}", "--period", f"{self.period}", "--peers", "uniform"]
        if self.alpha is not None:
            options += ["--alpha", f"{self.alpha}"]
        if self.delay:
            options += ["--delay", f"{self.delay}"]
        return options + (["--variant", "pull"] if self.method == "GS" else [])


@dataclass(frozen=True)
class Experiment:
    """A network on a data set.

    Args:
        name: in file names.
        title: in plots and tables.
        script: the example that trains it.
        options: of the example, the same for all rows; its own defaults are the thesis' hyper-parameters.
        epochs: of a whole row.
        reference: beginning of the name of the file with the published numbers; None where there are none.
    """

    name: str
    title: str
    script: str
    options: tuple[str, ...]
    epochs: int
    reference: str | None


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment("mnist", "MNIST", "mnist.py", (), 100, "thesis_mnist"),
        Experiment(
            "cifar10_resnet18",
            "CIFAR-10, pre-activation ResNet-18",
            "cifar10.py",
            ("--model", "preact_resnet18", "--accelerator", "cuda"),
            50,
            "thesis_cifar10",
        ),
        Experiment("cifar10_alexnet", "CIFAR-10, AlexNet", "cifar10.py", ("--model", "alexnet"), 20, None),
    )
}

_GOSSIP_W4 = ["EG-4-0.031", "GS-4-0.031", "AR-4", "NC-4", "EG-4-0.125", "GS-4-0.125"]
_RARE_W4 = ["EG-4-0.008", "GS-4-0.008", "EG-4-0.002", "GS-4-0.002"]
TABLES: dict[str, tuple[str, list[str]]] = {
    "mnist-alpha0.5-w4": ("mnist", _GOSSIP_W4 + _RARE_W4),
    "mnist-alpha0.5-w8": ("mnist", [f"{m}-8-{p}" for p in ("0.031", "0.008", "0.002") for m in ("EG", "GS")]),
    "mnist-alpha-p0.031-w4": ("mnist", ["EG-4-0.031", *(f"EG-4-0.031-{a}" for a in ("0.05", "0.25", "0.75", "0.95"))]),
    "mnist-alpha-p0.0005-w4": ("mnist", ["EG-4-0.0005", *(f"EG-4-0.0005-{a}" for a in (0.05, 0.25, 0.75, 0.95))]),
    "mnist-alpha-p0.0005-w8": ("mnist", ["EG-8-0.0005", "EG-8-0.0005-0.05", "EG-8-0.0005-0.25"]),
    "mnist-delay-w4": ("mnist", ["EG-4-tau8", "EG-4-tau8d7"]),
    "mnist-period-w4": ("mnist", ["GS-4-tau8", "GS-4-tau32", "GS-4-tau128", "GS-4-tau512"]),
    "cifar10-resnet18-w4": ("cifar10_resnet18", _GOSSIP_W4 + _RARE_W4),
    "cifar10-alexnet-w4": ("cifar10_alexnet", ["AR-4", "NC-4", "EG-4-0.031", "GS-4-0.031"]),
}
"""For each table its experiment and the ids of its rows, the most telling first."""


def parse(row_id: str) -> Row:
    """Return what ``row_id`` means.

    Raises:
        ValueError: for one that is not a row's.
    """
    match = _ID.fullmatch(row_id)
    if match is None:
        raise ValueError(
            f"no row {row_id!r}: ids are like AR-4, NC-4, EG-4-0.031, EG-4-0.031-0.25, GS-4-0.125, GS-4-tau8"
        )
    method, rate, alpha = match["method"], match["rate"], match["alpha"]
    gossips = method in ("EG", "GS")
    if (rate is not None) != gossips:
        raise ValueError(f"row {row_id!r}: {method} {'needs a' if gossips else 'has no'} probability or period")
    if alpha is not None and (method != "EG" or not 0 < float(alpha) <= 1):
        raise ValueError(f"row {row_id!r}: only EG has an alpha, in (0, 1], got {alpha}")
    workers = int(match["workers"])
    if not gossips:
        return Row(row_id, method, workers)
    if rate.startswith("tau"):
        steps, _, late = rate.removeprefix("tau").partition("d")
        probability, period, delay = 1.0, int(steps), int(late or 0)
        if delay >= period:
            raise ValueError(f"row {row_id!r}: the delay must be below the period, {period}, got {delay}")
    elif rate in PROBABILITIES:
        probability, period, delay = PROBABILITIES[rate], 1, 0
    else:
        raise ValueError(f"row {row_id!r}: the probability must be one of {', '.join(PROBABILITIES)}, got {rate}")
    if method == "GS":
        return Row(row_id, method, workers, probability, period, delay=delay)
    return Row(row_id, method, workers, probability, period, DEFAULT_ALPHA if alpha is None else float(alpha), delay)
