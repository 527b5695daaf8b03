"""examples/replicas_in_a_notebook.ipynb: every cell runs, and what it shows is what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.slow]

NOTEBOOK = Path(__file__).parents[2] / "examples" / "replicas_in_a_notebook.ipynb"


@pytest.mark.long
def test_it_runs_and_the_rank_that_is_killed_comes_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "the curves are drawn"
    text = "".join(output.get("text", "") for output in outputs)
    assert "rank 2 lost at step 100" in text
    assert "rank 2 joined" in text
    assert "lost: 1, joined: 1" in text
    accuracies = [float(value) for value in re.findall(r"(\d+\.\d)%", text)]
    assert len(accuracies) == 5
    assert min(accuracies) > 80


def test_its_outputs_are_there_and_name_no_machine() -> None:
    text = NOTEBOOK.read_text()
    assert text.count('"image/png"') == 2
    assert not re.search(r"/(home|root|tmp|work|usr)/", text)
