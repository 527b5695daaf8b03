"""Functions that stand in the place of others for a while, in objects of the user's and of Lightning's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self, cast

from typing_extensions import override


class StandIn(partial[Any]):
    """A function in an attribute of somebody else's object; pickles and copies of that object get what it replaces.

    Nothing of this package is in them, and they load where it is not installed. A call costs no more than the function.

    Args:
        function: that is called.
        replaced: what the attribute was.
    """

    _replaced: Any

    def __new__(cls, function: Callable[..., Any], replaced: Any) -> Self:
        """Make one."""
        stand_in = super().__new__(cls, function)
        stand_in._replaced = replaced
        return stand_in

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return cast, (None, self._replaced)  # a function of Python's own that returns its second argument


class SharedStandIn(StandIn):
    """A stand-in that copies made in this process have too."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedStandIn:
        return self


def put(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Let ``function`` stand in for the method ``name`` of ``owner``, until :func:`take_away`."""
    vars(owner)[name] = StandIn(function, getattr(owner, name))


def take_away(owner: Any, name: str) -> None:
    """Give ``owner`` its method back; harmless where nothing stands in."""
    if isinstance(vars(owner).get(name), StandIn):
        del vars(owner)[name]
