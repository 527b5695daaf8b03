"""``lightning-gossip plan``: what each scheme would do on machines and links that are described, and which to take."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_gossip.monitoring.plan_schemes import SCHEMES, Outlook, Scheme, Workload

LOSS_ALLOWED = 0.05
"""Of the steps that ranks would make without communication, to waiting and copying."""
ALIKE = 1.05
"""Distances whose ratio is below it count as equal."""
HARDLY = 256
"""Steps that a payload takes on a link that is too slow for the model."""
_DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """The schemes for a workload.

    Args:
        workload: what is to be trained, and where.
        outlooks: what becomes of each scheme.
        recommended: one of them.
        reason: why.
    """

    workload: Workload
    outlooks: Mapping[Scheme, Outlook]
    recommended: Scheme
    reason: str


def make_plan(workload: Workload, schemes: Sequence[Scheme] = SCHEMES) -> Plan:
    """Compute what becomes of ``schemes``, and recommend one of those whose distance is known.

    Of those that lose at most 5 % of the steps that ranks make without communication, to waiting and copying: where
    some are reproducible (by step), of these; then the one that keeps replicas nearest together; of several that do so
    to 5 %, the one that sends least, then the one that keeps least in memory. Where all lose more, the fastest.
    """
    outlooks = {scheme: scheme.outlook(workload) for scheme in schemes}
    known = {scheme: outlook.distance for scheme, outlook in outlooks.items() if outlook.distance is not None}
    lost = {scheme: max(0.0, 1 - outlooks[scheme].rate / workload.rate_alone) for scheme in known}
    swift = [scheme for scheme in known if lost[scheme] <= LOSS_ALLOWED]
    if not swift:
        fastest = max(known, key=lambda scheme: outlooks[scheme].rate)
        return Plan(workload, outlooks, fastest, "all lose more than 5 % of the steps, and it is the fastest")
    by_step = [scheme for scheme in swift if scheme.reproducible]
    among = by_step or swift
    nearest = min(known[scheme] for scheme in among)
    near = [scheme for scheme in among if known[scheme] <= ALIKE * nearest]
    best = min(near, key=lambda scheme: (round(outlooks[scheme].sent), outlooks[scheme].memory))
    them = "the schemes by step that do" if by_step else "those that do (none of them by step)"
    reason = (
        f"it loses {100 * lost[best]:.1f} % of the steps to waiting and copying, of 5 % allowed, "
        f"and of {them} it keeps replicas nearest together"
    )
    if len(near) > 1:
        reason += ", and sends and stores least"
    lasting = workload.machine.transfer / workload.machine.compute
    if lasting > HARDLY:
        reason += f"; but one payload takes {lasting:,.0f} steps on this link, and replicas hardly hear of each other"
    return Plan(workload, outlooks, best, reason)


HEAD = ("scheme", "steps/s", "waited, %", "GB/rank/day", "distance", "memory, MB")


def as_text(plan: Plan) -> str:
    """Return the plan as a table in Markdown, and what is recommended."""
    rows = [HEAD, *(_cells(scheme, outlook) for scheme, outlook in plan.outlooks.items())]
    widths = [max(len(row[place]) for row in rows) for place in range(len(HEAD))]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    for row, cells in zip(rows, padded, strict=True):
        cells[0] = row[0].ljust(widths[0])
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in (padded[0], rule, *padded[1:])]
    return "\n".join([
        *lines,
        "",
        "steps/s, waiting and GB sent: the mean over ranks. distance: of replicas from their mean, at most, in what a",
        "step moves a replica by (-: the model does not know). memory: beside model, gradients and optimizer.",
        "",
        textwrap.fill(f"recommended: {plan.recommended.code}, because {plan.reason}.", 112),
    ])  # fmt: skip


def short(number: float) -> str:
    """Return ``number`` with three digits, or all that stand before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _cells(scheme: Scheme, outlook: Outlook) -> tuple[str, ...]:
    return (
        scheme.name,
        short(outlook.rate),
        f"{100 * outlook.waited:.1f}",
        short(outlook.sent * _DAY / 1e9),
        "-" if outlook.distance is None else f"{outlook.distance:.2f}",
        short(outlook.memory / 1e6),
    )


def write_csv(plan: Plan, file: Path) -> None:
    """Write a row a scheme; what the model does not know is empty."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow((
            *("scheme", "code", "step_seconds", "steps_a_second", "waited", "bytes_a_second", "distance"),
            *("memory_bytes", "recommended"),
        ))  # fmt: skip
        for scheme, outlook in plan.outlooks.items():
            numbers = (outlook.step, outlook.rate, outlook.waited, outlook.sent, outlook.distance, outlook.memory)
            cells = ("" if number is None else f"{number:.6g}" for number in numbers)
            writer.writerow((scheme.name, scheme.code, *cells, int(scheme is plan.recommended)))
