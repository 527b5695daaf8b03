"""What a worker asks of all shards at once: each function here is one kind of message, seen from the worker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from lightning_gossip.parameter_server.displacement import Cut, Pull, Push
from lightning_gossip.parameter_server.protocol import (
    Message,
    Position,
    ProtocolError,
    Status,
    as_bytes,
    fields,
    receive_json,
    receive_tensors,
    require,
)
from lightning_gossip.transport.header import Header
from lightning_gossip.transport.link import Link

Job = Callable[[Link, int], Position]
"""Runs in a link's thread, with the shard's number."""


def ask(
    link: Link,
    header: Header,
    tensors: Sequence[Tensor] = (),
    nbytes: int = 0,
    layout: int = 0,
    answered_as: Message | None = None,
) -> Position:
    """Ask one shard, in its link's thread, and return where it stood when it answered.

    Args:
        link: to the shard.
        header: of the question.
        tensors: its payload.
        nbytes, layout: of the answer's payload, which the caller receives.
        answered_as: kind of the answer, where it is not the question's.

    Raises:
        LinkError: if the answer does not fit.
        RuntimeError: if there is none.
    """
    answer = _answer(link, header, tensors)
    expected = (header.kind if answered_as is None else answered_as, header.step, nbytes, layout)
    if (answer.kind, answer.step, answer.nbytes, answer.layout) != expected:
        raise ProtocolError(f"the shard answered {header} by {answer}")
    return Position(answer.number, answer.extra)


def ask_for_json(link: Link, header: Header) -> Header:
    """Ask one shard, in its link's thread, and return the header of the JSON that it answers."""
    answer = _answer(link, header, ())
    if (answer.kind, answer.step) != (header.kind, header.step):
        raise ProtocolError(f"the shard answered {header} by {answer}")
    return answer


def ping(step: int) -> Job:
    """Give a sign of life, and hear where the shards stand."""
    return lambda link, shard: ask(link, Header(Message.PING, step, 0))


def of_shards(shards: Collection[int], job: Job, step: int) -> Job:
    """Do ``job`` on these shards, and give the others a sign of life."""
    alive = ping(step)
    return lambda link, shard: (job if shard in shards else alive)(link, shard)


def bye(step: int) -> Job:
    """Say goodbye."""
    return lambda link, shard: ask(link, Header(Message.BYE, step, 0))


def drop(step: int, worker: int) -> Job:
    """Say that the run goes on without ``worker``."""
    return lambda link, shard: ask(link, Header(Message.DROP, step, 0, number=worker))


def ready(step: int, training: int) -> Job:
    """End the warm-up."""
    return lambda link, shard: ask(link, Header(Message.READY, step, 0, number=training))


def initialise(cut: Cut, storage: Tensor, training: int, everybody: bool) -> Job:
    """Begin a training from ``storage``; ``everybody`` may begin at once, or has to wait for :func:`ready`."""

    def job(link: Link, shard: int) -> Position:
        setup = cut.setups[shard]
        header = Header(Message.INITIALISE, 0, setup.nbytes, setup.fingerprint, training, int(everybody))
        return ask(link, header, cut.parts(storage, shard))

    return job


def status(link: Link, shard: int) -> Status:
    """Ask how far the shard is."""
    answer = ask_for_json(link, Header(Message.STATUS, 0, 0))
    return Status(**fields(receive_json(link, answer), {"training": int, "ready": bool, "lead": str}))


def push(cut: Cut, step: int, training: int, under_way: Push) -> Job:
    """Send the displacement."""

    def job(link: Link, shard: int) -> Position:
        setup = cut.setups[shard]
        delta = cut.subtract(shard, under_way.copy, under_way.since, out=under_way.delta)
        return ask(link, Header(Message.PUSH, step, setup.nbytes, setup.fingerprint, training), delta)

    return job


def push_pull(cut: Cut, step: int, training: int, under_way: Push, pull: Pull) -> Job:
    """Send the displacement and get the parameters that it made, in one round trip."""

    def job(link: Link, shard: int) -> Position:
        setup = cut.setups[shard]
        delta = cut.subtract(shard, under_way.copy, under_way.since, out=under_way.delta)
        header = Header(Message.PUSH_PULL, step, setup.nbytes, setup.fingerprint, training)
        position = ask(link, header, delta, setup.nbytes, setup.fingerprint)
        receive_tensors(link, cut.parts(pull.received, shard))
        cut.subtract(shard, pull.received, pull.since, out=pull.move)
        return position

    return job


def pull(cut: Cut, step: int, training: int, into: Tensor, under_way: Pull | None = None) -> Job:
    """Get the parameters into the storage ``into``, and by how much the replica moves."""

    def job(link: Link, shard: int) -> Position:
        setup = cut.setups[shard]
        header = Header(Message.PULL, step, 0, number=training)
        position = ask(link, header, (), setup.nbytes, setup.fingerprint)
        receive_tensors(link, cut.parts(into, shard))
        if under_way is not None:
            cut.subtract(shard, into, under_way.since, out=under_way.move)
        return position

    return job


def hello(link: Link, payload: Tensor) -> float:
    """Say hello, and return after how many seconds of silence the shard takes this worker for lost.

    Raises:
        Refused: if the shard gives a reason not to serve.
    """
    link.send(Header(Message.HELLO, 0, payload.numel()), payload)
    answer = link.receive_header()
    link.flush()
    if answer.kind == Message.REFUSED:
        raise Refused(f"it refused: {receive_json(link, answer)}")
    require(answer.kind == Message.HELLO and answer.nbytes == 0, f"the shard answered HELLO by {answer}")
    return answer.number / 1000


class Refused(RuntimeError):
    """A shard gave a reason not to serve this worker."""


def _answer(link: Link, header: Header, tensors: Sequence[Tensor]) -> Header:
    link.send(header, *as_bytes(tensors))
    answer = link.receive_header()
    link.flush()
    return answer
