"""The push and the pull that are under way: at most one of each, noticed and applied at the ends of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_gossip.exchange.flat_mixing import is_finite
from lightning_gossip.parameter_server import questions
from lightning_gossip.parameter_server.displacement import Cut, Displacement, Push
from lightning_gossip.parameter_server.protocol import Position
from lightning_gossip.parameter_server.shard_links import Question, ShardLinks

T = TypeVar("T")


@dataclass
class DownpourStats:
    """What this worker did: counts since the start of the training, ``…_seconds`` of the last step.

    Attributes:
        pushes: acknowledged.
        pulls: applied.
        bytes_sent: of payload.
        staleness: of the last acknowledged push: the updates by other workers that the shards got between the pull
            that this worker had applied last and the push; the maximum over shards.
        wait_seconds: that training waited for a shard.
        call_seconds: that training spent at the end of the step, waiting included.
        healed: how often this replica was not finite, and took the server's parameters in its place.
    """

    pushes: int = 0
    pulls: int = 0
    bytes_sent: int = 0
    staleness: int = 0
    wait_seconds: float = 0.0
    call_seconds: float = 0.0
    healed: int = 0


@dataclass(frozen=True)
class Answered:
    """A push that was acknowledged, or a pull that was applied: a recorded order of events can be replayed.

    Attributes:
        kind: ``"push"`` or ``"pull"``.
        asked: step at whose end it was sent.
        step: step at whose end it was noticed, or applied.
        versions: made by the push, or read by the pull; one a shard.
        staleness: of a push.
    """

    kind: str
    asked: int
    step: int
    versions: tuple[int, ...]
    staleness: int = 0


@dataclass(frozen=True)
class _Asked:
    """A question under way; ``seen`` is what the replica had of others' updates when it was asked, one a shard."""

    step: int
    question: Question[Position]
    seen: tuple[int, ...]


class Traffic:
    """One training's pushes and pulls.

    Args:
        links: to the shards.
        cut: of the parameters.
        device: where they are.
        training: its number.
        stats: to be kept.
        on_answer: called with every push acknowledged and pull applied.
    """

    def __init__(
        self,
        links: ShardLinks,
        cut: Cut,
        device: torch.device,
        training: int,
        stats: DownpourStats,
        on_answer: Callable[[Answered], None],
    ) -> None:
        self.displacement = Displacement(cut, device)
        self.training = training
        self.seen = (0,) * cut.shards
        self._known = self.seen
        self._links = links
        self._cut = cut
        self._stats = stats
        self._on_answer = on_answer
        self._push: _Asked | None = None
        self._pull: _Asked | None = None
        self._ping: Question[Position] | None = None

    @property
    def can_push(self) -> bool:
        """Whether no push is under way."""
        return self._push is None

    @property
    def can_pull(self) -> bool:
        """Whether no pull is under way."""
        return self._pull is None

    @property
    def held(self) -> dict[str, Any]:
        """What tells which parameters the server holds: their names, and a fingerprint with shapes and dtypes."""
        layout = self._cut.layout
        return {"layout": layout.fingerprint, "names": list(layout.shapes)}

    def state_dict(self) -> dict[str, Any]:
        """Return what this worker had of the server, and had sent to it; nothing may be under way."""
        reference = self._cut.whole(self.displacement.reference())
        return {"seen": list(self.seen), "reference": [part.clone() for part in reference]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, whatever the number of shards."""
        self.displacement.begin_from(state["reference"])
        seen = state["seen"]  # shards that are cut anew hold elements of those that were seen least
        self.seen = tuple(seen) if len(seen) == self._cut.shards else (min(seen),) * self._cut.shards

    def count_in(self, stats: DownpourStats) -> None:
        """Go on counting in ``stats``."""
        self._stats = stats

    def begin(self, job: questions.Job | None, step: int, warms_up: bool) -> tuple[bool, bool]:
        """Begin the training on the shards if this worker leads, or else wait for who does.

        Args:
            job: begins it on a shard; None where this worker has not what the server is to go on from.
            step: of the clock.
            warms_up: whether the others have to wait after that.

        Returns:
            Whether this worker leads, and whether it began the training on all shards: where another one led before,
            the server may hold something else than ``job`` brings.

        Raises:
            ShardLost: if a shard failed.
            RuntimeError: if it leads, and there is no job.
            RunStopped: if some rank stopped.
        """
        shards = self._links.await_training(self.training)
        if shards is None:
            return False, False
        if shards and job is None:
            raise RuntimeError("the worker that has the server's state was lost before the server had it: resume again")
        if job is not None:
            self.learn(self.wait(self._links.ask(questions.of_shards(shards, job, step))))
        begins = len(shards) == self._cut.shards
        if not begins and not warms_up:
            self.wait(self._links.ask(questions.ready(step, self.training)))
        return True, begins

    def take_over(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Wait for the server's parameters and make ``parameters`` exactly them.

        Raises:
            ShardLost: if a shard failed.
            RunStopped: if some rank stopped.
        """
        storage = self.displacement.free()
        positions = self.wait(self._links.ask(questions.pull(self._cut, step, self.training, storage)))
        self.displacement.copies.write(storage, parameters)
        self.displacement.begin(parameters)
        self._pulled(positions, step, step)

    def restart(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Give up what was made since the last push, and go on from the server's parameters; no push is under way.

        Raises:
            ShardLost, RunStopped: as :meth:`take_over`.
            RuntimeError: if these are not finite.
        """
        if self._pull is not None:
            self.wait(self._pull.question)
            self._pull = None
        self.take_over(parameters, step)
        if not is_finite(self.displacement.reference(), self._cut.layout):
            raise RuntimeError(f"the server's parameters are not finite either at step {step}")
        self._stats.healed += 1

    def push(self, parameters: Mapping[str, Tensor], step: int, pull: bool = False) -> bool:
        """Send the displacement; return False, having sent nothing, if the parameters are not finite.

        Args:
            parameters: of the replica.
            step: of the clock.
            pull: whether to ask for the server's parameters, in the same round trip.
        """
        under_way = self.displacement.start_push(parameters)
        if under_way is None:
            return False
        if pull:
            self._push_pull(under_way, step)
            return True
        job = questions.push(self._cut, step, self.training, under_way)
        self._push = _Asked(step, self._links.ask(job), self.seen)
        self._stats.bytes_sent += sum(setup.nbytes for setup in self._cut.setups)
        return True

    def pull(self, step: int) -> None:
        """Ask for the server's parameters."""
        under_way = self.displacement.start_pull()
        job = questions.pull(self._cut, step, self.training, under_way.received, under_way)
        self._pull = _Asked(step, self._links.ask(job), self.seen)

    def _push_pull(self, push: Push, step: int) -> None:
        pull = self.displacement.start_pull(after=push)
        job = questions.push_pull(self._cut, step, self.training, push, pull)
        self._push = self._pull = _Asked(step, self._links.ask(job), self.seen)
        self._stats.bytes_sent += sum(setup.nbytes for setup in self._cut.setups)

    def collect(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Notice an acknowledged push, and apply a pull that all shards answered.

        Raises:
            ShardLost: if a shard failed.
        """
        self.collect_push(step)
        if self._pull is None or not self._pull.question.settled.is_set():
            return
        asked, positions = self._pull, self._links.wait(self._pull.question)
        self.displacement.end_pull(parameters)
        self._pull = None
        self._pulled(positions, asked.step, step)

    def collect_push(self, step: int) -> None:
        """Notice an acknowledged push.

        Raises:
            ShardLost: if a shard failed.
        """
        if self._push is None or not self._push.question.settled.is_set():
            return
        asked, positions = self._push, self._links.wait(self._push.question)
        self.displacement.end_push()
        self._push = None
        self.learn(positions)
        staleness = max(p.others - seen for p, seen in zip(positions, asked.seen, strict=True))
        self._stats.pushes += 1
        self._stats.staleness = staleness
        self._on_answer(Answered("push", asked.step, step, _versions(positions), staleness))

    def keep_up(self, parameters: Mapping[str, Tensor], step: int, limit: int) -> None:
        """Wait for a pull if the replica is known to be more than ``limit`` updates behind.

        Where nothing is under way that will tell, ask how far the shards are, to know it at the next step's end.

        Raises:
            ShardLost: if a shard failed.
            RunStopped: if some rank stopped.
        """
        if self._ping is not None and self._ping.settled.is_set():
            self.learn(self._links.wait(self._ping))
            self._ping = None
        while max(known - seen for known, seen in zip(self._known, self.seen, strict=True)) > limit:
            if self._pull is None:
                self.pull(step)
            if self._pull is not None:
                self.wait(self._pull.question)
            self.collect(parameters, step)
        if self._push is None and self._pull is None and self._ping is None:
            self._ping = self._links.ask(questions.ping(step))

    def drain(self, step: int) -> None:
        """Wait until everything sent is on the server, and everything asked for is here (but not applied).

        Raises:
            ShardLost: if a shard failed.
            RunStopped: if some rank stopped.
        """
        for asked in (self._push, self._pull):
            if asked is not None:
                self.wait(asked.question)
        self.collect_push(step)

    def wait(self, question: Question[T]) -> list[T]:
        """Wait for an answer, and count the seconds; raises as :meth:`ShardLinks.wait`."""
        begin = time.perf_counter()
        try:
            return self._links.wait(question)
        finally:
            self._stats.wait_seconds += time.perf_counter() - begin

    def learn(self, positions: list[Position]) -> None:
        """Note how far the shards are."""
        self._known = tuple(max(known, p.others) for known, p in zip(self._known, positions, strict=True))

    def _pulled(self, positions: list[Position], asked: int, step: int) -> None:
        self.learn(positions)
        self.seen = tuple(position.others for position in positions)
        self._stats.pulls += 1
        self._on_answer(Answered("pull", asked, step, _versions(positions)))


def _versions(positions: list[Position]) -> tuple[int, ...]:
    return tuple(position.version for position in positions)
