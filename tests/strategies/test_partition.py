"""A rank that is cut off from all others for longer than `lost_after`, and comes back (design §10)."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from environments import LEAN
from launched import PROGRAMS, Ended
from waiting import until

from benchmarks.shared.namespaces import INTERFACE, Network, NetworkUnavailable, check_requirements
from lightning_gossip.control.store import VARIABLE

pytestmark = [pytest.mark.processes, pytest.mark.faults, pytest.mark.long]

LOST_AFTER = 4.0


@pytest.mark.parametrize("rank", [1, 2])
def test_who_is_cut_off_is_lost_and_joins_when_the_link_is_back(tmp_path: Path, rank: int) -> None:
    """Ranks in network namespaces, the store beside rank 0; then all test, and have one model."""
    try:
        check_requirements()
    except NetworkUnavailable as error:
        pytest.skip(str(error))
    arguments = ["--timeout", 60, "--min-replicas", 1, "--lost-after", LOST_AFTER]
    arguments += ["--epochs", 60, "--fault", "slow:0:0", "--devices", 3]
    command = [sys.executable, str(PROGRAMS / "train.py"), str(tmp_path), *map(str, arguments)]
    with Network(3) as network:
        environment = LEAN | {"GLOO_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": network.address(0), VARIABLE: "True"}
        environment["MASTER_PORT"] = "29500"
        output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        store = network.start(0, [sys.executable, "-m", "lightning_gossip", "store", "--port", "29500"], environment)
        ranks = [network.start(k, command, environment | {"LOCAL_RANK": f"{k}"}, **output) for k in range(3)]
        until(lambda: len(list(tmp_path.glob("pid_*"))) == 3, 60, look=0.1)
        time.sleep(3)
        network.set_link(rank, up=False)
        time.sleep(LOST_AFTER + 5)
        network.set_link(rank, up=True)
        printed = [process.communicate(timeout=150)[0].decode() for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0, 0], printed
        assert store.wait(10) == 0
    assert f"rank {rank} lost at step" in printed[0], printed
    assert f"(no sign of life for {LOST_AFTER:g} s); 2 of 3 go on" in printed[0], printed
    assert f"rank {rank} joined at step" in printed[0], printed
    assert "it joins them anew" in printed[rank], printed
    results = Ended(tmp_path, 0, "".join(printed)).results()
    assert len(results) == 3
    for other in results:
        assert other["state"] == results[0]["state"]
        assert other["step"] == results[0]["step"]
