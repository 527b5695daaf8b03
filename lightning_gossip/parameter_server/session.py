"""One worker's link, seen from the shard: read a question, check it, answer it, until it says goodbye."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta

from torch import Tensor

from lightning_gossip.parameter_server.protocol import (
    Message,
    Position,
    ProtocolError,
    Setup,
    as_bytes,
    encode,
    fields,
    receive_json,
    receive_tensors,
    require,
    size_of,
    state_tensors,
)
from lightning_gossip.parameter_server.roster import Roster
from lightning_gossip.parameter_server.shard import Shard, ShardState
from lightning_gossip.transport.header import Header
from lightning_gossip.transport.link import Link

log = logging.getLogger(__name__)


class Session:
    """Serves one link; everything here runs in the link's thread.

    Args:
        link: to the worker.
        roster: of the shard.
        timeout: how long a worker may give no sign of life.
    """

    def __init__(self, link: Link, roster: Roster, timeout: timedelta) -> None:
        self.worker = -1
        self.name = ""  # of the worker, for people, once it has said hello
        self._link = link
        self._roster = roster
        self._timeout = timeout
        self._buffer: list[Tensor] = []
        self._answers: dict[int, Callable[[Shard, Header], None]] = {
            Message.INITIALISE: self._initialise,
            Message.LOAD: self._load,
            Message.READY: self._ready,
            Message.STATUS: self._status,
            Message.PUSH: self._push,
            Message.PULL: self._pull,
            Message.PUSH_PULL: self._push_pull,
            Message.PING: self._ping,
            Message.SAVE: self._save,
            Message.DROP: self._drop,
        }

    def serve(self) -> None:
        """Answer until the worker says goodbye.

        Raises:
            ProtocolError: if it sent what does not fit.
            RuntimeError: if it is gone, or was silent past the timeout.
        """
        shard = self._welcome()
        goodbye = False
        try:
            while (header := self._link.receive_header(self._timeout)).kind != Message.BYE:
                answer = self._answers.get(header.kind)
                if answer is None:
                    raise ProtocolError(f"unknown question {header}")
                answer(shard, header)
            self._expect(header)
            goodbye = True
            self._reply(header, Position(0, 0))
        finally:
            self._roster.leave(self.worker, goodbye)

    # -- questions ------------------------------------------------------------------------------------------------

    def _welcome(self) -> Shard:
        header = self._link.receive_header(self._timeout)
        require(header.kind == Message.HELLO, f"expected HELLO, got {header}")
        self._expect(header, nbytes=header.nbytes)
        try:
            hello = fields(receive_json(self._link, header), {"worker": int, "setup": dict})
            shard = self._roster.join(hello["worker"], Setup.from_json(hello["setup"]))
        except ProtocolError as error:
            why = encode(str(error)[:4096])
            self._link.send(Header(Message.REFUSED, header.step, why.numel()), why)
            self._link.flush()
            raise
        self.worker = hello["worker"]
        self.name = shard.setup.name_of(self.worker)
        milliseconds = int(self._timeout.total_seconds() * 1000)
        self._link.send(Header(Message.HELLO, header.step, 0, number=milliseconds))
        self._link.flush()
        return shard

    def _initialise(self, shard: Shard, header: Header) -> None:
        self._expect_lead(shard, header)
        self._expect_parameters(shard, header, extras=(0, 1))
        parameters = shard.setup.allocate()
        receive_tensors(self._link, parameters)
        self._reply(header, shard.initialise(header.number, parameters, header.extra == 1, self.worker))

    def _load(self, shard: Shard, header: Header) -> None:
        self._expect_lead(shard, header)
        self._expect(header, nbytes=header.nbytes, extras=(0, 1))
        data = fields(receive_json(self._link, header), {"version": int, "pushes": dict, "stepped": bool})
        pushes = {int(worker) if worker.isdecimal() else -1: count for worker, count in data["pushes"].items()}
        counts_fit = all(type(count) is int and count >= 0 for count in pushes.values())
        require(counts_fit and all(map(shard.setup.has, pushes)), "impossible pushes")
        require(sum(pushes.values()) <= data["version"] < 1 << 62, "impossible version")
        require(not data["stepped"] or shard.setup.optimizer is not None, "state of an optimizer that there is not")
        parameters = shard.setup.allocate()
        optimizer = shard.setup.state_room() if data["stepped"] else None
        tensors = state_tensors(parameters, optimizer)
        following = self._link.receive_header(self._timeout)
        require(following.kind == Message.TENSORS, f"expected TENSORS, got {following}")
        self._expect(following, nbytes=size_of(tensors), layout=shard.setup.fingerprint)
        require(following.number == header.number, "TENSORS of another training")
        receive_tensors(self._link, tensors)
        state = ShardState(data["version"], pushes, parameters, optimizer)
        self._reply(header, shard.load(header.number, state, header.extra == 1, self.worker))

    def _ready(self, shard: Shard, header: Header) -> None:
        self._expect_lead(shard, header)
        self._expect(header)
        self._reply(header, shard.begin_all(header.number, self.worker))

    def _status(self, shard: Shard, header: Header) -> None:
        self._expect(header)
        self._reply_json(header, asdict(self._roster.status()), shard)

    def _push(self, shard: Shard, header: Header) -> None:
        self._expect_parameters(shard, header)
        delta = self._room(shard)
        receive_tensors(self._link, delta)
        self._reply(header, shard.push(self.worker, header.number, delta))

    def _pull(self, shard: Shard, header: Header) -> None:
        self._expect(header)
        parameters = self._room(shard)
        self._reply(header, shard.pull(self.worker, header.number, parameters), parameters, shard)

    def _push_pull(self, shard: Shard, header: Header) -> None:
        self._expect_parameters(shard, header)
        delta = self._room(shard)
        receive_tensors(self._link, delta)
        position = shard.push_pull(self.worker, header.number, delta)
        self._reply(header, position, delta, shard)

    def _ping(self, shard: Shard, header: Header) -> None:
        self._expect(header)
        self._reply(header, shard.position(self.worker))

    def _save(self, shard: Shard, header: Header) -> None:
        self._expect(header)
        state = shard.save(header.number)
        pushes = {str(worker): count for worker, count in state.pushes.items()}
        stepped = state.optimizer is not None
        self._reply_json(header, {"version": state.version, "pushes": pushes, "stepped": stepped}, shard)
        tensors = state_tensors(state.parameters, state.optimizer)
        self._reply(Header(Message.TENSORS, header.step, 0), shard.position(self.worker), tensors, shard)

    def _drop(self, shard: Shard, header: Header) -> None:
        self._expect(header)
        if self._roster.drop(header.number, by=self.worker):
            log.warning("dropped %s, which the run has lost; what it pushed stays", shard.setup.name_of(header.number))
        self._reply(header, shard.position(self.worker))

    # -- checks ---------------------------------------------------------------------------------------------------

    def _expect(self, header: Header, nbytes: int = 0, layout: int = 0, extras: Sequence[int] = (0,)) -> None:
        fits = header.nbytes == nbytes and header.layout == layout and header.extra in extras
        require(fits and header.step >= 0 and header.number >= 0, f"expected {nbytes} bytes, got {header}")

    def _expect_parameters(self, shard: Shard, header: Header, extras: Sequence[int] = (0,)) -> None:
        self._expect(header, shard.setup.nbytes, shard.setup.fingerprint, extras)

    def _expect_lead(self, shard: Shard, header: Header) -> None:
        lead = shard.lead
        require(self.worker == lead, f"{self.name} sent what only {shard.setup.name_of(lead)} may: {header}")

    def _room(self, shard: Shard) -> list[Tensor]:
        """Return this link's buffer; a question and its answer need it one after the other."""
        if not self._buffer:
            self._buffer = shard.setup.allocate()
        return self._buffer

    # -- answers --------------------------------------------------------------------------------------------------

    def _reply(
        self, question: Header, position: Position, tensors: Sequence[Tensor] = (), shard: Shard | None = None
    ) -> None:
        layout = 0 if shard is None else shard.setup.fingerprint
        answer = Header(
            question.kind, question.step, size_of(tensors), layout, number=position.version, extra=position.others
        )
        self._link.send(answer, *as_bytes(tensors))
        self._link.flush()

    def _reply_json(self, question: Header, value: object, shard: Shard) -> None:
        payload = encode(value)
        position = shard.position(self.worker)
        answer = Header(question.kind, question.step, payload.numel(), 0, position.version, position.others)
        self._link.send(answer, payload)
        self._link.flush()
