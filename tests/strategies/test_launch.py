"""Real processes: every way to start them, and every way in which they end.

What these tests show lies between processes: launchers, signals, exit codes, and that nothing is left. All others run
ranks as threads (ranks.py) or as forks (forked.py).
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import Ended, Process, Program, wait_for

pytestmark = pytest.mark.faults


def program(*arguments: Any, **options: Any) -> pytest.MarkDecorator:
    """Give the test, as ``ended``, how :class:`Program` with these arguments ended."""
    name = " ".join(map(str, arguments))
    return pytest.mark.parametrize("ended", [Program(arguments, **options)], indirect=True, ids=[name])


@pytest.fixture
def ended(request: pytest.FixtureRequest, tmp_path: Path) -> Ended:
    return request.param.run(tmp_path)


@pytest.fixture(autouse=True)
def _no_shared_temporary_files() -> Iterator[None]:
    before = set(Path(tempfile.gettempdir()).glob("*.temp.ckpt"))
    yield
    assert set(Path(tempfile.gettempdir()).glob("*.temp.ckpt")) == before


# -- starts -----------------------------------------------------------------------------------------------------------


@program("--strategy", "gossip", "elastic_gossip", "downpour", "--devices", 2, "--fits", 2, as_a_user=True)
def test_names_that_start_the_program_again_fit_and_test(ended: Ended) -> None:
    """Those that fork are in test_strategies.py."""
    assert ended.code == 0, ended.printed
    for strategy in ("gossip", "elastic_gossip", "downpour"):
        ranks = ended.results(strategy)
        made = [rank["step"] for rank in ranks]
        assert sum(made) == 2 * 48, "the clock goes on in the second fit"
        assert strategy == "downpour" or made == [48] * 2, "where batches are not dealt as workers have need of them"
        for rank in ranks:
            assert rank["state"] == ranks[0]["state"], "all hold the consensus model"
            assert rank["accuracy"] == ranks[0]["accuracy"]
            assert rank["accuracy"] > 0.9 or strategy == "downpour", "how well its workers learnt depends on timing"


@pytest.mark.long
@program("--strategy", "gossip_spawn", "--devices", 2, as_a_user=True)
def test_gossip_spawn_fits_and_tests(ended: Ended) -> None:
    """Only the launching process lives on, and Lightning refuses a second fit."""
    assert_fitted_and_tested(ended, "gossip_spawn")


@pytest.mark.long
@program("--strategy", "elastic_gossip_spawn", "--devices", 2)
def test_elastic_gossip_spawn_fits_and_tests(ended: Ended) -> None:
    assert_fitted_and_tested(ended, "elastic_gossip_spawn")


def assert_fitted_and_tested(ended: Ended, strategy: str) -> None:
    assert ended.code == 0, ended.printed
    [launching] = ended.results(strategy)
    assert launching["accuracy"] > 0.9


@program("--strategy", "elastic_gossip", "downpour", "--devices", 2, "--nodes", 2, nodes=2)
def test_torchrun_with_two_nodes_of_two_processes(ended: Ended) -> None:
    for strategy in ("elastic_gossip", "downpour"):
        ranks = ended.results(strategy)
        assert len(ranks) == 4
        assert all(rank["state"] == ranks[0]["state"] for rank in ranks), ended.printed
    assert all(rank["accuracy"] > 0.9 for rank in ended.results("elastic_gossip")), ended.printed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@program("--accelerator", "cuda", "--devices", 2, as_a_user=True)
def test_nccl(ended: Ended) -> None:
    assert ended.code == 0, ended.printed


# -- exceptions and signals -------------------------------------------------------------------------------------------


@program("--fault", "raise:0:10", "--devices", 3)
def test_an_exception_on_rank_0_ends_all_with_its_cause(ended: Ended) -> None:
    assert_all_ended_with_the_cause(ended, 0)


@pytest.mark.long
@program("--fault", "raise:2:10", "--devices", 3)
def test_an_exception_on_another_rank_ends_all_with_its_cause(ended: Ended) -> None:
    assert_all_ended_with_the_cause(ended, 2)


def assert_all_ended_with_the_cause(ended: Ended, rank: int) -> None:
    assert ended.code == 1
    found = ended.endings()
    assert found.pop(rank)["type"] == "ValueError"
    assert len(found) == 2
    for ending in found.values():
        assert ending["text"] == f"rank {rank} stopped at step 10: ValueError: boom"
    assert "ValueError: boom" in ended.printed


@pytest.mark.long
@program("--fault", "setup:1:0", "--devices", 2)
def test_an_exception_before_training_ends_all(ended: Ended) -> None:
    assert ended.code == 1
    assert ended.endings()[0]["text"] == "rank 1 stopped at step 0: ValueError: boom in setup"


@pytest.mark.long
@program("--strategy", "elastic_gossip_spawn", "--fault", "raise:1:10", "--devices", 2)
def test_an_exception_under_spawn_ends_all(ended: Ended) -> None:
    assert ended.code == 1
    assert "ValueError: boom" in ended.printed


@pytest.mark.long
@program("--fault", "SIGTERM:0:10", "--devices", 2)
def test_sigterm_to_rank_0_ends_all(ended: Ended) -> None:
    assert_sigterm_ended_both(ended, 0)


@pytest.mark.long
@program("--fault", "SIGTERM:1:10", "--devices", 2)
def test_sigterm_to_another_rank_ends_all(ended: Ended) -> None:
    assert_sigterm_ended_both(ended, 1)


def assert_sigterm_ended_both(ended: Ended, rank: int) -> None:
    assert ended.code == 143, ended.printed
    found = ended.endings()
    assert {ending["type"] for ending in found.values()} == {"SIGTERMException"}
    assert len(found) == 2
    assert re.search(f"rank {rank} stopped at step 1[01]: it received SIGTERM", ended.printed)


@pytest.mark.long
@program("--fault", "SIGINT:1:10", "--devices", 2)
def test_sigint_to_one_rank_ends_all(ended: Ended) -> None:
    assert ended.code == 1
    found = ended.endings()
    assert {ending["type"] for ending in found.values()} == {"KeyboardInterrupt"}
    assert len(found) == 2


def press_ctrl_c(process: Process, out: Path) -> None:
    """A terminal sends SIGINT to every process of the foreground group at once."""
    wait_for(process, out / "pid_1")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)


@program("--fault", "slow:0:0", "--epochs", 100, "--devices", 2, after=press_ctrl_c)
def test_ctrl_c_in_a_terminal_ends_all(ended: Ended) -> None:
    assert ended.code == 1
    assert {ending["type"] for ending in ended.endings().values()} == {"KeyboardInterrupt"}


def interrupt_the_first(process: Process, out: Path) -> None:
    wait_for(process, out / "pid_1")
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)


@pytest.mark.long
@program(
    *("--strategy", "gossip_spawn", "--fault", "slow:0:0", "--epochs", 100, "--devices", 2), after=interrupt_the_first
)
def test_sigint_to_the_launching_process_under_spawn_ends_all(ended: Ended) -> None:
    assert ended.code == 1


# -- processes that are lost ------------------------------------------------------------------------------------------


@program("--fault", "SIGKILL:2:10", "--devices", 4)
def test_a_killed_rank_is_named_by_those_that_wait_for_it(ended: Ended) -> None:
    assert ended.code == 1
    found = ended.endings()
    assert sorted(found) == [0, 1, 3]
    for rank, ending in found.items():
        assert "rank 2" in ending["text"]
        if ending["type"] == "PartnerLost":
            assert f"rank {rank} lost its partner rank 2 at step 1" in ending["text"]
    assert "PartnerLost" in {ending["type"] for ending in found.values()}


@pytest.mark.long
@program("--fault", "SIGKILL:1:5", "--timeout", 60, "--probability", 1e-9, "--devices", 2, "--epochs", 500)
def test_a_killed_rank_that_nobody_exchanges_with_is_reported_by_the_launcher(ended: Ended) -> None:
    assert ended.code == 1
    assert "rank 1 is gone: its process" in ended.endings()[0]["text"]
    assert "was killed by SIGKILL" in ended.endings()[0]["text"]


@pytest.mark.long
@program("--fault", "SIGKILL:0:10", "--devices", 2, linger=20)
def test_a_killed_launching_process_takes_the_others_with_it(ended: Ended) -> None:
    assert ended.code == -signal.SIGKILL
    found = ended.endings()
    assert sorted(found) == [1]
    for ending in found.values():
        assert "the run's store is gone" in ending["text"] or "lost its partner rank 0" in ending["text"]


@pytest.mark.long
@program("--fault", "SIGSTOP:2:3", "--timeout", 6, "--devices", 3)
def test_a_stopped_rank_is_not_waited_for_longer_than_twice_the_timeout(ended: Ended) -> None:
    assert ended.code == 1
    found = ended.endings()
    waited = [ending for ending in found.values() if ending["type"] == "PartnerLost"]
    silent = [e for e in waited if "lost its partner rank 2" in e["text"] and "silent for 6 s" in e["text"]]
    assert silent, found
    assert all("rank 2" in ending["text"] for ending in found.values())


# an epoch has 32 batches, which are dealt: one of the two may make most of them
@pytest.mark.long
@program("--strategy", "downpour", "--fault", "shard:0:40", "--devices", 2, "--epochs", 500)
def test_a_killed_shard_ends_all_with_its_name_and_leaves_the_last_checkpoint_whole(ended: Ended) -> None:
    assert ended.code == 1
    assert list(ended.out.rglob("*.ckpt"))
    found = ended.endings()
    assert set(found) == {0, 1}
    for ending in found.values():
        assert ending["type"] in ("ShardLost", "RunStopped")
        assert "parameter server shard 0 (127.0.0.1:" in ending["text"]


@pytest.mark.long
@program("--strategy", "downpour", "--fault", "SIGKILL:0:10", "--devices", 2)
def test_shards_end_with_a_run_whose_launching_process_is_killed(ended: Ended) -> None:
    """Nothing is left within 5 seconds."""
    assert ended.code == -signal.SIGKILL
    assert set(ended.endings()) == {1}
