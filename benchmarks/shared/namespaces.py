"""Links of a given rate on one machine: a network namespace a rank, joined by a bridge (Linux, root, iproute2).

::

    with Network(ranks=4) as network:
        network.set_rate(200)
        network.start(0, [sys.executable, "rank.py"], env)

A rank's uplink and its downlink each pass a token bucket (``tc … tbf``) of the same rate. The bridge lies in a
namespace of its own: nothing is added to the host's network, traffic never leaves, and what was made goes with the
namespaces. They go on every ending; those that a killed run left go when the next one begins.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

INTERFACE = "eth0"
"""Of every rank, in its namespace."""

ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns that these addresses have no names
    "RUST_LOG": "error",  # torchft's manager describes every round
}
"""Of every rank, besides what tells it its place."""

LATENCY_MS = 50
"""How much a bucket's queue holds, in time at its rate, before it drops."""

_PREFIX = "gossip-bench"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-\w+")
_SUBNET = "10.77.0"
_TOOLS = ("ip", "tc", "setpriv", "unshare")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SETTINGS = (
    "echo cubic > /proc/sys/net/ipv4/tcp_congestion_control;"  # Linux' default; a host may have set another
    " echo 1 2> /dev/null > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true"
)


class NetworkUnavailable(RuntimeError):
    """This machine, or this user, can not make such a network."""


@contextlib.contextmanager
def exiting() -> Iterator[None]:
    """End the program where what is done within fails: with 2 where there can be no network, and else with 1."""
    try:
        yield
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, NetworkUnavailable) else 1)


class Network:
    """Namespaces for ``ranks`` ranks, and the processes started in them; a context manager.

    Args:
        ranks: from 2 to 250.

    Raises:
        ValueError: if ``ranks`` is out of range.
        NetworkUnavailable: on entering, without root, iproute2, or a kernel that has what it takes.
    """

    def __init__(self, ranks: int) -> None:
        if not 2 <= ranks <= 250:
            raise ValueError(f"`ranks` must be from 2 to 250, got {ranks!r}")
        self.ranks = ranks
        owner = os.getpid()
        self._stem = f"{_PREFIX}-{owner}-{_start_of(owner)}"
        self._switch = f"{self._stem}-switch"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Network:
        check_requirements()
        remove_leftovers()
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, _leave)
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def address(self, rank: int) -> str:
        """Return the IPv4 address of ``rank``."""
        return f"{_SUBNET}.{rank + 1}"

    def set_rate(self, megabits: float) -> None:
        """Give each rank's uplink and downlink ``megabits`` · 10⁶ bits a second, at once; 0 takes the limit away."""
        for rank in range(self.ranks):
            for namespace, device in ((self._of(rank), INTERFACE), (self._switch, f"rank{rank}")):
                bucket = ["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root"]
                if megabits:
                    shape = f"rate {megabits * 1e6:.0f}bit burst {burst_bytes(megabits)} latency {LATENCY_MS}ms"
                    _run(*bucket, "tbf", *shape.split())
                else:
                    _run(*bucket, "pfifo_fast")

    def set_link(self, rank: int, up: bool) -> None:
        """Cut the link of ``rank``, or join it again: what is sent meanwhile is lost, and nobody is told."""
        _run("ip", "-n", self._switch, "link", "set", f"rank{rank}", "up" if up else "down")

    def processes(self, rank: int) -> list[int]:
        """Return the processes that run in the namespace of ``rank``."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self._of(rank)).split()]

    def start(self, rank: int, command: Sequence[str], env: Mapping[str, str], **popen: Any) -> subprocess.Popen[bytes]:
        """Start a process in the namespace of ``rank``; it dies with this one, and with the network."""
        # a session of its own: Ctrl-C in a terminal goes to this process, which ends the others in order
        wrapped = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._of(rank), *command]
        process = subprocess.Popen(wrapped, env=dict(env), start_new_session=True, **popen)
        self._processes.append(process)
        return process

    def stop(self, grace: float = 10.0) -> None:
        """End all processes that were started: SIGTERM, and after ``grace`` seconds SIGKILL."""
        running = [process for process in self._processes if process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + grace
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._processes.clear()

    def close(self) -> None:
        """End the processes and remove the namespaces; signals wait until that is done."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self.stop()
            _remove(name for name in _namespaces() if name.startswith(f"{self._stem}-"))
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _of(self, rank: int) -> str:
        return f"{self._stem}-{rank}"

    def _make(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for rank in range(self.ranks):
            own, port = self._of(rank), f"rank{rank}"
            _run("ip", "netns", "add", own)
            _run("ip", "netns", "exec", own, "sh", "-c", _SETTINGS)
            pair = f"link add {INTERFACE} netns {own} type veth peer name {port} netns {self._switch}"
            _run("ip", *pair.split())
            _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", own, "address", "add", f"{self.address(rank)}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _run("ip", "-n", own, "link", "set", device, "up")


def burst_bytes(megabits: float) -> int:
    """Return the size of a bucket: 2 ms at its rate, 128 kB at least.

    A segment that TCP hands over in one piece (64 kB; a network card would cut it up) has to fit, or `tbf` cuts it, and
    some thousand packets a second keep this host's cores from training (100 ms of a core for 11 MB instead of 15).
    Timers are late by some tenths of a millisecond on a busy machine: a smaller bucket would not reach a high rate.
    A burst passes both buckets of a link at full speed, once after a pause: subtract it where link use is measured.
    """
    return max(128_000, int(megabits * 1e6 / 8 * 2e-3))


def check_requirements() -> None:
    """Raise :class:`NetworkUnavailable`, saying why, where a network can not be made."""
    if os.geteuid() != 0:
        raise NetworkUnavailable("network namespaces need root")
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        raise NetworkUnavailable(f"not found: {', '.join(missing)} (of iproute2 and util-linux)")
    _run("unshare", "--net", "true")  # root in a container may not


def remove_leftovers() -> None:
    """Remove the namespaces of runs that were killed, and whatever still runs in them."""
    owners = ((name, _NAME.fullmatch(name)) for name in _namespaces())
    _remove(name for name, owner in owners if owner and _start_of(int(owner[1])) != int(owner[2]))


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(f"{_PREFIX}-")]


def _remove(names: Any) -> None:
    for name in list(names):
        for pid in _run("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "delete", name)


def _start_of(pid: int) -> int:
    """Return when process ``pid`` began, in clock ticks since boot (it tells it from a later one); -1 without it."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return -1


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, start_new_session=True)
    if done.returncode:
        raise NetworkUnavailable(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _leave(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
