"""Programs as users of other libraries write them, on two CPU ranks.

They need `pip install -e '.[dev,libraries]'`; those whose library is missing are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from environments import ENVIRONMENT
from running import kill, members

BATCHES = {
    "chemprop": (4, 24),
    "darts": (4, 23),
    "lightly": (4, 32),
    "neuralforecast": (20, 4),
    "pytorch_forecasting": (2, 37),
    "scvi": (4, 24),
}
"""By the library's module: epochs, and batches of one, over both ranks."""

CLASSES = {
    "elastic_gossip": "ElasticGossipStrategy",
    "downpour": "DownpourStrategy",
    "diloco": "DiLoCoStrategy",
}

EXCHANGES = {"elastic_gossip": 1, "downpour": 5, "diloco": 4}
"""Steps from one to the next."""

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(600)]


def trained(library: str, strategy: str, out: Path) -> list[dict[str, Any]]:
    """Run a library's program; return what its ranks leave, once nothing else is left of them."""
    command = [sys.executable, str(Path(__file__).with_name(f"with_{library}.py")), str(out), strategy]
    with (out / "printed").open("w") as printed:
        program = subprocess.Popen(
            command, env=ENVIRONMENT, cwd=out, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = program.wait(500)
        finally:
            left = members(program.pid)
            kill(left)
    assert code == 0, (out / "printed").read_text()[-5000:]
    assert not left
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank_*.json"))]


@pytest.mark.parametrize("strategy", CLASSES)
@pytest.mark.parametrize("library", BATCHES)
def test_it_trains(library: str, strategy: str, tmp_path: Path) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    first, second = ranks = trained(library, strategy, tmp_path)

    for rank in ranks:
        assert rank["strategy"] == CLASSES[strategy]
        losses = rank["losses"]
        quarter = max(1, len(losses) // 4)
        assert mean(losses[-quarter:]) < mean(losses[:quarter])  # and so all are finite
        assert rank["exchanges"] >= len(losses) // EXCHANGES[strategy] - 1

    # a rank has its half, or what it is dealt: an epoch may end a batch early or late
    epochs, batches = BATCHES[library]
    assert abs(len([*chain(*(rank["losses"] for rank in ranks))]) - epochs * batches) <= epochs

    assert first["parameters"] == second["parameters"]
    assert first["predicted_finite"]
    # darts' own checkpoint comes before Downpour's last pushes
    assert first["loaded_equal"] or (library, strategy) == ("darts", "downpour")
