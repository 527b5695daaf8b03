"""What an outer step keeps of a replica (design §12): where its parameters stood after their last round; the momentum.

Two copies of the parameters that travel, or one without momentum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lightning_gossip.rules.mixing import CHUNK
from lightning_gossip.rules.outer import OuterStep


class OuterState:
    """Starts and momenta by the parameters' names, shaped as they are, from the step at which each begins to travel.

    Args:
        step: what is done with a round's drift.
    """

    def __init__(self, step: OuterStep) -> None:
        self.step = step
        self.starts: dict[str, Tensor] = {}
        self.velocities: dict[str, Tensor] = {}

    @torch.no_grad()
    def follow(self, travelling: Mapping[str, Tensor]) -> None:
        """Begin a round of those that are new, from what they are now, without momentum."""
        for name, parameter in travelling.items():
            if name not in self.starts:
                self.starts[name] = parameter.detach().clone(memory_format=torch.contiguous_format)
                if self.step.momentum > 0:
                    self.velocities[name] = torch.zeros_like(self.starts[name])

    def pieces(self, name: str, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Cut a parameter's start, its momentum (None without) and ``tensors``, shaped as it is, alike.

        On a CPU a cache holds the pieces: what is computed of them on the way takes no memory to speak of.
        """
        start, velocity = self.starts[name], self.velocities.get(name)
        if start.device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
            return iter([(start, velocity, *tensors)])
        cut = [repeat(None) if x is None else x.view(-1).split(CHUNK) for x in (start, velocity, *tensors)]
        return zip(*cut, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of both."""
        return {
            "starts": {name: start.clone() for name, start in self.starts.items()},
            "velocities": {name: velocity.clone() for name, velocity in self.velocities.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned; a momentum that was not kept begins at 0.

        Args:
            state: of before.
            parameters: of this replica, by name.

        Raises:
            ValueError: if it does not fit them.
        """
        starts = state["starts"]
        for name, start in starts.items():
            if name not in parameters or parameters[name].shape != start.shape:
                there = tuple(parameters[name].shape) if name in parameters else "missing"
                raise ValueError(
                    f"the outer step's state is of another model: '{name}' had shape {tuple(start.shape)},"
                    f" and is {there} now"
                )
        self.starts, self.velocities = {}, {}
        self.follow({name: parameters[name] for name in starts})
        for kept, saved in ((self.starts, starts), (self.velocities, state["velocities"])):
            for name in kept.keys() & saved.keys():
                kept[name].copy_(saved[name])
