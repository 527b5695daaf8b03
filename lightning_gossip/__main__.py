"""The ``lightning-gossip`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

_REPORT_PACKAGES = ("matplotlib", "pandas", "plotly", "tbparse")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments, without the program's name; ``None`` for the process'.

    Returns:
        The exit status: 1 where nothing could be read.
    """
    parser = argparse.ArgumentParser(prog="lightning-gossip", description="Tools for runs of lightning-gossip.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report",
        help="compare runs in plots and a table",
        description="Compare runs in PNG plots (accuracy and loss against updates and time, consensus distance, "
        "traffic, waiting, staleness), on one page with all of them (report.html), and in a Markdown and a CSV table.",
    )
    report.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a version folder, or a folder that contains several"
    )
    report.add_argument("--out", metavar="DIR", type=Path, default=Path("report"), help="default: %(default)s")
    report.add_argument("--accuracy-tag", metavar="TAG", help="default: found by its name, such as val_acc")
    report.add_argument("--loss-tag", metavar="TAG", help="default: found by its name, such as val_loss")
    plan = commands.add_parser(
        "plan",
        help="compare the schemes for a model, ranks and links before anything runs",
        description="Compute for each scheme steps a second, waiting, traffic, consensus distance and memory, and "
        "recommend one: of those that lose few steps, the one that keeps replicas nearest together.",
    )
    _add_plan_arguments(plan)
    store = commands.add_parser(
        "store",
        help="hold the store of a run whose ranks may outlive each other",
        description="Hold a run's store (torch's TCPStore) until the last process that was connected to it has ended. "
        "Prints its port. Give every rank MASTER_ADDR, MASTER_PORT and TORCHELASTIC_USE_AGENT_STORE=True.",
    )
    store.add_argument("--port", type=int, default=29500, help="0 for any free one; default: %(default)s")
    store.add_argument(
        "--wait", metavar="SECONDS", type=float, default=600, help="for the first connection; default: %(default)g"
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "store":
        return _store(arguments.port, arguments.wait)
    if arguments.command == "plan":
        return _plan(plan, arguments)
    return _report(arguments.runs, arguments.out, arguments.accuracy_tag, arguments.loss_tag)


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--parameters", metavar="N", help="of the model that train, such as 25M")
    size.add_argument("--checkpoint", metavar="FILE", type=Path, help="of the model: a .ckpt, or a state_dict")
    parser.add_argument("--ranks", metavar="N", type=int, required=True)
    parser.add_argument("--mbit", metavar="RATE", type=float, required=True, help="of a rank's link, each way")
    parser.add_argument(
        "--latency-ms", metavar="MS", type=float, default=0.1, help="one way between two ranks; default: %(default)g"
    )
    steps = parser.add_mutually_exclusive_group(required=True)
    steps.add_argument("--step-ms", metavar="MS", type=float, help="of a training step without communication")
    steps.add_argument(
        "--measure", action="store_true", help="time the step of a perceptron of that size, batch 32, on this host"
    )
    parser.add_argument(
        "--straggler", metavar="FACTOR", type=float, default=1.0, help="one rank is so many times slower"
    )
    parser.add_argument("--wire-dtype", metavar="DTYPE", help="bfloat16 or float16; DDP and Downpour have none")
    parser.add_argument(
        "--cores-per-rank", metavar="N", type=float, default=1.0, help="0.5 where two ranks share a core, and so on"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write plan.png and plan.csv there")


def _plan(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from lightning_gossip.monitoring import plan_inputs
    from lightning_gossip.monitoring.plan import as_text, make_plan, write_csv
    from lightning_gossip.monitoring.plan_schemes import Workload

    names = ("ranks", "mbit", "latency_ms", "straggler", "wire_dtype", "cores_per_rank")
    given = {name: getattr(arguments, name) for name in names}
    try:
        if arguments.checkpoint is None:
            parameters, nbytes = plan_inputs.parse_parameters(arguments.parameters), None
        else:
            parameters, nbytes = plan_inputs.read_checkpoint(arguments.checkpoint)
        step = 1.0 if arguments.measure else arguments.step_ms
        workload = Workload(parameters, nbytes=nbytes, step_ms=step, **given)
        if arguments.measure:
            workload = replace(workload, step_ms=plan_inputs.measure_step(parameters))
    except ValueError as error:
        parser.error(str(error))
    if arguments.measure:
        print(f"measured: {workload.step_ms:.3g} ms a step\n")
    plan = make_plan(workload)
    print(as_text(plan))
    if arguments.out is None:
        return 0
    try:
        from lightning_gossip.monitoring.plan_plots import draw
    except ModuleNotFoundError as error:
        return _without("plan", error)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(plan, arguments.out / "plan.csv")
    draw(plan, arguments.out / "plan.png")
    print(f"\n{arguments.out / 'plan.csv'}\n{arguments.out / 'plan.png'}")
    return 0


def _without(command: str, error: ModuleNotFoundError) -> int:
    if error.name not in _REPORT_PACKAGES:
        raise error
    print(
        f"lightning-gossip {command}: package {error.name!r} is missing: pip install 'lightning-gossip[report]'",
        file=sys.stderr,
    )
    return 1


def _store(port: int, wait: float) -> int:
    from lightning_gossip.arguments import check_integer, check_number
    from lightning_gossip.control.store import serve_store

    try:
        check_integer("port", port, low=0, high=(1 << 16) - 1)
        serve_store(port, timedelta(seconds=check_number("wait", wait, low=0, open_low=True)))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"lightning-gossip store: {error}", file=sys.stderr)
        return 1
    return 0


def _report(runs: Sequence[Path], out: Path, accuracy_tag: str | None, loss_tag: str | None) -> int:
    try:
        from lightning_gossip.monitoring.report import write_report
    except ModuleNotFoundError as error:
        return _without("report", error)
    written = write_report(runs, out, accuracy_tag, loss_tag)
    for file in written:
        print(file)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
