"""The moment before an optimizer changes parameters, under automatic and manual optimization (design §11).

Under automatic optimization Lightning runs the forward and backward pass inside of the optimizer's step, as its
closure: the update comes after that. Under manual optimization it is the call itself. And a training step may call an
optimizer that Lightning does not know, or by another way than Lightning's: torch tells of every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class BeforeUpdates:
    """Calls a function before every update of any optimizer of this process; several times, where there are several.

    Args:
        function: to be called, from the thread that steps.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._closure_comes = False  # an optimizer runs, and its closure has not
        self._handle = register_optimizer_step_pre_hook(self._before)

    def within(self, step: Callable[[Callable[[], Any]], Any], closure: Callable[[], Any]) -> Any:
        """Return ``step(closure)``: an optimizer's, that calls the closure, which changes nothing, and then updates."""

        def closing() -> Any:
            result = closure()
            self._closure_comes = False
            self._function()
            return result

        self._closure_comes = True
        try:
            return step(closing)
        finally:
            self._closure_comes = False

    def close(self) -> None:
        """Look no more."""
        self._handle.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._closure_comes:
            self._function()
