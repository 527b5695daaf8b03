"""Where an exchange's copies lie beside the model's kernels, and who makes the host wait, by torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from command_line import Nobody
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from benchmarks.gpu.ranks import TIMEOUT, make_trainer
from benchmarks.gpu.rows import PROFILE, Check, add
from benchmarks.gpu.speed import tasks
from benchmarks.shared import rows
from benchmarks.shared.side_by_side import make_links
from benchmarks.shared.workloads import SameBatch
from lightning_gossip import ElasticGossipStrategy
from lightning_gossip.strategies.pairwise import PairwiseStrategy

_WARM_UP, _STEPS = 6, 8
BEGIN, END = "gossip::begin", "gossip::end"
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)
"""Calls of the runtime in which the host waits for the device."""

Interval = tuple[float, float]


class Profiled(Callback):
    """Profiles some steps of a training on this rank."""

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.profiler = profile(activities=activities)
        self._device = device

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, PairwiseStrategy):
            make_links(strategy)
            for name, method in ((BEGIN, "begin_step"), (END, "end_step")):
                setattr(strategy, method, _recorded(name, getattr(strategy, method)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx in (_WARM_UP, _WARM_UP + _STEPS):
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            if batch_idx == _WARM_UP:
                self.profiler.start()
            else:
                self.profiler.stop()


def _recorded(name: str, function: Any) -> Any:
    def recorded() -> None:
        with record_function(name):
            function()

    return recorded


def run(device: torch.device, model: str, rehearse: bool, where: dict[str, str], results: Path) -> None:
    """Profile a training without communication, and one that exchanges at every step; on all ranks, told by rank 0."""
    task = tasks(rehearse)[model]
    inputs, labels = task.batch()
    batch = inputs.to(device), labels.to(device)
    for setup, peers in (("none", Nobody()), ("probability 1", "matching")):
        strategy = ElasticGossipStrategy(peers=peers, process_group_backend="gloo", timeout=TIMEOUT)
        profiled = Profiled(device)
        trainer = make_trainer(device, strategy, max_steps=_WARM_UP + _STEPS + 2, callbacks=[profiled])
        trainer.fit(task.model(), DataLoader(SameBatch(batch), batch_size=None))
        if dist.get_rank() == 0:
            figures = read(profiled.profiler)
            rows.append(
                results / PROFILE,
                [{**where, "model": model, "setup": setup, "ranks": dist.get_world_size(), **figures}],
            )
            print(f"profile, {model}, {setup}: {figures}", flush=True)
            if setup != "none":
                bar = "host waits for the device in begin()"
                add(
                    results,
                    where,
                    Check("profile", f"{model}: {bar}", dist.get_world_size(), figures["waits_in_begin"], 0.0),
                )


def read(profiler: profile) -> dict[str, Any]:
    """Return what the profile shows, a step: copies and their hidden share, and the training thread's waits."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return figures(events, _STEPS)


def figures(events: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Return the figures of a Chrome trace over so many steps; times in ms a step."""
    whole = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in whole if event.get("cat") == "kernel"]
    busy: Counter[Any] = Counter()
    for event in kernels:
        busy[event["args"]["stream"]] += event["dur"]
    training = busy.most_common(1)[0][0] if busy else None
    compute = merged([_interval(event) for event in kernels if event["args"]["stream"] == training])
    copies = [e for e in whole if e.get("cat") == "gpu_memcpy" and e["args"]["stream"] != training]
    copied = sum(event["dur"] for event in copies)
    hidden = sum(overlap(_interval(event), compute) for event in copies)
    begins = [event for event in whole if event["name"] == BEGIN and event.get("cat") == "user_annotation"]
    ends = [event for event in whole if event["name"] == END and event.get("cat") == "user_annotation"]
    thread = begins[0]["tid"] if begins else None
    waits = [e for e in whole if e.get("cat") == "cuda_runtime" and e["tid"] == thread and e["name"] in WAITS]
    in_begin = [e for e in waits if _within(e, begins)]
    in_end = [e for e in waits if _within(e, ends)]
    per_step = 1e-3 / steps
    return {
        "compute_ms": sum(high - low for low, high in compute) * per_step,
        "copies_ms": copied * per_step,
        "copies_hidden": hidden / copied if copied else 0.0,
        "begin_ms": sum(event["dur"] for event in begins) * per_step,
        "end_ms": sum(event["dur"] for event in ends) * per_step,
        "waits_in_begin": len(in_begin) / steps,
        "waits_in_end": len(in_end) / steps,
        "waits_elsewhere": (len(waits) - len(in_begin) - len(in_end)) / steps,
    }


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Return the union of intervals, in order, as intervals that do not touch."""
    union: list[Interval] = []
    for low, high in sorted(intervals):
        if union and low <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], high)
        else:
            union.append((low, high))
    return union


def overlap(interval: Interval, union: Sequence[Interval]) -> float:
    """Return how much of ``interval`` lies within a union."""
    return sum(max(0.0, min(interval[1], high) - max(interval[0], low)) for low, high in union)


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _within(event: dict[str, Any], ranges: Sequence[dict[str, Any]]) -> bool:
    low, high = _interval(event)
    return any(start <= low and high <= end for start, end in map(_interval, ranges))
