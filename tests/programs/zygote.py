"""Runs programs one after the other, each in a fork of this process, which has imported Lightning already.

Receives, by the pipe whose descriptor is the only argument, a program's path and arguments, its environment and the
file for what it prints; sends its process number, then its exit code. Ends when the pipe does.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from multiprocessing.connection import Connection

import lean  # noqa: F401


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
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
