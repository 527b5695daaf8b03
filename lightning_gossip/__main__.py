"""The ``lightning-gossip`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

_REPORT_PACKAGES = ("matplotlib", "pandas", "tbparse")


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
        "traffic, waiting, staleness) and in a Markdown and a CSV table.",
    )
    report.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a version folder, or a folder that contains several"
    )
    report.add_argument("--out", metavar="DIR", type=Path, default=Path("report"), help="default: %(default)s")
    report.add_argument("--accuracy-tag", metavar="TAG", help="default: found by its name, such as val_acc")
    report.add_argument("--loss-tag", metavar="TAG", help="default: found by its name, such as val_loss")
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
    return _report(arguments.runs, arguments.out, arguments.accuracy_tag, arguments.loss_tag)


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
        if error.name not in _REPORT_PACKAGES:
            raise
        print(
            f"lightning-gossip report: package {error.name!r} is missing: pip install 'lightning-gossip[report]'",
            file=sys.stderr,
        )
        return 1
    written = write_report(runs, out, accuracy_tag, loss_tag)
    for file in written:
        print(file)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
