"""The rooms: imports run down the list, few import Lightning, there are no cycles, and files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_gossip"
MOST_LINES = 400

STANDS_ON = {
    "monitoring": ["strategies"],
    "strategies": ["parameter_server"],
    "parameter_server": ["exchange"],
    "exchange": ["rules", "transport"],
    "rules": ["arguments"],
    "transport": ["control"],
    "control": ["arguments"],
    "arguments": [],
}
"""A room may import those that it stands on, and all that these stand on."""

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
IMPORTS_LIGHTNING = f"{PACKAGE}.strategies.lightning_names"
"""For all others, who take its names from there: under whichever of its two names Lightning is imported."""

MAY_USE_LIGHTNING = {"monitoring", "strategies"}
OUTSIDE_THE_ROOMS = {"__init__", "__main__"}
"""The public names, which are looked up in all rooms, and the command."""


def sources() -> dict[str, str]:
    """The package's modules by their dotted names; a room's own is its ``__init__``."""
    files = (ROOT / PACKAGE).rglob("*.py")
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text() for file in files}


def imported(module: str, source: str) -> Iterator[str]:
    """What a module imports, at once or later or for its types, and what it names in a string as a module of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:  # of a module, or of what is in it
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Constant) and is_module(node.value):
            yield node.value


def is_module(value: object) -> TypeGuard[str]:
    return (
        isinstance(value, str)
        and value.startswith(f"{PACKAGE}.")
        and all(part.isidentifier() for part in value.split("."))
    )


def room(name: str) -> str:
    """The room of a dotted name within the package; the package itself is in ``__init__``."""
    first = name.split(".")[1]
    return first if first in STANDS_ON or first in OUTSIDE_THE_ROOMS else "__init__"


def below(name: str) -> set[str]:
    return {name}.union(*(below(other) for other in STANDS_ON[name]))


def upward(modules: dict[str, str]) -> list[str]:
    """Imports that do not run down the list."""
    return [
        f"{module} imports {name}"
        for module, source in modules.items()
        for name in imported(module, source)
        if room(module) in STANDS_ON and name.startswith(f"{PACKAGE}.") and room(name) not in below(room(module))
    ]


def of_lightning(modules: dict[str, str]) -> list[str]:
    """Imports of Lightning where it must not be."""
    return [
        f"{module} imports {name}"
        for module, source in modules.items()
        for name in imported(module, source)
        if (module != IMPORTS_LIGHTNING and name.split(".")[0] in LIGHTNING)
        or (name.startswith(IMPORTS_LIGHTNING) and room(module) not in MAY_USE_LIGHTNING)
    ]


def cycle(modules: dict[str, str]) -> list[str]:
    """Modules of which each imports the next, and the last is the first; the public names are not followed."""
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        names = {name for each in imported(module, source) for name in (each, each.rpartition(".")[0])}
        graph[module] = {name for name in names if name in modules and name != module}
    graph[f"{PACKAGE}.__init__"] = set()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_is_on_the_list() -> None:
    assert {module.split(".")[1] for module in sources()} == {*STANDS_ON, *OUTSIDE_THE_ROOMS}


def test_imports_run_down_the_list() -> None:
    assert upward(sources()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rules.new", "from lightning_gossip.transport.link import Link"),
        ("transport.new", "import lightning_gossip.exchange.clock"),
        ("control.new", "def later():\n    from lightning_gossip.strategies import base"),
        ("exchange.new", "if TYPE_CHECKING:\n    from lightning_gossip.parameter_server.client import DownpourClient"),
        ("strategies.new", "monitor = import_module('lightning_gossip.monitoring.monitor')"),
        ("arguments", "from lightning_gossip.control.run import Control"),
        ("monitoring.new", "from lightning_gossip import GossipStrategy"),
    ],
)
def test_an_import_that_does_not_is_found(module: str, source: str) -> None:
    assert len(upward({f"{PACKAGE}.{module}": source})) == 1


def test_one_module_imports_lightning_for_strategies_and_monitoring() -> None:
    assert of_lightning(sources()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import lightning.pytorch as pl",
        "def later():\n    from pytorch_lightning import Trainer",
        "import lightning",
        "from lightning_gossip.strategies.lightning_names import Trainer",
    ],
)
def test_an_import_of_lightning_below_is_found(source: str) -> None:
    for module in ("exchange.new", "__init__", "__main__", "arguments"):
        assert len(of_lightning({f"{PACKAGE}.{module}": source})) == 1


def test_strategies_and_monitoring_take_lightning_from_that_module() -> None:
    for module in ("strategies.new", "monitoring.new"):
        for source in ("import lightning.pytorch as pl", "from lightning_fabric.plugins import CheckpointIO"):
            assert len(of_lightning({f"{PACKAGE}.{module}": source})) == 1
        assert of_lightning({f"{PACKAGE}.{module}": f"from {IMPORTS_LIGHTNING} import Trainer"}) == []


def test_there_is_no_cycle() -> None:
    assert cycle(sources()) == []


def test_a_cycle_is_found() -> None:
    one, two = f"{PACKAGE}.rules.one", f"{PACKAGE}.rules.two"
    made_up = {one: f"def later():\n    from {PACKAGE}.rules import two", two: f"import {one}"}
    assert set(cycle(made_up)) == {one, two}


def test_no_file_is_longer_than_is_read_in_one_sitting() -> None:
    files = [file for folder in (PACKAGE, "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


HELP = """
import lightning_gossip.__main__
try:
    lightning_gossip.__main__.main(["--help"])
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.processes
@pytest.mark.parametrize("program", ["import lightning_gossip", HELP], ids=["import", "help"])
def test_torch_and_lightning_are_imported_where_they_are_needed_only(program: str) -> None:
    program += "\nimport sys\nprint([name for name in ('torch', *sorted(sys.argv[1:])) if name in sys.modules])"
    command = [sys.executable, "-c", program, *LIGHTNING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
