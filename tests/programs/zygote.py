"""Runs programs one after the other, each in a fork of this process, which has imported Lightning already.

Receives, by the pipe whose descriptor is the only argument, a program's path and arguments, its environment and the
file for what it prints; sends its process number, then its exit code. Ends when the pipe does.

A program that starts its script again for further ranks, as Lightning does, gets forks of its own beginning for them.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import lean  # noqa: F401

FURTHER_RANKS = 3


def main(pipe: Connection) -> None:
    while True:
        try:
            command, environment, printed = pipe.recv()
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            pipe.close()
            become(command, environment, printed)
            return
        pipe.send(pid)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def become(command: list[str], environment: dict[str, str], printed: str) -> None:
    """Be what ``python command`` in a session of its own would be."""
    os.setsid()
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, printed, os.O_WRONLY), (2, printed, os.O_WRONLY)):
        opened = os.open(path, flags | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    for _ in range(FURTHER_RANKS):
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            ours.close()
            for _, other in Again.waiting:
                other.close()
            try:
                command, environment = theirs.recv()
            except EOFError:
                os._exit(0)
            break
        theirs.close()
        Again.waiting.append((pid, ours))
    else:
        subprocess.Popen = Again  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Again(subprocess.Popen[Any]):
    """Takes a process that waits, where the present script is to be started in one."""

    waiting: list[tuple[int, Connection]] = []  # noqa: RUF012

    def _execute_child(self, args: Any, *rest: Any) -> None:
        environment = rest[5]
        if not self.waiting or list(args[:2]) != [sys.executable, os.path.abspath(sys.argv[0])]:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        self.pid, pipe = self.waiting.pop(0)
        self._child_created = True
        with pipe:
            pipe.send((list(args[1:]), dict(environment)))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
