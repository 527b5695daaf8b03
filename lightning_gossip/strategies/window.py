"""When a module holds the consensus model: during a validation, and during a save (design §4).

Others swap weights in and out around a validation too. Last in, first out::

    hooks of on_validation_start         a callback may put an average of its own into the module
      the window opens                   the mean over ranks of what is there
        hooks of on_validation_epoch_start   a callback may do the same here:
          a second window                       then the mean over ranks of that is what is validated
          batches
          is closed
        hooks of on_validation_epoch_end
      is closed
    hooks of on_validation_end           the replica again; who saves here saves what was validated
      what was validated is forgotten
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning_gossip.exchange.consensus import Consensus


class ConsensusWindow:
    """Opens and closes, on all ranks alike.

    Args:
        consensus: of the replicas.
        mean: of what callbacks swap in at the start of a validation's epoch.
        build: builds one of them, for a reason in words.
        gather: returns the value of each rank.
        swaps: whether, on some rank, anybody has a hook at the start of a validation's epoch.
    """

    def __init__(
        self,
        consensus: Consensus,
        mean: Consensus,
        build: Callable[[Consensus, str], None],
        gather: Callable[[Any], list[Any]],
        swaps: bool,
    ) -> None:
        self._consensus = consensus
        self._mean = mean
        self._build = build
        self._gather = gather
        self._swaps = swaps
        self._validated: Consensus | None = None  # what was, during the hooks of the end

    @property
    def open(self) -> bool:
        """Whether the module holds the consensus model for the moment."""
        return self._consensus.holds and self._validated is None

    @property
    def kept(self) -> bool:
        """Whether what a save would hold is built already: it is being validated, or was just now."""
        return self.open or self._validated is not None

    def touched(self) -> frozenset[int]:
        """Return where the memory begins that changes as the window opens and closes; see :meth:`Consensus.touched`."""
        return self._consensus.touched() | self._mean.touched()

    @property
    def swapped(self) -> bool:
        """Whether what is validated, or was just now, is no replicas' mean: something was swapped in for the epoch."""
        return self._mean.kept

    def before_start_hooks(self) -> None:
        """Called before anybody's start hooks."""
        self._consensus.note()

    def after_start_hooks(self) -> None:
        """Open the window; a collective."""
        self._build(self._consensus, "validation")
        self._consensus.enter()

    def after_epoch_start_hooks(self) -> None:
        """Validate the mean of what was swapped in at the start of the epoch, if anything was; a collective."""
        if self._swaps and any(self._gather(self._consensus.changed())):
            self._build(self._mean, "what was swapped in for validation")
            self._mean.enter()

    def before_epoch_end_hooks(self) -> None:
        """Give back what was swapped in at the start of the epoch."""
        self._mean.leave()

    def before_end_hooks(self) -> None:
        """Close the window, or where somebody's weights are in the module still, as soon as they are not."""
        self._validated = self._mean if self._mean.kept else self._consensus
        self._consensus.leave(final=False)

    def after_end_hooks(self) -> None:
        """Close for good, on every ending; harmless outside of a validation."""
        self._mean.leave()
        self._consensus.leave()
        self._validated = None
        self._mean.forget()
        self._consensus.forget()

    def before_exception_hooks(self) -> None:
        """Close the window as far as may be where a validation fails, before others take back what they swapped in."""
        self._mean.leave()
        self._consensus.leave(final=False)

    @contextmanager
    def replica(self) -> Iterator[None]:
        """Give the module its replica for a moment."""
        with ExitStack() as stack:
            if self.open:
                stack.enter_context(self._mean.aside())
                stack.enter_context(self._consensus.aside())
            else:
                self._consensus.leave(final=False)
            yield

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Have the module be the consensus model while it is saved; a collective where it has to be built."""
        if self.open:
            yield
        elif self._validated is not None:
            self._consensus.leave(final=False)
            with self._validated.again():
                yield
        else:
            self._build(self._consensus, "a checkpoint")
            self._consensus.enter()
            try:
                yield
            finally:
                self._consensus.leave()
                self._consensus.forget()
