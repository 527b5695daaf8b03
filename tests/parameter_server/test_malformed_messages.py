"""What does not fit closes its link and changes nothing: 10,000 malformed messages, sent through links."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from shards import Shards
from torch import Tensor, nn

from lightning_gossip.parameter_server.protocol import (
    ARRIVALS,
    MAX_JSON,
    SHARD,
    Message,
    Setup,
    arrival_key,
    as_bytes,
    encode,
)
from lightning_gossip.transport.header import Header
from lightning_gossip.transport.link import Link, gloo_device

SENDERS = 4
SETUP = Setup(workers=3, shard=0, shards=1, dtypes=("float32", "float64"), numels=(5, 4), layout=77)
LIMIT = timedelta(seconds=20)

Attack = tuple[int, list[tuple[Header | Tensor, list[Tensor]]]]
"""As which worker to say hello first (-1: not at all), and what to send then."""


def payload(setup: Setup, value: float) -> list[Tensor]:
    return as_bytes([part.fill_(value) for part in setup.allocate()])


def random_int(dice: random.Random) -> int:
    return dice.choice([dice.randrange(-9, 10), dice.randrange(-(1 << 62), 1 << 62), 1 << dice.randrange(62)])


def random_json(dice: random.Random, depth: int = 0) -> Any:
    kinds = [None, True, 1.5, -7, "x" * dice.randrange(40), "torch.optim.LBFGS", 10**400]
    if depth < 3 and dice.random() < 0.6:
        parts = [random_json(dice, depth + 1) for _ in range(dice.randrange(4))]
        return parts if dice.random() < 0.5 else {f"k{i}": part for i, part in enumerate(parts)}
    return dice.choice(kinds)


def corrupt_json(dice: random.Random, valid: dict[str, Any]) -> Tensor:
    choice = dice.randrange(6)
    if choice == 0:
        return torch.randint(0, 256, (dice.randrange(1, 200),), dtype=torch.uint8)
    if choice == 1:
        return torch.frombuffer(bytearray(b"[" * dice.randrange(2000, 60000)), dtype=torch.uint8)
    if choice == 2:
        return encode(random_json(dice))
    if choice == 3:  # cut short
        whole = encode(valid)
        return whole[: dice.randrange(1, whole.numel())].clone()
    corrupted = {**valid}
    if choice == 4:
        del corrupted[dice.choice(list(corrupted))]
    else:
        corrupted["more"] = 1
    return encode(corrupted)


def hello(worker: int, setup: Setup = SETUP) -> dict[str, Any]:
    return {"worker": worker, "setup": setup.to_json()}


def no_header(dice: random.Random) -> Attack:
    """Too short ones, and eight numbers that are none."""
    choice = dice.randrange(3)
    if choice == 0:
        whole = Header(Message.PING, 0, 0).to_tensor().view(torch.uint8)
        return dice.choice([-1, 1]), [(whole[: dice.randrange(1, 60)].clone(), [])]
    numbers = torch.tensor([random_int(dice) for _ in range(8)], dtype=torch.int64)
    if choice == 1:
        numbers[0] = Header(0, 0, 0).to_tensor()[0]
    return dice.choice([-1, 1]), [(numbers, [])]


def no_hello(dice: random.Random) -> Attack:
    """Something else first, or a hello that is none."""
    choice = dice.randrange(4)
    if choice == 0:
        kind = dice.choice([k for k in Message if k != Message.HELLO] + [random_int(dice)])
        return -1, [(Header(kind, 0, 0), [])]
    if choice == 1:
        nbytes = dice.choice([0, -1, MAX_JSON + 1, 1 << 62])
        return -1, [(Header(Message.HELLO, 0, nbytes), [])]
    if choice == 2:
        other = replace(SETUP, **dice.choice(OTHER_SETUPS))
        words = encode(hello(dice.choice([0, 1, 2]), other))
    else:
        words = corrupt_json(dice, hello(1)) if dice.random() < 0.7 else encode(hello(dice.choice([-1, 3, 1 << 40])))
    return -1, [(Header(Message.HELLO, 0, words.numel()), [words])]


# all but the first with a fingerprint of their own
OTHER_SETUPS: list[dict[str, Any]] = [
    {"workers": 2},
    {"shards": 2},
    {"numels": (4, 5)},
    {"numels": (1 << 47, 4)},
    {"dtypes": ("float64", "float32")},
    {"dtypes": ("bfloat16", "float64")},
    {"layout": 78},
]


def unfit_question(dice: random.Random) -> Attack:
    """After a valid hello: a fitting message but for one field, sent with the payload that it announces."""
    kind = dice.choice([Message.PUSH, Message.PUSH_PULL, Message.PULL, Message.STATUS, Message.PING, Message.SAVE])
    sends = kind in (Message.PUSH, Message.PUSH_PULL)
    fits = Header(kind, 3, SETUP.nbytes if sends else 0, SETUP.fingerprint if sends else 0, number=1)
    unfit = dice.randrange(4)
    if unfit == 0:
        other = dice.choice([SETUP.nbytes - 4, SETUP.nbytes + 4, 8, -8, 1 << 40])
        parts = [torch.ones(other, dtype=torch.uint8)] if 0 < other < 1000 else []
        return 1, [(replace(fits, nbytes=other), parts)]
    if unfit == 1:  # another dtype or cut, of as many bytes
        other_setup = replace(SETUP, **dice.choice(OTHER_SETUPS[1:]))
        return 1, [(replace(fits, layout=other_setup.fingerprint), payload(SETUP, 1.0) if sends else [])]
    if unfit == 2:
        return 1, [(replace(fits, step=-dice.randrange(1, 99)), payload(SETUP, 1.0) if sends else [])]
    return 1, [(replace(fits, extra=random_int(dice) | 2), payload(SETUP, 1.0) if sends else [])]


def unknown_question(dice: random.Random) -> Attack:
    kinds = [Message.HELLO, Message.REFUSED, Message.TENSORS, 0, 1, 15, 29, -1, random_int(dice) | 1 << 40]
    return 1, [(Header(dice.choice(kinds), 1, 0, number=1), [])]


def out_of_order(dice: random.Random) -> Attack:
    """What only worker 0 may, another training's messages, and goodbyes that are none."""
    choice = dice.randrange(6)
    parameters = Header(Message.INITIALISE, 0, SETUP.nbytes, SETUP.fingerprint, number=2, extra=1)
    if choice == 0:
        return 1, [(parameters, payload(SETUP, 9.0))]
    if choice == 1:  # worker 0, but not its turn
        return 0, [(replace(parameters, number=dice.choice([0, 1, 3, 1 << 50])), payload(SETUP, 9.0))]
    if choice == 2:
        return dice.choice([1, 2]), [(Header(Message.READY, 0, 0, number=1), [])]
    if choice == 3:
        kind = dice.choice([Message.PUSH, Message.PUSH_PULL])
        other = dice.choice([0, 2, 1 << 50])
        return 1, [(Header(kind, 3, SETUP.nbytes, SETUP.fingerprint, other), payload(SETUP, 1.0))]
    if choice == 4:
        kind = dice.choice([Message.PULL, Message.SAVE])
        return 1, [(Header(kind, 3, 0, number=dice.choice([0, 2, 1 << 50])), [])]
    return 1, [(Header(Message.BYE, 0, dice.choice([-1, 1, 99])), [])]


def unfit_load(dice: random.Random) -> Attack:
    """A checkpoint of worker 0's whose description or tensors do not fit."""
    words: dict[str, Any] = {"version": 4, "pushes": {"0": 1, "2": 3}, "stepped": False}
    header = Header(Message.LOAD, 0, 0, number=2, extra=1)
    bad: list[dict[str, Any]] = [
        {"version": -1},
        {"version": 3},
        {"pushes": {"3": 1}},
        {"pushes": {"-1": 1}},
        {"pushes": {"x": 1}},
        {"pushes": {"0": -1}},
        {"pushes": {"0": True}},
        {"stepped": True},
        {"version": 1 << 70},
    ]
    if dice.random() < 0.6:
        description = corrupt_json(dice, words) if dice.random() < 0.5 else encode({**words, **dice.choice(bad)})
        return 0, [(replace(header, nbytes=description.numel()), [description])]
    description = encode(words)
    tensors = Header(Message.TENSORS, 0, SETUP.nbytes, SETUP.fingerprint, number=2)
    unfit = [{"kind": int(Message.PUSH)}, {"nbytes": 4}, {"layout": 1}, {"number": 1}, {"extra": 1}]
    second = replace(tensors, **dice.choice(unfit))
    return 0, [(replace(header, nbytes=description.numel()), [description]), (second, payload(SETUP, 9.0))]


ATTACKS: list[Callable[[random.Random], Attack]] = [
    no_header,
    no_hello,
    unfit_question,
    unknown_question,
    out_of_order,
    unfit_load,
]


def send(link: Link, header: Header | Tensor, parts: list[Tensor]) -> None:
    if isinstance(header, Header):
        link.send(header, *parts)
    else:  # as no end of a link would
        link._sending.append((link._connected().send([header], 1 - link._index, 0), header))


def carry_out(link: Link, attack: Attack) -> str:
    """Return how the shard ended it: ``"closed"``, ``"refused"`` and closed, or ``"silence"`` if it did not."""
    worker, messages = attack
    if worker >= 0:
        words = encode(hello(worker))
        link.send(Header(Message.HELLO, 0, words.numel()), words)
        link.flush()
        assert link.receive_header(LIMIT).kind == Message.HELLO
    end = "closed"
    try:
        for header, parts in messages:
            send(link, header, parts)
        while True:
            answer = link.receive_header(LIMIT)
            assert answer.kind == Message.REFUSED, f"{attack} was answered by {answer}"
            link.receive(torch.zeros(answer.nbytes, dtype=torch.uint8))
            end = "refused"
    except RuntimeError as error:
        return "silence" if "imed out" in str(error) else end


@pytest.fixture
def logged() -> Iterator[Counter[str]]:
    """Count what the server logs, by its gist; keep nothing, and spare the collector what was imported."""
    counts: Counter[str] = Counter()

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            counts["changing nothing" if "changing nothing" in message else message] += 1

    log, handler = logging.getLogger("lightning_gossip.parameter_server.server"), Count(logging.WARNING)
    log.addHandler(handler)
    log.propagate = False
    gc.collect()
    gc.freeze()
    yield counts
    gc.unfreeze()
    log.propagate = True
    log.removeHandler(handler)


@pytest.mark.slow
@pytest.mark.timeout(170)
@pytest.mark.parametrize("messages", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_thousands_of_malformed_messages_change_nothing(logged: Counter[str], messages: int) -> None:
    ends: Counter[str] = Counter()
    numbers, lock = itertools.count(), threading.Lock()
    failures: list[BaseException] = []
    with Shards(1, timeout=LIMIT) as server:
        store, device = server.connect(server.addresses[0], LIMIT), gloo_device()

        def sender() -> None:
            while not failures and (number := next(numbers)) < messages:
                dice = random.Random(number)
                attack = ATTACKS[number % len(ATTACKS)](dice)
                name = f"sender.{number}"
                store.set(arrival_key(store.add(ARRIVALS, 1)), name)
                link = Link(store, device, name, SHARD, LIMIT)
                try:
                    end = carry_out(link, attack)  # here, not in the link's thread: half the switching
                    with lock:
                        ends[end] += 1
                except BaseException as error:  # noqa: BLE001 - raised in the test's thread
                    failures.append(error)
                finally:
                    link.close()

        def body(rank: Rank) -> None:
            parameters = {"a": nn.Parameter(torch.arange(5.0)), "b": nn.Parameter(torch.ones(4, dtype=torch.float64))}
            before = {name: p.detach().clone() for name, p in parameters.items()}
            client = server.client(rank, n_push=1, n_pull=1)
            client._meet_shards = greet_as_in_the_attacks(client)  # type: ignore[method-assign, assignment]
            client.start(parameters)
            threads = [threading.Thread(target=sender) for _ in range(SENDERS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failures:
                raise failures[0]
            state = client.server_state()
            assert (state["version"], state["pushes"]) == (0, {})
            client.pull_now(parameters)
            for name, parameter in parameters.items():
                torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
                with torch.no_grad():
                    parameter.add_(1)
            client.end_step(parameters)
            client.finish(parameters)
            assert client.server_state()["version"] == 1
            client.close()

        run_ranks(3, lambda rank: body(rank) if rank.rank == 0 else None)
    assert sum(ends.values()) == messages
    assert ends["silence"] == 0
    assert ends["refused"] > messages / 20
    assert logged["changing nothing"] == messages, logged


def greet_as_in_the_attacks(client: Any) -> Callable[[Any], Any]:
    """Let the well-behaved worker's parameters have the fingerprint that the attacks use."""
    meet = client._meet_shards

    def patched(layout: Any) -> Any:
        layout.fingerprint = SETUP.layout
        return meet(layout)

    return patched
