"""What an exchange costs a step on the device, beside no communication, in interleaved blocks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from command_line import Nobody
from models import preact_resnet18

from benchmarks.gpu.ranks import TIMEOUT
from benchmarks.gpu.rows import SPEED
from benchmarks.shared import rows
from benchmarks.shared.quartiles import ratios
from benchmarks.shared.side_by_side import (
    LightningSetup,
    Meter,
    Plan,
    Setup,
    Values,
    run_rank,
)
from benchmarks.shared.workloads import Task, Transformer, nesterov
from lightning_gossip import ElasticGossipStrategy
from lightning_gossip.strategies.pairwise import PairwiseStrategy

PERIOD = 8
_TIMES = ("step_ms", "wait_ms", "mix_ms")


def tasks(rehearse: bool) -> dict[str, Task]:
    """Return what is trained, by name; ``rehearse``: small enough for a CPU."""
    if rehearse:
        small = partial(Transformer, vocabulary=64, context=16, width=32, depth=2, heads=2)
        return {"GPT, small": Task(small, _adamw, partial(_text, 64, 2, 16))}
    gpt = partial(Transformer, vocabulary=8192, context=512, width=768, depth=12, heads=12)
    return {
        "ResNet-18 (11 M)": Task(preact_resnet18, nesterov, _images),
        "GPT (98 M)": Task(gpt, _adamw, partial(_text, 8192, 16, 512)),
    }


def _adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)  # type: ignore[arg-type]


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (256,))


def _text(vocabulary: int, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(vocabulary, (batch, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def setups() -> list[Setup]:
    """Return what is compared."""

    def elastic(**kwargs: object) -> Callable[[int], ElasticGossipStrategy]:
        arguments = {"process_group_backend": "gloo", "timeout": TIMEOUT} | kwargs
        return lambda round_: ElasticGossipStrategy(**(arguments | {"seed": round_}))  # type: ignore[arg-type]

    return [
        LightningSetup("none", elastic(peers=Nobody())),
        LightningSetup("none again", elastic(peers=Nobody())),
        LightningSetup("probability 1", elastic()),
        LightningSetup("probability 1/8", elastic(probability=1 / PERIOD)),
        LightningSetup("period 8", elastic(period=PERIOD)),
        LightningSetup("period 8, delay 7", elastic(period=PERIOD, delay=PERIOD - 1)),
        LightningSetup("probability 1, over links", elastic(shared_memory=False)),
    ]


class _StatsMeter(Meter):
    """Host time of the training thread in snapshots, waits and mixing, ms a step; from the strategy's own counts."""

    def start(self, trainer: pl.Trainer | None) -> None:
        """See :meth:`Meter.start`."""
        self._waited = self._mixed = 0.0
        if trainer is not None and isinstance(trainer.strategy, PairwiseStrategy):
            self._strategy = trainer.strategy
            end_step = trainer.strategy.end_step

            def end_and_count() -> None:
                end_step()
                if (exchange := self._strategy.exchange) is not None:
                    self._waited += exchange.stats.wait_seconds
                    self._mixed += exchange.stats.mix_seconds

            trainer.strategy.end_step = end_and_count  # type: ignore[method-assign]

    def begin(self) -> None:
        """See :meth:`Meter.begin`."""
        self._waited = self._mixed = 0.0

    def end(self) -> None:
        """See :meth:`Meter.end`."""
        self._seen = self._waited, self._mixed

    def read(self, steps: int) -> Values:
        """See :meth:`Meter.read`."""
        return {"wait_ms": 1e3 * self._seen[0] / steps, "mix_ms": 1e3 * self._seen[1] / steps}


def measure(device: torch.device, name: str, rehearse: bool, rounds: int, seconds: float, file: Path) -> None:
    """Measure on this rank, all ranks alike; rank 0 appends a line a block to ``file``."""
    task = tasks(rehearse)[name]
    torch.manual_seed(int(os.environ["RANK"]))
    plan = Plan(steps=PERIOD if rehearse else 3 * PERIOD, warm_up=PERIOD, timeout=TIMEOUT, accelerator=device.type)
    inputs, labels = task.batch()
    batch = inputs.to(device), labels.to(device)

    def report(setup: str, round_: int, values: Values) -> None:
        rows.append(
            file, [{"setup": setup, "round": round_, **{key: values[key] for key in ("step_ms", "wait_ms", "mix_ms")}}]
        )

    run_rank(setups(), task.model(), batch, range(rounds), report, plan, [_StatsMeter()], seconds)


def summarize(file: Path, where: dict[str, str], model: str, ranks: int, results: Path) -> None:
    """Add a row a set-up to the results: medians and quartiles of the ratios within a round."""
    blocks = rows.read(file)
    complete = {row["round"] for row in rows.find(blocks, {"setup": setups()[-1].name})}
    complete &= {row["round"] for row in rows.find(blocks, {"setup": "none"})}

    def column(setup: str, name: str) -> list[float]:
        return [float(row[name]) for row in rows.find(blocks, {"setup": setup}) if row["round"] in complete]

    for setup in setups():
        low, median, high = ratios(column(setup.name, "step_ms"), column("none", "step_ms"))
        figures = {key: float(np.median(column(setup.name, key))) for key in ("step_ms", "wait_ms", "mix_ms")}
        ratio = {"to_none": median, "lower_quartile": low, "upper_quartile": high, "rounds": len(complete)}
        rows.append(
            results / SPEED, [{**where, "model": model, "setup": setup.name, "ranks": ranks, **figures, **ratio}]
        )
        print(
            f"{model}, {setup.name}: {figures['step_ms']:.1f} ms, to none {median:.3f} ({low:.3f}-{high:.3f})",
            flush=True,
        )


def temporary_file() -> Path:
    """Return a path for the blocks of one measurement."""
    return Path(tempfile.mkdtemp(), "blocks.csv")
