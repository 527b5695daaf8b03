"""A process that joins a training under Lightning: a resume whose file comes over a link (design §10).

Up to its first step a joiner is alone: the others train, and meet for nothing of what a beginning takes. So its
collectives go to a group of its own; what the others agreed on when they began, it reads in the run's store.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import Store

from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.strategies.joined_epoch import Stand
from lightning_gossip.strategies.lightning_names import MisconfigurationException
from lightning_gossip.transport import handover

_KEY = "beginning"
_HANDED_ON = "LIGHTNING_GOSSIP_"
_OF_A_PROCESS = ("timeout", "lost_after", "restarts", "start_method", "min_replicas")
"""Arguments in which a process may differ from those of the beginning."""


@dataclass
class Beginning:
    """What ranks agreed on when they began, for those that come later.

    Attributes:
        broadcasts: what each broadcast gave, in their order.
        gathered: what was last gathered for each reason for which ranks gather at the beginning.
        identity: by name, what has to be alike: the strategy, its arguments, the model's tensors.
        environment: variables that this package hands on to processes.
    """

    broadcasts: list[Any] = field(default_factory=list)
    gathered: dict[str, list[Any]] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def publish(self, store: Store) -> None:
        """Let those that come later read it. Each rank calls this, for any of them may be the last that is left."""
        if store.check([_KEY]):
            return
        self.environment = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
        store.set(_KEY, pickle.dumps(self).decode("latin-1"))

    @classmethod
    def read(cls, store: Store) -> Beginning | None:
        """Return what was published, if it was."""
        if not store.check([_KEY]):
            return None
        found: Beginning = pickle.loads(store.get(_KEY).decode().encode("latin-1"))
        return found


class Joiner:
    """What a process does between its coming to a seat and its first step.

    Args:
        control: of this rank; has its seat.
        store: of the run, on a connection that nobody blocks.
    """

    def __init__(self, control: MemberControl, store: Store) -> None:
        self.control = control
        self._store = store
        self._beginning: Beginning | None = None
        self._broadcasts = 0
        self.donor = -1
        self.stand: Stand | None = None
        """Where the donor stands in its epoch."""

    @property
    def beginning(self) -> Beginning:
        """What the others agreed on when they began.

        Raises:
            RunStopped, RunOver: where they end before they have.
        """
        if self._beginning is None:
            self._beginning = self.control.await_members(lambda: Beginning.read(self._store))
        return self._beginning

    def broadcast(self, own: Any) -> Any:
        """Return what the others' next broadcast gave; ``own``, where they had no more."""
        given = self.beginning.broadcasts
        self._broadcasts += 1
        return given[self._broadcasts - 1] if self._broadcasts <= len(given) else own

    def gather(self, own: Any, reason: str) -> list[Any]:
        """Return what the others gathered for ``reason``, for they go by that; this rank's own where they did not."""
        return list(self.beginning.gathered.get(reason, (own,)))

    def check_identity(self, own: Mapping[str, Any]) -> None:
        """Raise ``MisconfigurationException`` if this process would train something else than the others do."""
        if differing := handover.differences(own, self.beginning.identity):
            raise MisconfigurationException(
                f"rank {self.control.rank} can not join: it differs from those that train. {differing}"
            )

    def state(self) -> dict[str, Any] | None:
        """Ask for a donor, and return its state; None where it was lost, or what came was not whole.

        Raises:
            RunStopped: if the run ends.
            RunOver: if its training is over.
        """
        self.control.ask()
        donor = self.control.await_donor()
        self.donor = donor.rank
        try:
            return handover.state_of(donor, self.control, self._store)
        except (pickle.UnpicklingError, AttributeError) as error:
            raise MisconfigurationException(
                "a checkpoint of this training holds objects that do not travel: a joiner takes tensors, numbers,"
                f" strings and containers of them only, as `torch.load(weights_only=True)`: {error}"
            ) from error


def identity_of(strategy: str, arguments: Mapping[str, Any], tensors: Mapping[str, str]) -> dict[str, Any]:
    """Return by name what two processes of one training have in common."""
    arguments = {f"argument `{name}`": v for name, v in arguments.items() if name not in _OF_A_PROCESS}
    return {"the strategy": strategy, **arguments, **tensors}
