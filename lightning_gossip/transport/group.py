"""Groups of the members that have met: made at once or not at all, and given up where one of them is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, distributed_c10d
from typing_extensions import override

from lightning_gossip.control.meeting import Meeting
from lightning_gossip.transport.link import ProcessGroupGloo, gloo_device

_CONNECT = timedelta(seconds=2)
"""For each of gloo's attempts to connect the members of a group: nothing else wakes it in its constructor."""

_TAG = 2
"""Of messages that nobody sends."""


class MemberLost(RuntimeError):
    """A member was lost while the others made a group with it."""


class MeetingStore(Store):
    """The run's store while members make a group: who waits for one that is lost is told so.

    Args:
        store: the run's, on a connection that nobody blocks.
        is_lost: whether one of those who make the group is lost.
        timeout: of every wait.
    """

    def __init__(self, store: Store, is_lost: Callable[[], bool], timeout: timedelta) -> None:
        super().__init__()
        self._store = store
        self._is_lost = is_lost
        self._timeout = timeout
        self._pause = threading.Event()

    def set(self, key: str, value: str) -> None:
        """Set ``key``."""
        self._store.set(key, value)

    def add(self, key: str, value: int) -> int:
        """Add to the number at ``key``."""
        return int(self._store.add(key, value))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set ``key`` if it is ``expected``, or not there; return what it is then."""
        return self._store.compare_set(key, expected, desired)

    def delete_key(self, key: str) -> bool:
        """Remove ``key``."""
        return bool(self._store.delete_key(key))

    def clone(self) -> Store:
        """Return another connection to the run's store."""
        return self._store.clone()

    def check(self, keys: list[str]) -> bool:
        """Whether all ``keys`` are there."""
        return bool(self._store.check(keys))

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, once it is there."""
        self.wait([key])
        return self._store.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until ``keys`` are there; the store's own timeout holds, for gloo gives that of a connection.

        Raises:
            MemberLost: if a member is lost, or does not come within the timeout.
        """
        deadline = time.monotonic() + self._timeout.total_seconds()
        pause = 0.0005
        while not self._store.check(keys):
            if self._is_lost():
                raise MemberLost("a member was lost before it had joined the group")
            if time.monotonic() > deadline:
                raise MemberLost(f"a member did not join the group within {self._timeout.total_seconds():g} s")
            self._pause.wait(pause)
            pause = min(2 * pause, 0.02)


class MembersGroup:
    """A process group of those that have met, made anew wherever they are others than before.

    Ranks in it are dense: the index of a member among the members.

    Args:
        rank: of this process: its seat.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._sound = False
        self._busy = False
        self._store: MeetingStore | None = None
        self.members: tuple[int, ...] = ()
        """Whose group it is; those that have met last."""
        self._incarnations: tuple[int, ...] = ()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group; None where there is none."""
        raise NotImplementedError

    def fits(self, meeting: Meeting) -> bool:
        """Whether this is a group of those that have met, and none of them has given it up."""
        there = (self.members, self._incarnations)
        return self._sound and there == (meeting.members, meeting.incarnations)

    def follow(self, meeting: Meeting, store: Store, has_lost: Callable[[], bool], timeout: timedelta) -> None:
        """Make the group anew, unless it fits; a collective of those that have met, called within :meth:`collective`.

        Args:
            meeting: of its members; its number is used once with ``store``.
            store: of the run, on a connection that nobody blocks.
            has_lost: whether one of those that have met is lost.
            timeout: of waits in the group.

        Raises:
            RuntimeError: if one of them is lost meanwhile.
        """
        if not self.fits(meeting):
            self._make(str(meeting.number), meeting.members, meeting.incarnations, store, has_lost, timeout)
        if has_lost():  # while no wait in this group was under way, or while there was no group yet: nothing to wake
            self.spoil()
            raise RuntimeError("one of those that have met was lost before their collective began")

    def be_alone(self, name: str, store: Store, timeout: timedelta) -> None:
        """Make a group of this process, of that ``name``, which is used once with ``store``."""
        self._make(name, (self._rank,), (-1,), store, lambda: False, timeout)

    def _make(
        self,
        name: str,
        members: tuple[int, ...],
        incarnations: tuple[int, ...],
        store: Store,
        has_lost: Callable[[], bool],
        timeout: timedelta,
    ) -> None:
        self.destroy()
        patient = MeetingStore(store, has_lost, timeout)
        self._store = patient  # torch keeps what is beneath it, and not this object: new groups ask it for their keys
        self.members, self._incarnations = members, incarnations
        self._open(PrefixStore(f"group/{name}", patient), members.index(self._rank), len(members))
        _set_timeout(timeout, self.group)
        self._sound = True

    def _open(self, store: Store, index: int, size: int) -> None:
        """Make the group, of ``size``, in which this process has that ``index``."""
        raise NotImplementedError

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Give the group up where what is done within fails: so that it fails on all."""
        self._busy = True
        try:
            yield
        except RuntimeError:
            self.spoil()
            raise
        finally:
            self._busy = False

    def wake(self, lost: int) -> None:
        """Let a collective that is under way fail where it waits for ``lost``; from another thread."""
        if self._busy and lost in self.members:
            self.spoil()

    def spoil(self) -> None:
        """Let every wait in the group fail, here and at its neighbours: it is made anew before it is used again."""
        self._sound = False
        if (group := self.group) is not None:
            of_torch: Any = group
            give_up(of_torch._get_backend(torch.device("cpu")), group.rank(), group.size())

    def destroy(self) -> None:
        """Leave the group."""
        self._sound = False


class DefaultGroup(MembersGroup):
    """torch's default process group. One a process, for all calls of the Trainer."""

    @property
    @override
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if dist.is_initialized() else None

    @override
    def _open(self, store: Store, index: int, size: int) -> None:
        dist.init_process_group("gloo", store=store, rank=index, world_size=size, timeout=_CONNECT)

    @override
    def destroy(self) -> None:
        super().destroy()
        if dist.is_initialized():
            dist.destroy_process_group()


class OwnGroup(MembersGroup):
    """A group besides torch's default one, which may be there or not, and stays as it is.

    torch's collectives take it as ``group``, with ``group_src`` for ranks in it; torch itself does not know it.
    """

    _group: dist.ProcessGroup | None = None

    @property
    @override
    def group(self) -> dist.ProcessGroup | None:
        return self._group

    @override
    def _open(self, store: Store, index: int, size: int) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout, options._threads = [gloo_device()], _CONNECT, 1
        gloo = ProcessGroupGloo(store, index, size, options)
        group: Any = dist.ProcessGroup(store, index, size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        for device in ("cpu", "cuda"):
            group._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._group = group

    @override
    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        with super().collective():
            try:
                yield
            except ValueError as error:
                # where there is a default group, torch looks up what it would log of a failure, and does not find this
                if isinstance(error.__context__, RuntimeError):
                    raise error.__context__ from None
                raise

    @override
    def destroy(self) -> None:
        super().destroy()
        self._group = None


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """Set the timeout of waits in a group; torch 2.13 has no public name for that."""
    getattr(dist, "set_timeout", distributed_c10d._set_pg_timeout)(timeout, group)


def give_up(group: Any, index: int, size: int) -> None:
    """Let every wait of a gloo group fail, here and at its neighbours: a receive that times out closes connections.

    Args:
        group: a ``ProcessGroupGloo``.
        index: of this process in it.
        size: of the group.
    """
    if size > 1:
        nothing = torch.empty(1, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            group.recv([nothing], (index + 1) % size, _TAG).wait(timedelta(milliseconds=1))
