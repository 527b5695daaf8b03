"""Which optimizers a shard may run, and how one travels: as an import path and JSON keywords.

Shards cut tensors anywhere, so that only optimizers that treat every element by itself are allowed; those of
``torch.optim`` that do are listed here, and nothing but this list is ever looked up for a path that arrived.
"""

from __future__ import annotations

import functools
import inspect
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
        allowed = (
            f"one of {', '.join(ELEMENT_WISE)}, its import path, a functools.partial of one with JSON-able keywords, or"
            " a mapping with `class_path` and `init_args`"
        )
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
        """Return what describes an optimizer, whichever way it is given.

        Args:
            server_optimizer: a class; a :class:`functools.partial` of one; the import path of a class; or, as in a
                configuration file, a mapping with ``class_path`` and, where there are keywords, ``init_args``.

        Raises:
            ValueError: if it is none of these, not element-wise, or its keywords are not JSON.
        """
        keywords: dict[str, Any] = {}
        optimizer = server_optimizer
        if isinstance(optimizer, functools.partial):
            if optimizer.args:
                raise ValueError(f"`server_optimizer` must have keywords only, got arguments {optimizer.args!r}")
            keywords, optimizer = optimizer.keywords, optimizer.func
        if hasattr(optimizer, "class_path"):  # as jsonargparse reads such a mapping
            optimizer = vars(optimizer)
        if isinstance(optimizer, Mapping):
            fits = isinstance(optimizer.get("class_path"), str) and set(optimizer) <= {"class_path", "init_args"}
            arguments = optimizer.get("init_args") or {}
            arguments = vars(arguments) if hasattr(arguments, "__dict__") else arguments
            if not fits or not isinstance(arguments, Mapping):
                raise ValueError(
                    "`server_optimizer`, where it is a mapping, must have `class_path`, an import path, and at most"
                    f" `init_args` beside it, a mapping of keywords; got {dict(optimizer)}"
                )
            keywords, optimizer = dict(arguments), optimizer["class_path"]
        if isinstance(optimizer, str):
            path = _by_other_names().get(optimizer, optimizer)
            keywords = _without_defaults(path, keywords)
        else:
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


def _by_other_names() -> dict[str, str]:
    """Return the paths of :data:`ELEMENT_WISE` by the module in which the class is written, as a saved one may say."""
    return {f"{known.__module__}.{known.__name__}": path for path, known in ELEMENT_WISE.items()}


def _without_defaults(path: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs from the class' defaults: a configuration that is saved names all, ``params`` among them."""
    if path not in ELEMENT_WISE:
        return dict(keywords)
    defaults: dict[str, Any] = {"params": None}
    for name, parameter in inspect.signature(ELEMENT_WISE[path]).parameters.items():
        if name != "params":
            value = parameter.default
            defaults[name] = list(value) if isinstance(value, tuple) else value
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in keywords.items()}
    return {name: value for name, value in plain.items() if name not in defaults or defaults[name] != value}
