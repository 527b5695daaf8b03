"""A script with several Trainers, of which a later one loses a rank: whoever runs then is told at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from environments import LEAN

pytestmark = pytest.mark.faults

PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
sys.path.append(sys.argv[1])
from forked import Linear, regression
from lightning_gossip import DownpourStrategy, ElasticGossipStrategy

class Loss(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

def train(number, strategy, callbacks=()):
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, callbacks=list(callbacks))
    trainer.fit(Linear(), DataLoader(regression(), 4))
    print(f"trained {number} on {trainer.global_rank}", flush=True)
    return trainer

last = int(sys.argv[2])
timeout = timedelta(seconds=60)
for number in range(last):
    train(number, ElasticGossipStrategy(timeout=timeout, probability=0.5))
final = DownpourStrategy(timeout=timeout, dealt=False) if sys.argv[3] == "downpour" else \\
    ElasticGossipStrategy(timeout=timeout, probability=0.01)
begin = time.monotonic()
try:
    train(last, final, [Loss()])
except Exception as error:
    print(f"ended after {time.monotonic() - begin:.1f} s: {error}", flush=True)
    raise SystemExit(3)
"""


@pytest.mark.long
@pytest.mark.parametrize(("trainers", "strategy"), [(1, "gossip"), (2, "gossip"), (1, "downpour")])
def test_a_lost_rank_of_a_later_trainer_is_noticed_at_once(tmp_path: Path, trainers: int, strategy: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("\\\\", "\\"))
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(program), str(Path(__file__).parents[1]), str(trainers), strategy],
        env=LEAN,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        cwd=tmp_path,
    )
    assert f"trained {trainers - 1} on 0" in done.stdout
    assert "rank 1 is gone" in done.stdout, done.stdout[-3000:]
    assert "SIGKILL" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ended after")]
    assert float(line.split()[2]) < 20, line
    assert done.returncode == 3
    assert time.monotonic() - begin < 60
