"""What a class of strategies says to who takes it for an object, or gives it an argument of DDP's that it has not."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from typing import Any

GRADIENTS = "gradients stay with each replica, so that there is nothing to reduce, to bucket or to find unused"
BUFFERS = "buffers are made alike whenever the consensus model is built"

OF_DDP = {
    "find_unused_parameters": GRADIENTS,
    "static_graph": GRADIENTS,
    "gradient_as_bucket_view": GRADIENTS,
    "bucket_cap_mb": GRADIENTS,
    "ddp_comm_hook": f"{GRADIENTS}; `wire_dtype` halves what travels",
    "ddp_comm_state": f"{GRADIENTS}; `wire_dtype` halves what travels",
    "ddp_comm_wrapper": f"{GRADIENTS}; `wire_dtype` halves what travels",
    "mixed_precision": "give `Trainer(precision=…)`; `wire_dtype` says in which dtype parameters travel",
    "model_averaging_period": "parameters are averaged every `period` steps by LocalSGDStrategy(period=…)",
    "broadcast_buffers": BUFFERS,
    "init_sync": "all ranks begin a fresh `fit` with rank 0's parameters and buffers",
}
"""Why our strategies do not have an argument of Lightning's ``DDPStrategy``, or of torch's DDP."""


class StrategyClass(ABCMeta):
    """The class of our strategies' classes."""

    def __repr__(cls) -> str:
        # Lightning shows it where a Trainer is given the class: "You selected an invalid strategy name: `strategy=…`"
        return f"<class {cls.__module__}.{cls.__qualname__}; a Trainer takes an object of it, {cls.__name__}(…)>"

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a strategy.

        Raises:
            TypeError: for an argument that it does not have; of one that is DDP's it says what to do.
        """
        allowed = cls.__signature__.parameters
        told = [f"`{name}`: {why}" for name, why in OF_DDP.items() if name in kwargs and name not in allowed]
        if told:
            raise TypeError(
                f"{cls.__name__} has no such arguments as DDPStrategy has. Leave them out: {'; '.join(told)}"
            )
        return super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of the constructor: without it, who inspects a class would find that of :meth:`__call__`."""
        _, *parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        return inspect.Signature(parameters)
