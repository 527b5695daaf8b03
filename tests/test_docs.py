"""The pages hold: examples run, links lead somewhere, numbers are those of the rows, messages are the package's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import torch.distributed as dist
from curves import AsProcess
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gossip
from docs import measured

ROOT = Path(__file__).parents[1]
PAGES = [str(page.relative_to(ROOT)) for page in measured.PAGES]
LINKED = [
    *PAGES,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(str(file.relative_to(ROOT)) for file in ROOT.glob("benchmarks/**/*.md")),
]
"""Pages whose links have to lead somewhere."""

FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?:(?!`).|(?<!`)`(?!`))+?\1")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?\s*\)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


# Examples


class Model(LightningModule):
    """What the examples call `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def names_of_the_pages() -> dict[str, Any]:
    """What an example may use without saying where it comes from (CONTRIBUTING.md)."""
    model = Model()
    public = {name: getattr(lightning_gossip, name) for name in lightning_gossip.__all__}
    return public | {
        "LightningModule": LightningModule,
        "Trainer": Trainer,
        "evaluate": lambda module: None,
        "loader": DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 1)), batch_size=8),
        "loss": nn.functional.mse_loss,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "rank": 0,
        "torch": torch,
    }


def examples(page: str) -> Iterator[tuple[str, ast.Module]]:
    """The page's code in Python: what stands behind `python` where it begins, and the code, compiled."""
    text = (ROOT / page).read_text()
    for found in FENCE.finditer(text):
        language, _, rest = found["info"].strip().partition(" ")
        if language == "python":
            line = text.count("\n", 0, found.start("body"))
            yield rest, ast.increment_lineno(ast.parse(found["body"], page), line)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in (ROOT / page).read_text()])
@pytest.mark.usefixtures("alone")
def test_examples_run(page: str, as_process: AsProcess) -> None:
    names = names_of_the_pages() | {"__name__": page}
    for info, code in examples(page):
        assert info in ("", "no-run"), f"{page}: ```python {info}"
        compiled = compile(code, str(ROOT / page), "exec")
        if not info:
            exec(compiled, names)


# Links


@cache
def anchors(file: Path) -> frozenset[str]:
    """The anchors of a page's headings, as where the repository is looked at."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", file.read_text())):
        words = LINK.sub(lambda link: link[0][1:].partition("]")[0], heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(next(name for name in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if name not in found))
    return frozenset(found)


def links(page: str) -> Iterator[str]:
    """Where a page's links lead, but for those into the world."""
    text = CODE.sub("", FENCE.sub("", (ROOT / page).read_text()))
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            yield unquote(target)


def leads_nowhere(page: str, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    return not file.exists() or (bool(anchor) and (file.suffix != ".md" or anchor not in anchors(file.resolve())))


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    assert [target for target in links(page) if leads_nowhere(page, target)] == []


@pytest.mark.parametrize("target", ["nowhere.md", "choose.md#nowhere", "#nowhere", "../benchmarks/results/none.csv"])
def test_a_link_that_does_not_is_found(target: str) -> None:
    assert leads_nowhere("docs/index.md", target)


def test_links_are_found() -> None:
    assert {"choose.md", "howto/slow_links.md"} <= set(links("docs/index.md"))


# Numbers


@pytest.mark.parametrize("page", PAGES)
def test_measured_numbers_are_those_of_the_rows(page: str) -> None:
    assert [str(claim) for claim in measured.claims(ROOT / page) if claim.computed() != claim.number] == []


NUMBER = re.compile(r"\**[≈~]?\d[\d.,]*(\s?(%|s|ms|MB|GB|×|x))?\**")
SETTINGS = "<!-- settings -->"


def tables(text: str) -> Iterator[tuple[str, list[str]]]:
    """Tables, each with the line before it."""
    lines = FENCE.sub("", text).splitlines()
    before, table = "", list[str]()
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            yield before, table
            table = []
        before = line if line.strip() else before


def without_source(text: str) -> list[str]:
    """Cells of a page's tables that are a number, and do not say where it comes from."""
    return [
        cell.strip()
        for before, table in tables(text)
        if before.strip() != SETTINGS
        for row in table[2:]
        for cell in re.split(r"(?<!\\)\|", row)[2:-1]
        if NUMBER.fullmatch(cell.strip())
    ]


@pytest.mark.parametrize("page", PAGES)
def test_numbers_in_tables_say_where_they_come_from(page: str) -> None:
    assert without_source((ROOT / page).read_text()) == []


@pytest.mark.parametrize("number", ["8.6", "**1,234**", "97.3 %", "0.08 s"])
def test_a_number_that_does_not_is_found(number: str) -> None:
    table = f"| scheme | rate |\n| --- | --- |\n| gossip | {number} |\n"
    assert without_source(table) == [number]
    assert without_source(f"{SETTINGS}\n{table}") == []
    assert without_source(table.replace(number, f'{number}<!-- to_ddp("period 8") -->')) == []


def test_a_number_that_is_not_measured_so_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        'so 8.7<!-- to_ddp("period 8") --> times, 1.0<!-- to_ddp("ddp") -->, 2,800<!-- updates_to_97("ddp") -->\n'
    )
    first, *others = measured.claims(page)
    assert (first.number, first.computed()) == ("8.7", "8.6")
    assert [claim.computed() for claim in others] == ["1.0", "2,800"]
    measured.write(page)
    assert page.read_text().startswith('so 8.6<!-- to_ddp("period 8") --> times, 1.0<!--')


@pytest.mark.parametrize("source", ["to_ddp()", "nothing", "value('text', 'loss')", "to_ddp('never')", "import os"])
def test_a_source_that_says_nothing_is_an_error(source: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - in words of each one's own
        measured.evaluate(source)


# Messages


@cache
def strings() -> tuple[str, ...]:
    """All strings of the package, with an ellipsis for what is put into them."""
    found = []
    for file in (ROOT / "lightning_gossip").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "…", node.value))
    return tuple(found)


def messages() -> list[str]:
    """What stands in the first column of the tables of messages."""
    cells = [
        re.split(r"(?<!\\)\|", row)[1].strip()
        for _, table in tables((ROOT / "docs" / "errors.md").read_text())
        if table[0].startswith("| message")
        for row in table[2:]
    ]
    return [
        found[2].strip() for cell in cells if "Lightning's)" not in cell for found in re.finditer(r"(`+)(.+?)\1", cell)
    ]


@pytest.mark.parametrize("message", messages())
def test_messages_are_those_of_the_package(message: str) -> None:
    parts = [part.strip(" ;:()") for part in message.split("…")]
    found = [text for text in strings() if all(part in text for part in parts)]
    assert found, "nobody says so"
