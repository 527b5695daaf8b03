"""Python processes that see what this one sees: modules may be reachable through this process' ``sys.path`` only."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package as ``python -m`` does, with this process' ``sys.path``.

    ``python -m`` itself looks in the present folder first, where another module may bear that name.
    """
    path = [entry for entry in sys.path if isinstance(entry, str)]
    run = f"import sys; sys.path[:] = {path!r}; import runpy; runpy.run_module({module!r}, None, '__main__', True)"
    return [sys.executable, "-c", run, *arguments]


@contextmanager
def path_in_environment() -> Iterator[None]:
    """Let Python programs that are started meanwhile look where this one does, as far as an environment can tell them.

    What every interpreter of this installation has by itself is left out: other programs inherit it too.
    """
    before = os.environ.get("PYTHONPATH")
    installed = _of_installation()
    entries = [entry or os.getcwd() for entry in sys.path if isinstance(entry, str) and entry not in installed]
    os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in entries if os.pathsep not in entry)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _of_installation() -> set[str]:
    library = sysconfig.get_path("stdlib")
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    found = {library, f"{library}/lib-dynload", f"{os.path.dirname(library)}/python{version}.zip"}
    found |= {sysconfig.get_path(name) for name in ("platstdlib", "purelib", "platlib")}
    return found | {*site.getsitepackages(), site.getusersitepackages()}
