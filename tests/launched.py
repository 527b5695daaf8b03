"""The one helper that starts `programs/train.py`, and sees that nothing is left of it.

Most tests of launched programs are about how they end. Those programs are started cheaply: their processes import
Lightning at half the cost (`environments.py`), and the launching one is forked from a process that has it already.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
from environments import ENVIRONMENT, LEAN
from ports import free_port
from running import kill, members

from lightning_gossip.strategies import checkpoint as files

PROGRAMS = Path(__file__).parent / "programs"


@dataclass
class Ended:
    """A program that has ended, and left nothing behind."""

    out: Path
    code: int
    printed: str

    def results(self, strategy: str = "elastic_gossip") -> list[dict[str, Any]]:
        """What the ranks had at the end."""
        return [json.loads(path.read_text()) for path in sorted(self.out.glob(f"result_*.{strategy}.json"))]

    def endings(self) -> dict[int, dict[str, Any]]:
        """What the ranks' `Trainer.fit` raised."""
        return {int(path.stem[-1]): json.loads(path.read_text()) for path in self.out.glob("ending_*.json")}


@dataclass(frozen=True)
class Program:
    """`programs/train.py` with these arguments.

    Attributes:
        arguments: of the command line, without the folder.
        as_a_user: started as users start it, and not cheaply.
        nodes: started by torchrun on that many, where there are several; always as users do.
        after: called with the running program and its folder.
        linger: seconds for which its processes may outlive the first.
    """

    arguments: tuple[Any, ...]
    as_a_user: bool = False
    nodes: int = 1
    after: Callable[[Any, Path], None] | None = None
    linger: float = 5

    def run(self, out: Path) -> Ended:
        if self.nodes == 1:
            return self._run(out, ())
        port = free_port()
        torchrun: tuple[str, ...] = ("-m", "torch.distributed.run", f"--nnodes={self.nodes}", "--nproc-per-node=2")
        torchrun += ("--master-addr=127.0.0.1", f"--master-port={port}")
        with ThreadPoolExecutor() as pool:
            nodes = list(pool.map(lambda n: self._run(out, (*torchrun, f"--node-rank={n}")), range(self.nodes)))
        return Ended(out, max(node.code for node in nodes), "\n".join(node.printed for node in nodes))

    def _run(self, out: Path, launcher: tuple[str, ...]) -> Ended:
        (out / "tmp").mkdir(parents=True, exist_ok=True)
        as_a_user = self.as_a_user or bool(launcher)
        environment = {**(ENVIRONMENT if as_a_user else LEAN), "TMPDIR": str(out / "tmp")}
        arguments = [str(out), *map(str, self.arguments)]
        with tempfile.NamedTemporaryFile("r", dir=out, prefix="printed_") as printed:
            process: Process
            if as_a_user:
                command = [*launcher, str(PROGRAMS / "train.py"), *arguments]
                process = Executed(command, environment, printed.name)
            else:
                process = Forked([str(PROGRAMS / "lean_train.py"), *arguments], environment, printed.name)
            try:
                if self.after is not None:
                    self.after(process, out)
                code = process.wait(150)
                assert_nothing_is_left(process.pid, out, self.linger, printed.read())
            finally:
                kill(members(process.pid))
                process.wait(10)
            printed.seek(0)
            return Ended(out, code, printed.read())


class Executed:
    """`python command` in a session of its own, so that what is left of it can be found and ended."""

    def __init__(self, command: list[str], environment: dict[str, str], printed: str) -> None:
        with open(printed, "a") as file:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None."""
        return self._process.poll()

    def wait(self, seconds: float) -> int:
        """The exit code."""
        return self._process.wait(seconds)


class Forked:
    """As :class:`Executed`, forked from a process that has Lightning imported already (`programs/zygote.py`)."""

    _idle: ClassVar[list[tuple[subprocess.Popen[bytes], Connection]]] = []

    def __init__(self, command: list[str], environment: dict[str, str], printed: str) -> None:
        Path(printed).touch()
        self._zygote = self._idle.pop() if self._idle else self._start()
        self._pipe = self._zygote[1]
        self._pipe.send((command, environment, printed))
        self.pid = int(self._receive(60))
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None."""
        if self._code is None and self._pipe.poll():
            self.wait(0)
        return self._code

    def wait(self, seconds: float) -> int:
        """The exit code."""
        if self._code is None:
            self._code = self._receive(seconds)
            self._idle.append(self._zygote)
        return self._code

    def _receive(self, seconds: float) -> int:
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"the program did not start, or end, within {seconds} s")
        return int(self._pipe.recv())

    @staticmethod
    def _start() -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        command = [sys.executable, str(PROGRAMS / "zygote.py"), str(theirs.fileno())]
        with theirs:
            return subprocess.Popen(command, env=LEAN, pass_fds=[theirs.fileno()]), ours

    @classmethod
    def end_all(cls) -> None:
        """End the processes from which programs were forked."""
        while cls._idle:
            process, pipe = cls._idle.pop()
            pipe.close()
            process.wait(10)


Process = Executed | Forked


def assert_nothing_is_left(session: int, out: Path, linger: float, printed: str) -> None:
    deadline = time.monotonic() + linger
    while (left := members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"processes left: {left}\n{printed[-3000:]}"
    # torch leaves the folder of torchrun's agent, and the file in which a spawned process reports its traceback
    of_torch = ("torchelastic_", "pytorch-errorfile-")
    temporary = [path.name for path in (out / "tmp").iterdir() if not path.name.startswith(of_torch)]
    assert not temporary, "temporary files left"
    assert not list(out.rglob("*.tmp")), "a save was left half done"
    for path in out.rglob("*.ckpt"):
        entry = torch.load(path, weights_only=True)[files.KEY]
        for rank in entry["ranks"]:
            files.load_replica(files.AtomicCheckpointIO(), path, entry["save_id"], rank, True)


def wait_for(process: Process | subprocess.Popen[str], path: Path, other_than: str = "") -> str:
    """Return what a program's rank writes into a file, once it is there and not ``other_than``."""
    deadline = time.monotonic() + 60
    while (text := path.read_text() if path.exists() else "") in ("", other_than):
        assert process.poll() is None, "the program has ended"
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.05)
    return text
