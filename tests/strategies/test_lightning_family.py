"""Both names of Lightning: what is bound to which, what a Trainer of the other one says, and that they train alike."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from environments import LEAN

from lightning_gossip.strategies import lightning_family, lightning_names

TESTS = Path(__file__).parents[1]
OTHER = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has imported nothing."""
    monkeypatch.setattr(lightning_family, "_bound", [])
    monkeypatch.setattr(lightning_family, "_asked", [])
    for name in (*OTHER, *OTHER.values()):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize(
    ("imported", "expected"),
    [
        ((), "lightning.pytorch"),
        (("lightning.pytorch",), "lightning.pytorch"),
        (("pytorch_lightning",), "pytorch_lightning"),
        (("lightning_fabric",), "pytorch_lightning"),
        (("lightning.fabric",), "lightning.pytorch"),
        (("pytorch_lightning", "lightning.pytorch"), "lightning.pytorch"),
    ],
)
def test_classes_bind_to_what_is_imported(
    imported: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in imported:
        monkeypatch.setitem(sys.modules, name, ast)
    assert lightning_family.bound() == expected
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ast)  # what comes later changes nothing
    assert lightning_family.bound() == expected


@pytest.mark.usefixtures("undecided")
def test_without_the_one_they_bind_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_family, "find_spec", lambda name: None)
    assert lightning_family.bound() == "pytorch_lightning"


@pytest.mark.usefixtures("undecided")
def test_a_program_can_say_which() -> None:
    lightning_family.use_lightning("pytorch_lightning")
    assert lightning_family.bound() == "pytorch_lightning"
    lightning_family.use_lightning("pytorch_lightning")
    with pytest.raises(RuntimeError, match=r"bound to `pytorch_lightning`.*use_lightning\('lightning.pytorch'\)"):
        lightning_family.use_lightning("lightning.pytorch")
    with pytest.raises(ValueError, match=r"must be one of 'lightning.pytorch', 'pytorch_lightning'; got 'torch'"):
        lightning_family.use_lightning("torch")  # type: ignore[arg-type]


def test_the_two_halves_import_the_same() -> None:
    """Whoever adds a name to one half adds it to the other."""
    tree = ast.parse(Path(str(lightning_names.__file__)).read_text())
    [choice] = [node for node in tree.body if isinstance(node, ast.If)]
    one, other = (ast.unparse(ast.Module(half, [])) for half in (choice.body, choice.orelse))
    for name, other_name in OTHER.items():
        one = one.replace(name, other_name)
    assert one == other


PROGRAM = """
import sys
import {family} as pl
import lightning_gossip
from {family}.demos.boring_classes import BoringModel

def main():
    named = sys.argv[1]
    for strategy in (named,) if "spawn" in named else (lightning_gossip.ElasticGossipStrategy(), named):
        trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=4, limit_val_batches=1,
                             logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(BoringModel())
    [ddp] = (c for c in type(trainer.strategy).__mro__ if c.__name__ == "DDPStrategy")
    print(ddp.__module__, "{other}" in sys.modules)

if __name__ == "__main__":
    main()
"""


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("named", ["downpour", "gossip_spawn"])
@pytest.mark.parametrize(
    ("family", "other"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")]
)
def test_each_trains_where_only_it_is_imported(family: str, other: str, named: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(family=family, other=other))
    command = [sys.executable, str(program), named]
    done = subprocess.run(command, env=LEAN, capture_output=True, text=True, timeout=150, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = 1 if "spawn" in named else 2
    assert done.stdout.splitlines()[-ranks:] == [f"{family}.strategies.ddp False"] * ranks


REFUSED = """
import lightning.pytorch, pytorch_lightning, lightning_gossip
for strategy in (lightning_gossip.ElasticGossipStrategy(), "elastic_gossip"):
    try:
        pytorch_lightning.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, barebones=True)
    except (ValueError, RuntimeError) as error:
        print(error)
"""


@pytest.mark.long
@pytest.mark.processes
def test_a_trainer_of_the_other_says_what_to_do() -> None:
    command = [sys.executable, "-c", REFUSED]
    done = subprocess.run(command, env=LEAN, capture_output=True, text=True, timeout=150, check=True)
    told = done.stdout.splitlines()
    assert len(told) == 2
    for text in told:
        assert "lightning.pytorch`" in text
        assert "lightning_gossip.use_lightning('pytorch_lightning')" in text


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "part",
    [
        "test_strategies.py",
        *(
            pytest.param(part, marks=pytest.mark.long)
            for part in (
                "test_evaluation_window.py",
                "test_downpour.py",
                "test_checkpoint.py::test_a_resumed_run_equals_an_unbroken_one_bit_for_bit",
            )
        ),
    ],
)
def test_a_part_of_the_suite_holds_under_the_other_name(part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "other_lightning", str(TESTS / "strategies" / part)]
    environment = LEAN | {"PYTHONPATH": f"{TESTS}:{LEAN['PYTHONPATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
