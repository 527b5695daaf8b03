"""What a plan is made for: how large a model is, and how long its step takes here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
MOST_MEASURED = 250_000_000
"""Parameters, which with gradients and momentum take 3 GB."""
_LAYERS, _BATCH, _STEPS = 4, 32, 10


def parse_parameters(text: str) -> int:
    """Return the number of parameters that ``text`` says, such as 25M, 1.3B or 4810.

    Raises:
        ValueError: if it is none.
    """
    digits = text.strip().rstrip("kKmMbBgG")
    multiple = _MULTIPLES.get(text.strip()[len(digits) :].lower())
    try:
        number = float(digits.replace(",", "").replace("_", ""))
    except ValueError:
        number = math.nan
    if multiple is None or not math.isfinite(number) or round(number * multiple) < 1:
        raise ValueError(f"`parameters` must be a number above 0, such as 4810, 25M or 1.3B, got {text!r}")
    return round(number * multiple)


def read_checkpoint(file: Path) -> tuple[int, int]:
    """Return the number and the bytes of the floating-point tensors of a model, each storage once.

    Args:
        file: what ``torch.save`` wrote: a ``.ckpt`` of Lightning's, a state_dict, or a dict with one in "model".

    Raises:
        ValueError: if it holds no model.
    """
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ValueError(f"`checkpoint` must be a file that torch.save wrote, got {str(file)!r}: {error}") from error
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"`checkpoint` must be a file that torch.load(weights_only=True) reads, got {str(file)!r}: {first}"
        ) from error
    tensors = {(t.untyped_storage().data_ptr(), t.storage_offset(), t.shape): t for t in _tensors_of(loaded)}
    if not tensors:
        raise ValueError(f"`checkpoint` must hold the state_dict of a model, got {str(file)!r} without one")
    return sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())


def _tensors_of(loaded: Any) -> list[Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    found = loaded.values() if isinstance(loaded, Mapping) else ()
    return [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]


def measure_step(parameters: int) -> float:
    """Return the milliseconds of a training step of a perceptron of about so many parameters on this host.

    A batch of 32, SGD with momentum, on a GPU where there is one; the median of ten steps.

    Raises:
        ValueError: if there are too many.
    """
    if parameters > MOST_MEASURED:
        raise ValueError(
            f"`measure` takes models of at most {MOST_MEASURED:,} parameters, got {parameters:,}: give the step's time"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = max(1, round(math.sqrt(parameters / _LAYERS)))
    layers: list[nn.Module] = []
    for _ in range(_LAYERS):
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
    with torch.random.fork_rng():
        network = nn.Sequential(*layers).to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        x = torch.randn(_BATCH, width, device=device)
    seconds = []
    for _ in range(2 + _STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])
