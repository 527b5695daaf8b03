"""The set-ups whose whole trainings are timed, by name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from benchmarks.network.schemes import DOWNPOUR, TIMEOUT
from lightning_gossip import DownpourStrategy, ElasticGossipStrategy

SGD = {"usual": (0.001, 0.99), "downpour": (0.1 / DOWNPOUR["n_push"], 0.0)}
"""Learning rate and Nesterov momentum, as in ``examples/mnist.py``."""

PERIOD = 8


@dataclass(frozen=True)
class WholeSetup:
    """What is trained.

    Attributes:
        strategy: class of it.
        arguments: of that.
        sgd: a key of :data:`SGD`.
    """

    strategy: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    sgd: str = "usual"

    @property
    def is_there(self) -> bool:
        """Whether the strategy has these arguments."""
        known = inspect.signature(self.strategy.__init__).parameters
        return self.strategy is DDPStrategy or set(self.arguments) <= set(known)


WHOLE = {
    "downpour, dealt": WholeSetup(DownpourStrategy, DOWNPOUR | {"dealt": True}, "downpour"),
    "downpour, fixed shares": WholeSetup(DownpourStrategy, DOWNPOUR | {"dealt": False}, "downpour"),
    "gossip, asynchronous, dealt": WholeSetup(
        ElasticGossipStrategy, {"period": PERIOD, "asynchronous": True, "dealt": True}
    ),
    "gossip, asynchronous, fixed shares": WholeSetup(
        ElasticGossipStrategy, {"period": PERIOD, "asynchronous": True, "dealt": False}
    ),
    "gossip, by step": WholeSetup(ElasticGossipStrategy, {"period": PERIOD, "dealt": False}),
    "ddp": WholeSetup(DDPStrategy),
}
"""By name; those whose arguments are not there are left out."""

NAMES = tuple(name for name, setup in WHOLE.items() if setup.is_there)


def make_whole_strategy(name: str, seed: int) -> Any:
    """Return the strategy of one of :data:`WHOLE`; ranks in namespaces of one host do not use its memory."""
    setup = WHOLE[name]
    arguments = dict(setup.arguments)
    if setup.strategy is DDPStrategy:
        return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
    if setup.strategy is ElasticGossipStrategy:
        arguments |= {"shared_memory": False, "seed": seed}
    return setup.strategy(**arguments, evaluate="consensus", timeout=TIMEOUT)
