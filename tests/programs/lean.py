"""Imports Lightning, and lets the collector look for no garbage among modules in the making. Import it first."""

from __future__ import annotations

import gc

gc.disable()
import lightning.pytorch  # noqa: E402, F401

gc.freeze()
gc.enable()
