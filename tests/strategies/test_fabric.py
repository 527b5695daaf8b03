"""Ranks that Fabric launches with a replica each, of which one is killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from environments import LEAN
from launched import PROGRAMS, Forked
from running import kill, members
from waiting import until

from lightning_gossip import ReplicaFabricStrategy


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.faults
@pytest.mark.parametrize("rank", [2, 0])
def test_the_others_go_on_without_one_that_is_killed(tmp_path: Path, rank: int) -> None:
    """Rank 0 is the launching process."""
    process = Forked([str(PROGRAMS / "fabric_members.py"), str(tmp_path), str(rank)], LEAN, str(tmp_path / "printed"))
    try:
        code = process.wait(150)
        until(lambda: not members(process.pid), 30, look=0.1)
    finally:
        kill(members(process.pid))
    assert code == (-signal.SIGKILL if rank == 0 else 0), (tmp_path / "printed").read_text()[-3000:]
    others = [k for k in range(3) if k != rank]
    results = [json.loads((tmp_path / f"result_{k}.json").read_text()) for k in others]
    assert sorted(path.name for path in tmp_path.glob("result_*")) == [f"result_{k}.json" for k in others]
    assert [(result["members"], result["steps"]) for result in results] == [(others, 60)] * 2
    assert results[0]["weight"] == results[1]["weight"]


def test_what_survives_is_started_as_processes_of_the_script() -> None:
    with pytest.raises(ValueError, match="`start_method` must be 'popen' with `survives=True`, got 'fork'"):
        ReplicaFabricStrategy(survives=True, start_method="fork")
    with pytest.raises(ValueError, match="`survives` must be one of True, False; got 1"):
        ReplicaFabricStrategy(survives=1)  # type: ignore[arg-type]
