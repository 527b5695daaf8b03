"""Draws the pictures of docs/how_it_works.md: ``python -m docs.pictures``.

Each is a time line: lanes, what is done in them, and what travels between them. They are small SVG files, with their
text as text, the same at every run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parent / "pictures"

TRAIN, MIX, COPY, WAIT, HELPER, GONE = "#cfe2f3", "#b6d7a8", "#ffe599", "#f4cccc", "#e6e0f0", "#eeeeee"
"""What is done in a lane: a colour each."""

INK, ARROW = "#222222", "#7a4a9e"


class Lanes:
    """Lanes of a time line, the first on top.

    Args:
        names: of the lanes.
        length: of time, in units of the boxes.
        width: of the picture, in inches.
        room: between lanes, in their heights.
    """

    def __init__(self, names: list[str], length: float, width: float = 7.6, room: float = 1.7) -> None:
        self.figure = Figure(figsize=(width, 0.55 + 0.62 * room * len(names) * 0.62))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(-0.16 * length, length * 1.01)
        self.axes.set_ylim(-room * (len(names) - 1) - 1.0, 1.0)
        self.axes.axis("off")
        self.height = {name: -room * place for place, name in enumerate(names)}
        for name, height in self.height.items():
            self.axes.text(-0.155 * length, height, name, va="center", fontsize=9, color=INK, weight="bold")
            self.axes.plot((0, length), (height, height), color="#bbbbbb", linewidth=0.8, zorder=0)

    def box(self, lane: str, start: float, end: float, text: str = "", colour: str = TRAIN, size: float = 8) -> None:
        """Something that is done in ``lane``."""
        height = self.height[lane]
        style = "round,pad=0,rounding_size=0.06"
        self.axes.add_patch(
            FancyBboxPatch(
                (start + 0.02, height - 0.36), end - start - 0.04, 0.72, boxstyle=style, linewidth=0.7,
                facecolor=colour, edgecolor="#666666", mutation_aspect=1,
            )
        )  # fmt: skip
        self.axes.text((start + end) / 2, height, text, ha="center", va="center", fontsize=size, color=INK)

    def boxes(self, lane: str, edges: list[float], text: str = "step", colour: str = TRAIN) -> None:
        """Several, one after the other."""
        for start, end in pairwise(edges):
            self.box(lane, start, end, text, colour)

    def arrow(self, start: tuple[float, str], end: tuple[float, str], text: str = "", side: float = 0.0) -> None:
        """Something that travels from a time in one lane to a time in another; ``side`` moves its text to the right."""
        (x, from_lane), (y, to_lane) = start, end
        down = self.height[to_lane] < self.height[from_lane]
        begin, finish = (
            self.height[from_lane] + (-0.38 if down else 0.38),
            self.height[to_lane] + (0.38 if down else -0.38),
        )
        self.axes.add_patch(
            FancyArrowPatch((x, begin), (y, finish), arrowstyle="-|>", mutation_scale=9, color=ARROW, linewidth=1.1)
        )
        if text:
            self.note((x + y) / 2 + side, (begin + finish) / 2, text, colour=ARROW)

    def note(self, x: float, y: float, text: str, colour: str = INK, size: float = 7.5) -> None:
        """Words anywhere."""
        plate = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        self.axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour, bbox=plate)

    def above(self, lane: str, x: float, text: str) -> None:
        """Words above a lane."""
        self.note(x, self.height[lane] + 0.62, text)

    def below(self, lane: str, x: float, text: str) -> None:
        """Words below a lane."""
        self.note(x, self.height[lane] - 0.62, text)

    def moment(self, x: float, text: str) -> None:
        """A moment for all lanes."""
        bottom, top = self.axes.get_ylim()
        self.axes.plot((x, x), (bottom + 0.45, top - 0.3), color="#888888", linewidth=0.9, linestyle=":", zorder=0)
        self.note(x, bottom + 0.22, text)


def exchange() -> Figure:
    """Two ranks exchange within a step."""
    lanes = Lanes(["rank 0", "rank 1"], 10, room=2.4)
    for lane in ("rank 0", "rank 1"):
        lanes.box(lane, 0, 1.7, "step t − 1")
        lanes.box(lane, 1.7, 2.5, "copy", COPY)
        lanes.box(lane, 2.5, 6.6, "step t: forward, backward, update")
        lanes.box(lane, 6.6, 7.4, "mix", MIX)
        lanes.box(lane, 7.4, 10, "step t + 1")
    lanes.arrow((2.6, "rank 0"), (5.4, "rank 1"), "snapshot of 0", side=-1.1)
    lanes.arrow((2.6, "rank 1"), (5.4, "rank 0"), "snapshot of 1", side=1.1)
    lanes.above("rank 0", 7.0, "− α (s₀ − s₁)")
    lanes.below("rank 1", 7.0, "− α (s₁ − s₀)")
    return lanes.figure


def delay() -> Figure:
    """A payload travels beside several steps."""
    lanes = Lanes(["rank 0", "link", "rank 1"], 10.6, room=1.6)
    for lane in ("rank 0", "rank 1"):
        lanes.box(lane, 0, 0.8, "copy", COPY)
        lanes.boxes(lane, [0.8, 2.7, 4.6, 6.5, 8.4])
        lanes.box(lane, 8.4, 9.2, "mix", MIX)
        lanes.box(lane, 9.2, 10.6, "step")
    lanes.box("link", 0.9, 7.6, "both snapshots, for as long as the link needs", HELPER)
    lanes.arrow((0.5, "rank 0"), (1.0, "link"))
    lanes.arrow((0.5, "rank 1"), (1.0, "link"))
    lanes.arrow((7.5, "link"), (8.7, "rank 0"), "delay = 3: applied after three more steps", side=-2.6)
    lanes.arrow((7.5, "link"), (8.7, "rank 1"))
    return lanes.figure


def shared_memory() -> Figure:
    """A snapshot is read where it was written."""
    lanes = Lanes(["rank 0", "memory", "rank 1"], 10, room=1.6)
    for lane in ("rank 0", "rank 1"):
        lanes.box(lane, 0, 1.6, "step t − 1")
        lanes.box(lane, 1.6, 2.6, "copy", COPY)
        lanes.box(lane, 2.6, 6.6, "step t")
        lanes.box(lane, 6.6, 7.8, "mix", MIX)
        lanes.box(lane, 7.8, 10, "step t + 1")
    lanes.box("memory", 2.2, 4.7, "snapshot of 0", COPY)
    lanes.box("memory", 4.8, 7.3, "snapshot of 1", COPY)
    lanes.arrow((2.1, "rank 0"), (2.6, "memory"), "write", side=-0.55)
    lanes.arrow((2.3, "rank 1"), (5.2, "memory"), "write", side=0.3)
    lanes.arrow((4.5, "memory"), (6.9, "rank 1"), "read", side=0.6)
    lanes.arrow((7.1, "memory"), (7.3, "rank 0"), "read", side=0.5)
    return lanes.figure


def members() -> Figure:
    """A rank is lost and comes back."""
    lanes = Lanes(["rank 0", "rank 1", "rank 2"], 12.4, room=1.5)
    lanes.boxes("rank 0", [0, 1.3, 2.6, 3.9, 5.2, 6.5, 7.8, 9.1, 10.4, 11.7])
    lanes.boxes("rank 1", [0, 1.3, 2.6, 3.9, 5.2, 6.5, 7.8, 9.1, 10.4, 11.7])
    lanes.boxes("rank 2", [0, 1.3, 2.6])
    lanes.box("rank 2", 2.6, 3.2, "killed", WAIT, size=7)
    lanes.box("rank 2", 3.3, 6.4, "", GONE)
    lanes.note(4.85, lanes.height["rank 2"], "(1) its partner skips it")
    lanes.box("rank 2", 6.4, 7.7, "starts", HELPER)
    lanes.box("rank 2", 7.7, 9.1, "loads", COPY)
    lanes.boxes("rank 2", [9.1, 10.4, 11.7])
    lanes.arrow((7.0, "rank 0"), (8.0, "rank 2"))
    lanes.note(
        9.6,
        (lanes.height["rank 0"] + lanes.height["rank 1"]) / 2,
        "(3) the state of rank 0, while it trains on",
        ARROW,
    )
    lanes.moment(5.2, "(2) from here drawn among 0, 1")
    lanes.moment(9.1, "(4) from here among 0, 1, 2")
    return lanes.figure


def asynchrony() -> Figure:
    """A fast rank and a slow one."""
    lanes = Lanes(["fast", "slow's helper", "slow"], 11, room=1.5)
    lanes.boxes("fast", [0, 1.3, 2.6, 3.9])
    lanes.box("fast", 3.9, 4.4, "mix", MIX, size=7)
    lanes.boxes("fast", [4.4, 5.7, 7.0, 8.3, 9.6, 10.9])
    lanes.box("slow", 0, 6.6, "step: parameters stand still until its update")
    lanes.box("slow", 6.6, 7.1, "mix", MIX, size=7)
    lanes.box("slow", 7.1, 11, "step")
    lanes.box("slow's helper", 1.7, 3.2, "copies, answers", HELPER, size=7)
    lanes.arrow((1.35, "fast"), (1.9, "slow's helper"), "asks", side=-0.65)
    lanes.arrow((3.1, "slow's helper"), (3.8, "fast"), "answer", side=0.75)
    lanes.arrow((3.1, "slow's helper"), (6.7, "slow"), "both snapshots, for the end of its step", side=1.9)
    return lanes.figure


def parameter_server() -> Figure:
    """Workers of different pace and a server."""
    lanes = Lanes(["worker 0", "server", "worker 1"], 10.8, room=1.6)
    lanes.boxes("worker 0", [0, 1.2, 2.4, 3.6, 4.8, 6.0, 7.2, 8.4, 9.6, 10.8])
    lanes.boxes("worker 1", [0, 2.7, 5.4, 8.1, 10.8])
    lanes.box("server", 0, 10.8, "", HELPER)
    for x, text in ((3.0, "+ Δ₀"), (6.0, "+ Δ₁"), (8.0, "+ Δ₀")):
        lanes.axes.text(x + 0.05, lanes.height["server"], text, ha="center", va="center", fontsize=8, color=INK)
    lanes.arrow((2.4, "worker 0"), (2.9, "server"), "push", side=-0.45)
    lanes.arrow((3.4, "server"), (4.7, "worker 0"), "pull", side=0.5)
    lanes.arrow((5.4, "worker 1"), (5.9, "server"), "push", side=-0.45)
    lanes.arrow((6.4, "server"), (8.0, "worker 1"), "pull", side=0.5)
    lanes.arrow((7.2, "worker 0"), (7.9, "server"), "push", side=-0.45)
    lanes.arrow((8.4, "server"), (9.5, "worker 0"), "pull", side=0.5)
    return lanes.figure


def outer_steps() -> Figure:
    """DiLoCo beside elastic gossip with an outer step, in the space of parameters."""
    figure = Figure(figsize=(7.6, 2.7))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.88, wspace=0.04)
    colours = ("#1f77b4", "#d2691e")
    start, ends = (0.0, 0.0), ((2.2, 1.5), (2.8, 0.0))
    for axes, title in (
        (left, "DiLoCo: one step for all"),
        (right, "elastic gossip: each by itself, then a pair mixes"),
    ):
        axes.set_title(title, fontsize=9)
        axes.set_xlim(-0.7, 6.2)
        axes.set_ylim(-1.1, 2.7)
        axes.axis("off")

    def arrow(
        axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str, dashed: bool = False
    ) -> None:
        axes.add_patch(
            FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=10, color=colour, shrinkA=0, shrinkB=2,
                            linewidth=1.3, linestyle="--" if dashed else "-")
        )  # fmt: skip

    def dot(
        axes: Axes, place: tuple[float, float], text: str, colour: str = INK, dx: float = 0.0, dy: float = -0.3
    ) -> None:
        axes.plot(*place, "o", color=colour, markersize=5)
        axes.text(place[0] + dx, place[1] + dy, text, ha="center", va="center", fontsize=8, color=colour)

    for end, colour, name, dy in zip(ends, colours, ("θ₀", "θ₁"), (0.28, -0.3), strict=True):
        arrow(left, start, end, colour)
        dot(left, end, name, colour, dy=dy)
    mean = (2.5, 0.75)
    dot(left, start, "start a", dx=-0.1)
    dot(left, mean, "mean", dx=-0.45, dy=0.0)
    arrow(left, mean, (4.3, 1.29), "#333333", dashed=True)
    dot(left, (4.35, 1.3), "new start of all", dx=0.4)
    starts = ((0.0, 0.6), (0.1, -0.4))
    ends = ((2.2, 1.9), (2.9, -0.3))
    proposed = ((3.5, 2.3), (4.3, -0.45))
    mixed = (3.9, 0.93)
    names = zip(starts, ends, proposed, colours, ("₀", "₁"), (0.28, -0.3), strict=True)
    for begin, end, y, colour, index, dy in names:
        dot(right, begin, f"a{index}", colour, dx=-0.3, dy=0.0)
        arrow(right, begin, end, colour)
        dot(right, end, f"θ{index}", colour, dy=dy)
        arrow(right, end, y, colour, dashed=True)
        dot(right, y, f"y{index}", colour, dx=0.35, dy=0.0)
        arrow(right, y, mixed, ARROW)
    dot(right, mixed, "both, with α = ½", ARROW, dx=1.25, dy=0.0)
    return figure


PICTURES: tuple[Callable[[], Figure], ...] = (
    exchange, delay, shared_memory, members, asynchrony, parameter_server, outer_steps,
)  # fmt: skip


def main() -> None:
    """Draw all."""
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "lightning-gossip"
    mpl.rcParams["font.family"] = "sans-serif"
    for draw in PICTURES:
        file = FOLDER / f"{draw.__name__}.svg"
        draw().savefig(file, metadata={"Date": None, "Creator": None})
        lines = (line.rstrip() for line in file.read_text().splitlines())
        file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
