"""A link that takes longer for a payload than a rank may be silent is no death."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shared.namespaces import INTERFACE, Network, NetworkUnavailable, check_requirements

PROGRAM = Path(__file__).parent.parent / "programs" / "slow_link.py"

pytestmark = [pytest.mark.processes, pytest.mark.faults]


@pytest.mark.long
def test_a_payload_that_takes_longer_than_lost_after_is_waited_for() -> None:
    """12 MB at 10 Mbit/s, and 5 s without a sign of life: heartbeats come over the same link."""
    try:
        check_requirements()
    except NetworkUnavailable as error:
        pytest.skip(str(error))
    with Network(2) as network:
        network.set_rate(10)
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        ranks = [
            network.start(
                rank,
                [sys.executable, str(PROGRAM), str(rank), network.address(0), "29500"],
                environment,
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        said = [json.loads(rank.communicate(timeout=150)[0]) for rank in ranks]
    assert [rank["members"] for rank in said] == [[0, 1], [0, 1]]
    assert [rank["value"] for rank in said] == [0.5, 0.5]
    assert all(min(rank["seconds"]) > 8 for rank in said), "the link was as slow as that"
