"""The one helper that starts `programs/train.py`, as it is or lean, and sees that nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_gossip.strategies import checkpoint as files

PROGRAMS = Path(__file__).parent / "programs"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


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
        script: "train.py" imports what a user's script does; "lean_train.py" takes half the time, for what happens later.
        nodes: started by torchrun on that many, where there are several.
        after: called with the running program and its folder.
        linger: seconds for which its processes may outlive the first.
    """

    arguments: tuple[Any, ...]
    script: str = "lean_train.py"
    nodes: int = 1
    after: Callable[[subprocess.Popen[str], Path], None] | None = None
    linger: float = 5

    def run(self, out: Path) -> Ended:
        if self.nodes == 1:
            return self._run(out, ())
        port = free_port()
        torchrun = ("-m", "torch.distributed.run", f"--nnodes={self.nodes}", "--nproc-per-node=2")
        torchrun += ("--master-addr=127.0.0.1", f"--master-port={port}")
        with ThreadPoolExecutor() as pool:
            nodes = list(pool.map(lambda n: self._run(out, (*torchrun, f"--node-rank={n}")), range(self.nodes)))
        return Ended(out, max(node.code for node in nodes), "\n".join(node.printed for node in nodes))

    def _run(self, out: Path, launcher: tuple[str, ...]) -> Ended:
        (out / "tmp").mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, *launcher, str(PROGRAMS / self.script), str(out), *map(str, self.arguments)],
            env={**ENVIRONMENT, "TMPDIR": str(out / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what is left of it can be found and ended
        )
        try:
            if self.after is not None:
                self.after(process, out)
            printed, _ = process.communicate(timeout=150)
            assert_nothing_is_left(process.pid, out, self.linger, printed)
        finally:
            for pid in members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.communicate()
        return Ended(out, process.returncode, printed)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def members(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session and "Z" not in (entry / "stat").read_text().split()[2]:
                    found.append(int(entry.name))
            except (ProcessLookupError, FileNotFoundError, PermissionError):
                continue
    return found


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
        for rank in range(entry["world_size"]):
            files.load_replica(files.AtomicCheckpointIO(), path, entry["save_id"], rank, True)


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the program has ended"
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.05)
