"""Curves read back from event files, for all tests of what is logged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

AsProcess = Callable[[int], None]
"""What the fixture ``as_process`` gives: be a rank that has just started."""

Connect = Callable[[Any, int, int], None]
"""What the fixture ``connect`` gives: join a group with this store, rank and world size."""


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) of a tag over all event files of a folder."""
    events = []
    for file in sorted(folder.glob("*tfevents*")):
        reader = EventAccumulator(str(file)).Reload()
        if tag in reader.Tags()["scalars"]:
            events += [(event.step, event.value) for event in reader.Scalars(tag)]
    return sorted(events)
