"""How long a step computes, for the times of the other rows: two ranks' processor time.

    python -m benchmarks.text.step    # on a quiet machine; --rounds, --windows

The ranks train on one batch in blocks that take turns (`shared/side_by_side.py`): without communication, and with
PowerSGD on unlimited links, whose compression is computing too. Processor time, all threads', is what a step takes on
a core of its own, whoever else wants one here. Rows go to ``results/text_step.csv``.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from command_line import Nobody
from language_model import SIZES, VOCABULARY, LanguageModel

from benchmarks import RESULTS
from benchmarks.shared.ddp_hooks import power_sgd
from benchmarks.shared.options import at_least, listed, make_parser
from benchmarks.shared.quartiles import quartiles
from benchmarks.shared.ranks import fork_ranks
from benchmarks.shared.rows import append, find, read, rounds_missing
from benchmarks.shared.side_by_side import LightningSetup, Plan, Setup, Values, run_rank
from benchmarks.shared.tables import show
from benchmarks.shared.workloads import Model
from lightning_gossip import ElasticGossipStrategy

RANKS = 2
TIMEOUT = timedelta(minutes=2)
PLAN = Plan(steps=40, warm_up=8, timeout=TIMEOUT)
FILE = "text_step.csv"


def make_setups() -> list[Setup]:
    """Return the set-ups; the first two are the same."""

    def alone(seed: int) -> ElasticGossipStrategy:
        return ElasticGossipStrategy(peers=Nobody(), evaluate="replica", timeout=TIMEOUT)

    return [
        LightningSetup("none", alone),
        LightningSetup("none again", alone),
        LightningSetup("powersgd-1", lambda seed: power_sgd(1, 2, TIMEOUT)),
        LightningSetup("powersgd-4", lambda seed: power_sgd(4, 2, TIMEOUT)),
    ]


def seconds(folder: Path, key: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of a step of each set-up measured for ``key``: model, context and windows a rank."""
    found: dict[str, list[float]] = {}
    for row in find(read(folder / FILE), key):
        found.setdefault(row["setup"], []).append(float(row["cpu_ms"]) / 1e3)
    return {setup: quartiles(values)[1] for setup, values in found.items()}


def measure(key: dict[str, Any], setups: list[Setup], rounds: list[int], out: Path) -> None:
    """Run the rounds and append a row a block."""

    def report(setup: str, round_: int, values: Values) -> None:
        row = key | {"setup": setup, "round": round_, "step_ms": values["step_ms"], "cpu_ms": values["cpu_ms"]}
        append(out / FILE, [row])

    def rank() -> None:
        torch.manual_seed(0)
        size = SIZES[key["model"]]
        model = LanguageModel(size, size.lr)
        text = torch.randint(VOCABULARY, (key["windows"], key["context"] + 1), dtype=torch.uint8)
        # the blocks hand model and batch on to Lightning, and look at neither
        run_rank(setups, cast(Model, model), (text[:, :-1], text[:, 1:]), rounds, report, PLAN)

    fork_ranks(RANKS, rank, 600 + 60 * len(rounds))


def main() -> None:
    parser = make_parser(__spec__, __doc__)
    add = parser.add_argument
    add("--model", choices=tuple(SIZES), default="nano")
    add("--context", type=at_least(2), default=64, help="bytes of a window")
    add("--windows", type=listed(at_least(1)), default=[16, 8], help="a rank and step")
    add("--rounds", type=at_least(1), default=8, help="of blocks")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    setups = make_setups()
    for windows in args.windows:
        key = {"model": args.model, "context": args.context, "windows": windows}
        names = [setup.name for setup in setups]
        if missing := rounds_missing(find(read(args.out / FILE), key), names, args.rounds):
            measure(key, setups, missing, args.out)
        table = [[name, f"{1e3 * value:.1f}"] for name, value in seconds(args.out, key).items()]
        show(f"{args.model}, {windows} windows of {args.context} bytes a rank", ("set-up", "CPU, ms"), table)


if __name__ == "__main__":
    main()
