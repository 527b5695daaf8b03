"""A shard's state: its stretch of the parameters θ̃ and what pushes do to it. No transport here.

Dean et al., "Large Scale Distributed Deep Networks" (2012), §4.1.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gossip.parameter_server.protocol import Position, ProtocolError, Setup, require


@dataclass
class ShardState:
    """All that a shard would need to go on elsewhere.

    Attributes:
        version: number of updates.
        pushes: how many of them each worker made, by its number.
        parameters: a 1-D tensor a segment.
        optimizer: the server optimizer's state by name, a segment; None before its first step.
    """

    version: int
    pushes: dict[int, int]
    parameters: list[Tensor]
    optimizer: list[dict[str, Tensor]] | None


class Shard:
    """One shard. Every method may be called from any thread; an update is atomic for all others.

    Args:
        setup: what all workers agreed on.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.lock = threading.Lock()
        self.training = 0
        self.version = 0
        self.ready = False
        self.pushes: Counter[int] = Counter()
        self.dropped: set[int] = set()  # numbers
        self._heard = list(range(setup.workers))  # by seat, the highest number that was heard of
        self._parameters: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._stepped = False

    @property
    def lead(self) -> int:
        """The worker that begins trainings, and warms up: the lowest that is not dropped."""
        return min(self.workers, default=0)

    @property
    def workers(self) -> set[int]:
        """The numbers of those that may come, or are there, or were and are not dropped: one a seat at the most."""
        return set(self._heard).difference(self.dropped)

    def welcome(self, worker: int) -> None:
        """Let ``worker`` take part, in its seat's last one's place.

        Raises:
            ProtocolError: if it was dropped, or comes after one of a higher number.
        """
        with self.lock:
            last = self._heard[worker % self.setup.workers]
            if worker in self.dropped or worker < last:
                raise ProtocolError(f"{self.setup.name_of(worker)} was dropped: the others go on without it")
            self._hear_of(worker)

    def drop(self, worker: int) -> None:
        """Let ``worker`` change nothing from now on, nor those of its seat before it; what they pushed stays."""
        with self.lock:
            self._hear_of(worker)
            self.dropped.add(worker)

    def initialise(self, training: int, parameters: Sequence[Tensor], ready: bool, worker: int = 0) -> Position:
        """Begin a training from ``parameters`` (a 1-D tensor a segment, taken over).

        Args:
            training: its number, one more than the last one's.
            parameters: the lead's.
            ready: whether the others may begin at once.
            worker: that says so.

        Raises:
            ProtocolError: if it is not this training's turn, or not the lead.
        """
        return self.load(training, ShardState(0, {}, list(parameters), None), ready, worker)

    def load(self, training: int, state: ShardState, ready: bool, worker: int = 0) -> Position:
        """Begin a training from ``state``, which is taken over; see :meth:`initialise`."""
        with self.lock:
            self._check_lead(worker)
            require(training == self.training + 1, f"training {training} can not follow training {self.training}")
            self._parameters = [p.requires_grad_() for p in state.parameters]
            optimizer = self.setup.optimizer
            self._optimizer = None if optimizer is None else optimizer.build(self._parameters)
            if self._optimizer is not None and state.optimizer is not None:
                for parameter, tensors in zip(self._parameters, state.optimizer, strict=True):
                    self._optimizer.state[parameter] = dict(tensors)
            self._stepped = state.optimizer is not None
            self.version, self.pushes = state.version, Counter(state.pushes)
            self.training, self.ready = training, ready
            return self._position(0)

    def begin_all(self, training: int, worker: int = 0) -> Position:
        """End the warm-up: workers other than the lead may begin."""
        with self.lock:
            self._check(training)
            self._check_lead(worker)
            self.ready = True
            return self._position(0)

    def push(self, worker: int, training: int, delta: Sequence[Tensor]) -> Position:
        """Apply a displacement.

        Args:
            worker: that made it.
            training: to which it belongs.
            delta: a 1-D tensor a segment; overwritten where an optimizer takes it.

        Returns:
            The version that it made, and the updates by others until then.

        Raises:
            ProtocolError: before the shard is initialised, or the warm-up ended, or once ``worker`` is dropped.
        """
        self._negate(delta)
        with self.lock:
            self._update(worker, training, delta)
            return self._position(worker)

    def pull(self, worker: int, training: int, out: Sequence[Tensor]) -> Position:
        """Copy the parameters to ``out`` and return the version that was read.

        Raises:
            ProtocolError: before the shard is initialised.
        """
        with self.lock:
            self._check(training)
            self._read(out)
            return self._position(worker)

    def push_pull(self, worker: int, training: int, delta: Sequence[Tensor]) -> Position:
        """Apply a displacement and read the parameters that it made to ``delta``; see :meth:`push`."""
        self._negate(delta)
        with self.lock:
            self._update(worker, training, delta)
            self._read(delta)
            return self._position(worker)

    def position(self, worker: int) -> Position:
        """Return where the shard stands."""
        with self.lock:
            return self._position(worker)

    def save(self, training: int) -> ShardState:
        """Return a copy of the state.

        Raises:
            ProtocolError: before the shard is initialised.
        """
        with self.lock:
            self._check(training)
            parameters = [p.detach().clone() for p in self._parameters]
            optimizer = None
            if self._optimizer is not None and self._stepped:
                states: list[Mapping[str, Tensor]] = [self._optimizer.state[p] for p in self._parameters]
                optimizer = [{name: state[name].clone() for name in sorted(state)} for state in states]
            return ShardState(self.version, dict(self.pushes), parameters, optimizer)

    # -- with the lock held, but for _negate ----------------------------------------------------------------------

    def _hear_of(self, worker: int) -> None:
        seat = worker % self.setup.workers
        if worker > self._heard[seat]:
            self.dropped.add(self._heard[seat])
            self._heard[seat] = worker

    def _check(self, training: int) -> None:
        require(self.training > 0, "the shard is not initialised yet")
        require(training == self.training, f"training {training} is not the one under way, {self.training}")

    def _check_lead(self, worker: int) -> None:
        lead = self.lead
        require(worker == lead, f"{self._name(worker)} sent what only {self._name(lead)} may")

    def _name(self, worker: int) -> str:
        return self.setup.name_of(worker)

    def _position(self, worker: int) -> Position:
        return Position(self.version, self.version - self.pushes[worker])

    def _negate(self, delta: Sequence[Tensor]) -> None:
        if self.setup.optimizer is not None:  # the displacement downhill is minus the gradient
            for part in delta:
                part.neg_()

    def _update(self, worker: int, training: int, delta: Sequence[Tensor]) -> None:
        self._check(training)
        if worker in self.dropped:
            raise ProtocolError(f"{self._name(worker)} was dropped: the others go on without it")
        if not self.ready and worker != (lead := self.lead):
            raise ProtocolError(f"{self._name(worker)} pushed while {self._name(lead)} warms up")
        with torch.no_grad():
            if self._optimizer is None:
                for parameter, part in zip(self._parameters, delta, strict=True):
                    parameter.add_(part)
            else:
                for parameter, part in zip(self._parameters, delta, strict=True):
                    parameter.grad = part
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
                self._stepped = True
        self.version += 1
        self.pushes[worker] += 1

    def _read(self, out: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, part in zip(self._parameters, out, strict=True):
                part.copy_(parameter)
