"""The Lightning glue of schemes with an exchange clock: a step begins and ends with it, checkpoints hold its state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed import Store
from typing_extensions import override

from lightning_gossip.arguments import check_wire_dtype
from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import MemberControl
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.models import shared_parameters
from lightning_gossip.exchange.stats import ExchangeStats
from lightning_gossip.strategies import lightning_compat
from lightning_gossip.strategies.base import ReplicaStrategy
from lightning_gossip.strategies.lightning_names import pl, rank_zero_warn
from lightning_gossip.transport.link import Links
from lightning_gossip.transport.link_transport import end_of_rank


class Clock(Protocol):
    """What clocks of the ``exchange`` room have in common (:class:`~lightning_gossip.exchange.clock.Exchange`)."""

    step: int
    measure: bool

    @property
    def stats(self) -> ExchangeStats: ...  # noqa: D102
    def begin(self) -> None: ...  # noqa: D102
    def end(self) -> None: ...  # noqa: D102
    def align(self, clock: int) -> None: ...  # noqa: D102
    def reset_links(self, generation: int) -> None: ...  # noqa: D102
    def arrive(self) -> None: ...  # noqa: D102
    def drop(self) -> None: ...  # noqa: D102
    def settle(self) -> None: ...  # noqa: D102
    def state_to_join(self) -> dict[str, Any]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


C = TypeVar("C", bound=Clock)

Parameters = Callable[[], Mapping[str, Tensor]]
"""Returns a replica's parameters by name, but those that stay with each rank."""


class ClockedStrategy(ReplicaStrategy, Generic[C]):
    """Replicas whose exchanges a clock posts and applies, around every step.

    Args:
        wire_dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float32`` or its name: what travels is rounded to it
            where it is narrower than the parameter; None sends it as it is.
        launch: see :class:`~lightning_gossip.strategies.base.ReplicaStrategy`.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(self, *, wire_dtype: torch.dtype | str | None, **launch: Any) -> None:
        self.wire_dtype = check_wire_dtype("wire_dtype", wire_dtype)
        self._exchange: C | None = None
        self._last_step = 0
        super().__init__(**launch)

    @abstractmethod
    def make_exchange(self, parameters: Parameters, control: Control, store: Store) -> C:
        """Return this rank's clock for a ``fit``; ``store`` is a connection that nobody blocks."""

    @property
    @abstractmethod
    def round_every(self) -> int:
        """Steps from one round to the next; the first comes at that step."""

    def make_links(self, control: Control, store: Store) -> Links:
        """Return this rank's links to the others."""
        own = control.incarnation if isinstance(control, MemberControl) else 0
        return Links(store, end_of_rank(self.global_rank, own), control.timeout)

    @property
    @override
    def hyperparameters(self) -> dict[str, Any]:
        wire_dtype = None if self.wire_dtype is None else str(self.wire_dtype).removeprefix("torch.")
        return {"wire_dtype": wire_dtype, **super().hyperparameters}

    @property
    @override
    def step(self) -> int:
        return self._exchange.step if self._exchange is not None else self._last_step

    @property
    def exchange(self) -> C | None:
        """This rank's exchanges, with their counts and times in ``exchange.stats``; None outside ``fit``."""
        return self._exchange

    @override
    def start_training(self, trainer: pl.Trainer, control: Control, store: Store) -> None:
        module = self._module
        self._exchange = self.make_exchange(lambda: shared_parameters(module), control, store)
        if trainer.global_step > 0:  # a further `fit` of one training
            self.continue_from(self._last_step)
        # before callbacks put averages of their own in place of the replicas
        lightning_compat.before_training_ends(trainer, self.settle)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        most = lightning_compat.most_steps(self._module.trainer)
        if self.world_size == 1:
            rank_zero_warn(
                f"{type(self).__name__} trains a single rank, which exchanges nothing: give the Trainer `devices=2` or"
                " more, or `num_nodes`."
            )
        elif (self.step + most) // self.round_every <= self.step // self.round_every:
            rank_zero_warn(
                f"Nothing will ever be exchanged: rounds come every {self.round_every} steps, and this `fit` makes"
                f" {most:g} steps at most, from step {self.step}. Give {type(self).__name__} a smaller `period`."
            )

    @override
    def continue_from(self, step: int) -> None:
        self._running.align(step)

    @override
    def before_meeting(self) -> None:
        if self._exchange is not None:
            self._exchange.arrive()

    @override
    def on_meeting(self, meeting: Meeting) -> None:
        if self._exchange is not None:
            self._exchange.align(meeting.clock)
            if meeting.skipped:
                self._exchange.reset_links(meeting.number)

    @override
    def training_state(self) -> dict[str, Any]:
        return self._running.state_dict()

    @override
    def training_state_to_join(self) -> dict[str, Any]:
        return self._running.state_to_join()

    @override
    def align(self, clock: int) -> None:
        self._running.align(clock)

    @override
    def load_training_state(self, state: dict[str, Any]) -> None:
        self._running.load_state_dict(state)

    @override
    def begin_step(self) -> None:
        self._running.begin()

    @override
    def end_step(self) -> None:
        self._running.end()

    @override
    def settle(self) -> None:
        self._running.settle()

    @override
    def give_up(self) -> None:
        self._running.drop()

    @override
    def end_training(self) -> None:
        if self._exchange is not None:
            self._last_step = self._exchange.step
            self._exchange.close()
            self._exchange = None

    @property
    def _running(self) -> C:
        if self._exchange is None:
            raise RuntimeError(f"{type(self).__name__} is not in `fit`")
        return self._exchange
