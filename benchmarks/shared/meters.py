"""What a step's time, bytes and memory go to: meters for :mod:`.side_by_side`, around the package's own calls."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization

from benchmarks.shared.side_by_side import Meter, Values
from lightning_gossip.exchange.clock import Exchange
from lightning_gossip.exchange.flat import FlatBuffer
from lightning_gossip.strategies.pairwise import PairwiseStrategy

MB = 1e6


class PartsMeter(Meter):
    """Time of the training thread in the parts of an exchange, and in everything that our strategy adds to a step.

    ========== ==================================================================================================
    snapshot   copying the parameters
    post       handing the snapshot to the transport
    wait       for what partners send, and until partners have taken what this rank sent before
    mix        applying it
    python     the rest of what the strategy adds around Lightning's own step: schedule, clock, looking for a stop
    idle_us    all that the strategy adds in a step without an exchange: the median of such steps
    ========== ==================================================================================================

    All in ms a step but the last. It puts stopwatches around methods of the package, about 1 µs a call.
    """

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._added: list[float] = []  # by our strategy, a step
        self._busy: list[bool] = []
        self._exchange: Exchange | None = None
        for owner, method in (
            (FlatBuffer, "pack"),
            (Exchange, "_post"),
            (Exchange, "_receive"),
            (Exchange, "_apply"),
            (_AutomaticOptimization, "run"),
        ):
            setattr(owner, method, self._timed(getattr(owner, method), method))

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._spent[name] += time.perf_counter() - start

        return timed

    def start(self, trainer: pl.Trainer | None) -> None:
        """Put stopwatches around what our strategy put into this trainer."""
        self._exchange = None
        if trainer is None or not isinstance(trainer.strategy, PairwiseStrategy):
            return
        exchange = trainer.strategy.exchange
        if exchange is None:
            raise RuntimeError("an exchange is measured within `fit`")
        if not isinstance(exchange, Exchange):
            return  # at each rank's own pace, partly on threads: there are no such parts of a step
        self._exchange = exchange
        exchange._transport.room = self._timed(exchange._transport.room, "room")  # type: ignore[method-assign]
        loop = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = self._timed(loop._broadcast_sigterm_tensor, "check")  # type: ignore[method-assign]
        run = loop.automatic_optimization.run
        spent = self._spent

        def step(*args: Any, **kwargs: Any) -> Any:
            lightnings, check, exchanges = spent["run"], spent["check"], spent["_post"] + spent["_apply"]
            spent["check"] = 0.0
            start = time.perf_counter()
            result = run(*args, **kwargs)
            self._added.append(time.perf_counter() - start - (spent["run"] - lightnings) + check)
            self._busy.append(spent["_post"] + spent["_apply"] > exchanges)
            return result

        loop.automatic_optimization.run = step  # type: ignore[method-assign]

    def begin(self) -> None:
        """See :meth:`Meter.begin`."""
        self._spent.clear()
        self._added.clear()
        self._busy.clear()
        self._bytes = self._exchange.stats.bytes_sent if self._exchange is not None else 0

    def end(self) -> None:
        """See :meth:`Meter.end`."""
        self._seen = dict(self._spent)
        self._counted = list(zip(self._added, self._busy, strict=True))
        if self._exchange is not None:
            self._bytes = self._exchange.stats.bytes_sent - self._bytes

    def read(self, steps: int) -> Values:
        """See :meth:`Meter.read`."""
        if self._exchange is None:
            return {}
        seen = defaultdict(float, self._seen)
        parts = {
            "snapshot_ms": seen["pack"],
            "post_ms": seen["_post"] - seen["pack"] - seen["room"],
            "wait_ms": seen["_receive"] + seen["room"],
            "mix_ms": seen["_apply"] - seen["_receive"],
            "python_ms": sum(added for added, _ in self._counted) - seen["_post"] - seen["_apply"],
        }
        values = {name: 1e3 * seconds / steps for name, seconds in parts.items()}
        idle = [added for added, busy in self._counted if not busy]
        values |= {"idle_us": 1e6 * float(np.median(idle))} if idle else {}
        return values | {"payload_mb": self._bytes / steps / MB}


class MemoryMeter(Meter):
    """Peak memory of this process in a block beyond what it held before.

    Resident pages at their peak, those of shared memory divided among the processes that share them.
    """

    def prepare(self) -> None:
        """See :meth:`Meter.prepare`."""
        self._before = _kilobytes("/proc/self/status", "VmRSS")

    def begin(self) -> None:
        """Reset the peak: only the counted steps and those after them matter."""
        Path("/proc/self/clear_refs").write_text("5")

    def read(self, steps: int) -> Values:
        """See :meth:`Meter.read`."""
        peak, shared = (_kilobytes("/proc/self/status", name) for name in ("VmHWM", "RssShmem"))
        own_share = _kilobytes("/proc/self/smaps_rollup", "Pss_Shmem")
        return {"peak_mb": (peak - shared + own_share - self._before) * 1024 / MB}


def _kilobytes(file: str, name: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class InterfaceMeter(Meter):
    """Bytes that left by network interfaces, loopback among them, over the number of ranks on this host.

    Args:
        ranks: on this host.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def begin(self) -> None:
        """See :meth:`Meter.begin`."""
        self._bytes = _sent()

    def end(self) -> None:
        """See :meth:`Meter.end`."""
        self._bytes = _sent() - self._bytes

    def read(self, steps: int) -> Values:
        """See :meth:`Meter.read`."""
        return {"network_mb": self._bytes / steps / self.ranks / MB}


class PeakMeter(Meter):
    """The most that left by this host's network interfaces in a short time, among the counted steps.

    Args:
        seconds: length of that time.
        every: seconds from one look at the interfaces' counts to the next, by a thread of its own.
    """

    def __init__(self, seconds: float = 0.2, every: float = 0.01) -> None:
        self.seconds, self.every = seconds, every
        self._stop = threading.Event()

    def begin(self) -> None:
        """See :meth:`Meter.begin`."""
        self._looks: list[tuple[float, int]] = [(time.perf_counter(), _sent())]
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """See :meth:`Meter.end`."""
        self._stop.set()
        self._thread.join()
        self._looks.append((time.perf_counter(), _sent()))

    def read(self, steps: int) -> Values:
        """See :meth:`Meter.read`."""
        return {"peak_mb_s": peak_rate(self._looks, self.seconds) / MB}

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            self._looks.append((time.perf_counter(), _sent()))


def peak_rate(looks: Sequence[tuple[float, int]], seconds: float) -> float:
    """Return the highest rate over any time of at least ``seconds`` that begins and ends at a look; 0 if there is none.

    Args:
        looks: times and counts so far, both ascending.
        seconds: more than 0.
    """
    peak, first = 0.0, 0
    for then, count in looks:
        while first + 1 < len(looks) and looks[first + 1][0] <= then - seconds:
            first += 1
        if looks[first][0] <= then - seconds:
            peak = max(peak, (count - looks[first][1]) / (then - looks[first][0]))
    return peak


def _sent() -> int:
    """Return the bytes that all interfaces have sent."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.partition(":")[2].split()[8]) for line in lines)
