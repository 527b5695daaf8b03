"""A model's parameters in parts that travel at different times (Douillard et al. 2025, arXiv:2501.18512, §3.1)."""

from __future__ import annotations

from collections.abc import Mapping

Sizes = Mapping[str, int]
"""Elements by the parameters' names, in the model's order."""


def layers_of(sizes: Sizes) -> list[tuple[str, ...]]:
    """Return the names by layer: what one module owns itself, its weight and its bias."""
    layers: dict[str, list[str]] = {}
    for name in sizes:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return [tuple(names) for names in layers.values()]


def strided(sizes: Sizes, parts: int) -> list[tuple[str, ...]]:
    """Deal the layers, in order, to the part that has least as yet; return the names of each part.

    Layers of one size come to parts 0, 1, …, P − 1, 0, … in turn: each part reaches through the whole depth, which
    trains better than a part of neighbours (§3.1 there). With others, parts stay about even, and so does their traffic.
    """
    dealt: list[list[str]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for layer in layers_of(sizes):
        part = filled.index(min(filled))
        dealt[part] += layer
        filled[part] += sum(sizes[name] for name in layer)
    return [tuple(names) for names in dealt]


def due(step: int, period: int, parts: int) -> list[int]:
    """Return the parts whose round is at ``step``: part p's come at steps ≡ p · period / P, rounded down."""
    return [part for part in range(parts) if step % period == part * period // parts]
