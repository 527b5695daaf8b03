"""The Trainer of all benchmarks."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import lightning.pytorch as pl

_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
}


def make_trainer(**options: Any) -> pl.Trainer:
    """Return a Trainer on the CPU with these ``options`` of Lightning's: it does, and says, nothing that is not asked.

    It logs nothing, saves nothing and leaves samplers alone.
    """
    return pl.Trainer(**(_QUIET | options))


def quieten() -> None:
    """Keep Lightning from describing every one of some hundred trainings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*not on a GPU.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
