"""How a model's layers are dealt to parts, and when these are due."""

from __future__ import annotations

import pytest

from lightning_gossip.rules.fragments import due, layers_of, strided


def test_a_layer_is_what_one_module_owns() -> None:
    sizes = {"embed.weight": 9, "block.0.fc.weight": 4, "block.0.fc.bias": 2, "block.0.out.weight": 4, "scale": 1}
    assert layers_of(sizes) == [
        ("embed.weight",),
        ("block.0.fc.weight", "block.0.fc.bias"),
        ("block.0.out.weight",),
        ("scale",),
    ]


def test_equal_layers_are_strided() -> None:
    sizes = {f"blocks.{number}.weight": 8 for number in range(10)}
    assert strided(sizes, 4) == [tuple(f"blocks.{k}.weight" for k in range(part, 10, 4)) for part in range(4)]


def test_unequal_layers_come_to_parts_about_as_large() -> None:
    sizes: dict[str, int] = {}
    for block in range(8):  # of a transformer
        sizes |= {f"{block}.norm.weight": 64, f"{block}.qkv.weight": 3 * 64**2, f"{block}.proj.weight": 64**2}
        sizes |= {f"{block}.fc.weight": 4 * 64**2, f"{block}.out.weight": 4 * 64**2}
    for parts in (2, 3, 4, 6, 8):
        dealt = strided(sizes, parts)
        assert sorted(name for names in dealt for name in names) == sorted(sizes)
        largest = max(sum(sizes[name] for name in names) for names in dealt)
        assert largest < (1.15 if parts <= 4 else 1.25) * sum(sizes.values()) / parts


@pytest.mark.parametrize(("period", "parts"), [(8, 1), (8, 4), (7, 3), (100, 6), (5, 5)])
def test_every_part_is_due_once_a_period_and_no_two_at_once(period: int, parts: int) -> None:
    seen = [due(step, period, parts) for step in range(1, 3 * period + 1)]
    assert max(map(len, seen)) == 1
    for part in range(parts):
        steps = [step for step, now in enumerate(seen, start=1) if part in now]
        assert [step % period for step in steps] == [part * period // parts] * 3
