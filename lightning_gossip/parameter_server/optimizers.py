"""Which optimizers a shard may run, and how one travels: as an import path and JSON keywords.

Shards cut tensors anywhere, so that only optimizers that treat every element by itself are allowed; those of
``torch.optim`` that do are listed here, and nothing but this list is ever looked up for a path that arrived.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_PREFIX = "torch.optim."

ELEMENT_WISE: Mapping[str, type[torch.optim.Optimizer]] = {
    _PREFIX + optimizer.__name__: optimizer
    for optimizer in (
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    )
}
"""By import path. Missing are LBFGS, Muon and Adafactor, which mix elements, and SparseAdam, for sparse gradients."""

_UNFIT_KEYWORDS = ("params", "capturable", "differentiable")


@dataclass(frozen=True)
class StateTensor:
    """One tensor of an optimizer's state for a parameter.

    Attributes:
        name: of the state.
        dtype: of the tensor.
        is_scalar: whether it is 0-dimensional rather than shaped as the parameter.
    """

    name: str
    dtype: torch.dtype
    is_scalar: bool


@dataclass(frozen=True)
class ServerOptimizer:
    """An element-wise optimizer that is not made yet.

    Attributes:
        path: a key of :data:`ELEMENT_WISE`.
        keywords: of the class, in JSON's types.

    Raises:
        ValueError: if there is no such optimizer, or it does not take these keywords.
    """

    path: str
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = f"one of {', '.join(ELEMENT_WISE)}, or a functools.partial of one with JSON-able keywords"
        if self.path not in ELEMENT_WISE:
            why = "shards cut tensors, so that it has to be element-wise"
            raise ValueError(f"`server_optimizer` must be {allowed} ({why}), got {self.path}")
        if unfit := sorted(set(self.keywords) & set(_UNFIT_KEYWORDS)):
            raise ValueError(f"`server_optimizer` must be {allowed}, and can not be given `{unfit[0]}`")
        try:
            self.state_tensors(torch.float32)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            keywords = dict(self.keywords)
            raise ValueError(
                f"`server_optimizer` must take its keywords, but {self.path}(**{keywords}): {error}"
            ) from None

    @classmethod
    def of(cls, server_optimizer: Any) -> ServerOptimizer:
        """Return what describes an optimizer class, or a :class:`functools.partial` of one.

        Raises:
            ValueError: if it is neither, not element-wise, or its keywords are not JSON.
        """
        keywords: dict[str, Any] = {}
        optimizer = server_optimizer
        if isinstance(optimizer, functools.partial):
            if optimizer.args:
                raise ValueError(f"`server_optimizer` must have keywords only, got arguments {optimizer.args!r}")
            keywords, optimizer = optimizer.keywords, optimizer.func
        paths = [path for path, known in ELEMENT_WISE.items() if known is optimizer]
        path = paths[0] if paths else getattr(optimizer, "__qualname__", repr(optimizer))
        try:
            as_json = json.loads(json.dumps(keywords, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`server_optimizer` must have keywords that JSON can hold, got {keywords}: {error}"
            ) from None
        return cls(path, as_json)

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer for ``parameters``."""
        keywords: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.keywords.items()}
        return ELEMENT_WISE[self.path](list(parameters), **keywords)

    def state_tensors(self, dtype: torch.dtype) -> list[StateTensor]:
        """Return what the optimizer keeps for a parameter of ``dtype`` after a step, found by making one.

        Raises:
            ValueError: if it keeps anything but tensors of the parameter's shape and scalars.
        """
        parameter = torch.zeros(2, dtype=dtype, requires_grad=True)
        parameter.grad = torch.zeros_like(parameter)
        optimizer = self.build([parameter])
        optimizer.step()
        found = []
        for name, value in sorted(optimizer.state[parameter].items()):
            if not isinstance(value, Tensor) or value.shape not in ((), parameter.shape):
                raise ValueError(f"its state '{name}' is not kept element by element")
            found.append(StateTensor(name, value.dtype, value.dim() == 0))
        return found
