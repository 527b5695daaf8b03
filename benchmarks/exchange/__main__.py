"""What an exchange costs a step, beside Lightning's DDP and decent-dp: ranks on one host.

    python -m benchmarks.exchange                                     # all models at 2, 4 and 8 ranks
    python -m benchmarks.exchange --models mlp --ranks 4 --rounds 30  # one cell
    python -m benchmarks.exchange --setups '32'                       # outer steps, and their reference
    python -m benchmarks.exchange --setups asynchronous --steps 64    # beside gossip by step at the same period
    python -m benchmarks.exchange --plot                              # the picture, from the rows that are there

Every set-up trains the same model in blocks of steps that take turns (`shared/side_by_side.py`). Each block is a row in
``results/exchange.csv``; a round of blocks that is there already is not run again, so a run can be ended and continued.
The table has the step time as a ratio to the same loop without communication, its quartiles over the rounds, bytes a
step and rank, peak memory beyond that run in copies of the parameters, and where the training thread's time goes.
decent-dp (``pip install decent-dp==0.2.3``) swallows the optimizer and so can not run under Lightning: it is compared
with a plain loop, as is torch's own DDP there. Without it that set-up is left out, and the program says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from command_line import Nobody
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from benchmarks import RESULTS
from benchmarks.exchange.plain_loop import DecentSetup, PlainDDPSetup
from benchmarks.exchange.plots import draw
from benchmarks.exchange.summary import PARTS, print_table, summarize
from benchmarks.shared import machine
from benchmarks.shared.meters import InterfaceMeter, MemoryMeter, PartsMeter
from benchmarks.shared.options import at_least, listed, make_parser, one_of
from benchmarks.shared.plain_loop import PlainSetup
from benchmarks.shared.ranks import fork_ranks
from benchmarks.shared.rows import append, find, read, rounds_missing
from benchmarks.shared.side_by_side import LightningSetup, Plan, Setup, Values, run_rank
from benchmarks.shared.workloads import TASKS
from lightning_gossip import DiLoCoStrategy, ElasticGossipStrategy
from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout
from lightning_gossip.rules.mixing import CHUNK, mix

TIMEOUT = timedelta(minutes=1)
WARM_UP = 8
"""Steps: the longest period, so that as many exchanges end in the counted steps as begin there."""
RARE = 32
"""Period of the set-ups with outer steps, whose blocks are longer: two periods to warm up, and whole ones counted."""
MEASURED = (
    "step_ms", "step_max_ms", "cpu_ms", "helper_cpu_ms",
    "payload_mb", "network_mb", "peak_mb", "parameters_mb",
    *PARTS, "idle_us",
)  # fmt: skip
"""Columns of numbers, empty where a set-up has none."""
BARS = {
    ("mlp", 4, "matching"): 1.15,
    ("mlp", 4, "matching, TCP"): 1.30,
    ("mlp", 4, "matching, p 1/8"): 1.06,
}
"""What the step times are to stay below, relative to no communication, by model, ranks and set-up."""


class MemoryTraffic(Callback):
    """What an exchange with one partner reads and writes, without the partner: the limit of any exchange on one host.

    Each step takes a snapshot, and afterwards mixes the replica with another snapshot, by the package's own passes.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.parameters = dict(pl_module.named_parameters())
        layout = FlatLayout(self.parameters)
        self.own, self.other = (FlatBuffer.empty(layout, pl_module.device) for _ in range(2))
        self.other.pack(self.parameters)
        self.scratch = torch.empty(CHUNK)

    def on_train_batch_start(self, *args: Any) -> None:
        self.own.pack(self.parameters)

    def on_train_batch_end(self, *args: Any) -> None:
        for segment, own, other in zip(self.own.layout.segments, self.own.segments, self.other.segments, strict=True):
            targets = [self.parameters[name] for name in segment.names]
            mix(targets, own, [other], weight=0.5, scratch=self.scratch)


def gossip(
    name: str,
    callbacks: Sequence[type[Callback]] = (),
    reference: str = "none",
    whole: int | None = None,
    **arguments: Any,
) -> LightningSetup:
    """Return a set-up with elastic gossip."""

    def strategy(seed: int) -> ElasticGossipStrategy:
        return ElasticGossipStrategy(seed=seed, evaluate="replica", timeout=TIMEOUT, **arguments)

    return LightningSetup(name, strategy, reference, callbacks, whole)


def outer_steps() -> list[Setup]:
    """Return the set-ups that exchange every :data:`RARE` steps, after their reference, whose blocks are as long."""
    long: dict[str, Any] = {"reference": f"none, {RARE} steps", "whole": RARE}

    def diloco(name: str, **arguments: Any) -> LightningSetup:
        common: dict[str, Any] = {"period": RARE, "evaluate": "replica", "timeout": TIMEOUT}
        return LightningSetup(name, lambda seed: DiLoCoStrategy(**common, **arguments), **long)

    return [
        gossip(f"none, {RARE} steps", peers=Nobody(), **long),
        gossip(f"none again, {RARE} steps", peers=Nobody(), **long),
        diloco(f"LocalSGD, period {RARE}", outer_lr=1.0, outer_momentum=0.0),
        diloco(f"DiLoCo, period {RARE}"),
        diloco(f"DiLoCo, period {RARE}, delay {RARE - 1}", delay=RARE - 1),
        diloco(f"DiLoCo, period {RARE}, fragments 4", fragments=4),
        gossip(f"outer step, period {RARE}", period=RARE, outer_lr=0.7, outer_momentum=0.9, **long),
    ]


def make_setups() -> dict[str, Setup]:
    """Return all set-ups by name; the first of the two without communication is what the others are compared with."""
    setups: list[Setup] = [
        gossip("none", peers=Nobody()),
        gossip("none again", peers=Nobody()),
        gossip("memory traffic alone", [MemoryTraffic], peers=Nobody()),
        gossip("matching"),
        gossip("matching, p 1/8", probability=1 / 8),
        gossip("matching, members", min_replicas=1),
        gossip("matching, p 1/8, members", probability=1 / 8, min_replicas=1),
        gossip("uniform", peers="uniform"),
        gossip("uniform, p 1/8", peers="uniform", probability=1 / 8),
        gossip("matching, period 8", period=8),
        gossip("matching, period 8, delay 7", period=8, delay=7),
        gossip("asynchronous, period 8", reference="matching, period 8", period=8, asynchronous=True, dealt=False),
        gossip("matching, bfloat16", wire_dtype=torch.bfloat16),
        gossip("matching, TCP", shared_memory=False),
        gossip("uniform, TCP", peers="uniform", shared_memory=False),
        gossip("matching, bfloat16, TCP", wire_dtype=torch.bfloat16, shared_memory=False),
        *outer_steps(),
        LightningSetup("ddp", lambda seed: DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)),
        PlainSetup("plain none"),
        PlainDDPSetup("plain ddp", "plain none"),
        DecentSetup("decent-dp", "plain none"),
    ]
    return {setup.name: setup for setup in setups}


def measure(model: str, ranks: int, setups: dict[str, Setup], rounds: Iterable[int], args: argparse.Namespace) -> None:
    """Run the rounds and append a row a block to ``args.out``."""
    task = TASKS[model]
    parameters = task.bytes / 1e6

    plan = Plan(steps=args.steps, warm_up=WARM_UP, timeout=TIMEOUT)

    def report(setup: str, round_: int, values: Values) -> None:
        steps = setups[setup].plan(plan).steps
        key = {"model": model, "ranks": ranks, "setup": setup, "round": round_, "steps": steps}
        append(args.out, [key | dict.fromkeys(MEASURED, "") | {"parameters_mb": parameters} | values], digits=5)
        print(f"{model}, {ranks} ranks, round {round_}: {setup} {values['step_ms']:.1f} ms", flush=True)

    def rank() -> None:
        meters = [PartsMeter(), MemoryMeter(), InterfaceMeter(ranks)]
        run_rank(list(setups.values()), task.model(), task.batch(), rounds, report, plan, meters, args.seconds)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_name(f"{args.out.stem}_machine.txt").write_text(f"{machine.in_words()}\n")
    fork_ranks(ranks, rank, seconds=2 * args.seconds + 600, own_store=any("members" in name for name in setups))


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--models", type=listed(one_of(TASKS)), default=list(TASKS), help=f"some of {','.join(TASKS)}")
    add("--ranks", type=listed(at_least(2)), default=[2, 4, 8], help="for example 2,4,8")
    add("--setups", default=None, help="substrings of names, separated by ';'; the references always run")
    add("--rounds", type=int, default=20, help="of blocks, a model and number of ranks")
    add("--steps", type=int, default=16, help="counted, a block; a multiple of 8")
    add("--seconds", type=float, default=8 * 3600.0, help="after which no round begins; run again to continue")
    add("--out", type=Path, default=RESULTS / "exchange.csv")
    add("--table", action="store_true", help="print what is there and measure nothing")
    add("--plot", action="store_true", help="draw what is there, beside --out, and measure nothing")
    args = parser.parse_args()
    if args.steps < WARM_UP or args.steps % WARM_UP:
        parser.error(f"--steps must be a multiple of {WARM_UP}, got {args.steps}")
    setups = make_setups()
    if not (args.table or args.plot or importlib.util.find_spec("decent_dp")):
        del setups["decent-dp"]
        print("decent-dp is not installed (pip install decent-dp==0.2.3): left out", file=sys.stderr)
    if args.setups is not None:
        parts = args.setups.split(";")
        chosen = {name: s for name, s in setups.items() if any(part in name for part in parts)}
        references = {setup.reference for setup in chosen.values()}
        setups = {name: setup for name, setup in setups.items() if name in chosen or name in references}
    compared = {name: setup.reference for name, setup in setups.items()}
    if args.plot:
        drawn = {name: reference for name, reference in compared.items() if name != reference}
        if not (summaries := summarize(read(args.out), drawn)):
            parser.error(f"--plot draws the rows of {args.out}, and there are none")
        draw(summaries, BARS, args.out.with_suffix(".png"))
        return
    for model in args.models:
        for ranks in args.ranks:
            cell = {"model": model, "ranks": ranks}
            missing = rounds_missing(find(read(args.out), cell), setups, args.rounds)
            if missing and not args.table:
                measure(model, ranks, setups, missing, args)
            if summaries := summarize(find(read(args.out), cell), compared):
                print_table(summaries)


if __name__ == "__main__":
    main()
