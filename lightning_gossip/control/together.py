"""What members do together, and repeat where one of them dies in it (see ``members``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lightning_gossip.control.meeting import Meeting
from lightning_gossip.control.member_control import MemberControl

T = TypeVar("T")

_WORD = 1.0
"""Seconds for which a loss may still be declared that explains why something failed."""

_ATTEMPTS = 3
"""Where nobody is lost: a network may drop a connection once."""


class Disagreement(RuntimeError):
    """What an attempt has found out, on all members alike: it ends all of them, and trying again would not help."""


def together(control: MemberControl, meet: Callable[[], Meeting], attempt: Callable[[Meeting], T]) -> T:
    """Call ``attempt`` on all members at once, again by those that are left until it has succeeded on all of them.

    Args:
        control: of this rank.
        meet: waits for the others, for the same reason; called before each attempt.
        attempt: a collective of the members that have met; from unchanged inputs every time, and what it changes is
            thrown away where it is repeated. It raises ``RuntimeError`` where one of them dies, at once on all.

    Raises:
        RunStopped: if the run ends meanwhile.
        Disagreement: on all members alike, as ``attempt`` raised it.
        RuntimeError: what ``attempt`` raised for the third time, where nobody was lost.
    """
    unexplained = 0  # failures in a row after which nobody was lost
    while True:
        meeting = meet()
        failure: RuntimeError | None = None
        disagreement: Disagreement | None = None
        try:
            result = attempt(meeting)
        except Disagreement as error:
            disagreement = error
        except RuntimeError as error:
            failure = error
        if control.agree(meeting, failure is None):
            if disagreement is not None:
                raise disagreement
            return result
        if control.await_loss(meeting, time.monotonic() + _WORD):
            unexplained = 0
        elif (unexplained := unexplained + 1) == _ATTEMPTS:
            raise failure or RuntimeError(f"another rank failed {_ATTEMPTS} times in what all did together")
