"""What a worker made since its last push, kept apart from what it pulled: the arithmetic of design §3, no transport.

With R the *reference*, the worker's own displacement not yet sent is θ − R. A push copies θ to X, sends X − R and makes
X the reference. A pull that was asked for when the reference was Q brings θ̃; the replica then moves by M = θ̃ − Q, and
so does the reference: θ becomes θ̃ + (θ − Q), which is θ̃ plus everything made since the last push before the request,
whatever was pushed in between. Training does the copy and the move; the differences belong to the links' threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout
from lightning_gossip.exchange.flat_mixing import is_finite
from lightning_gossip.parameter_server.optimizers import ServerOptimizer
from lightning_gossip.parameter_server.protocol import DTYPES, Setup

Reference = tuple[Tensor, ...]
"""Flat storages whose sum is the reference: a copy, and at times a move that is not added to it yet."""


class Cut:
    """How the flat parameters are cut: every shard gets an even, contiguous part of each dtype's segment.

    (Of one dtype, as most models are, that is one contiguous part of all parameters; of several, every shard still gets
    its share of the bytes of each, and one update is the same arithmetic everywhere.)

    Args:
        layout: of the parameters.
        shards: how many there are.
        workers: how many there are.
        optimizer: that the shards run; None adds.
        survives: whether the run goes on without workers that it loses.

    Attributes:
        setups: what each shard has to know.

    Raises:
        ValueError: if a parameter's dtype is not one that a server can hold.
    """

    def __init__(
        self, layout: FlatLayout, shards: int, workers: int, optimizer: ServerOptimizer | None, survives: bool = False
    ) -> None:
        self.layout = layout
        self.shards = shards
        self.optimizer = optimizer
        names = [str(segment.dtype).removeprefix("torch.") for segment in layout.segments]
        for name, segment in zip(names, layout.segments, strict=True):
            if name not in DTYPES:
                raise ValueError(f"parameters on a server must be of {', '.join(DTYPES)}; {segment.names[0]} is {name}")
        self.setups: list[Setup] = []
        for shard in range(shards):
            bounds = [self.bounds(segment.numel, shard) for segment in layout.segments]
            numels = tuple(end - begin for begin, end in bounds)
            pieces = tuple(names), numels, layout.fingerprint
            self.setups.append(Setup(workers, shard, shards, *pieces, optimizer, survives))

    def bounds(self, numel: int, shard: int) -> tuple[int, int]:
        """Return which elements of a segment ``shard`` holds."""
        return shard * numel // self.shards, (shard + 1) * numel // self.shards

    def parts(self, storage: Tensor, shard: int) -> list[Tensor]:
        """Return the views of ``storage`` (1-D, uint8) that belong to ``shard``, one a segment."""
        return [s.of(storage)[slice(*self.bounds(s.numel, shard))] for s in self.layout.segments]

    def whole(self, storage: Tensor) -> list[Tensor]:
        """Return the views of ``storage`` that all shards hold together, one a segment."""
        return [segment.of(storage) for segment in self.layout.segments]

    def subtract(self, shard: int, minuend: Tensor, since: Reference, out: Tensor) -> list[Tensor]:
        """Set ``shard``'s part of ``out`` to that of ``minuend`` − Σ ``since``, and return its views."""
        parts = self.parts(out, shard)
        for difference, whole, first, *moves in zip(
            parts, self.parts(minuend, shard), *(self.parts(storage, shard) for storage in since), strict=True
        ):
            torch.sub(whole, first, out=difference)
            for move in moves:
                difference.sub_(move)
        return parts


class Copies:
    """Flat copies of the parameters in host memory, pinned where the parameters are on a GPU.

    Args:
        layout: of the parameters.
        device: where they are.
    """

    def __init__(self, layout: FlatLayout, device: torch.device) -> None:
        self._layout = layout
        self._staging = None if device.type == "cpu" else FlatBuffer.empty(layout, device)
        self._storages: list[Tensor] = []
        self._views: dict[int, list[list[Tensor]]] = {}

    def take(self, in_use: Iterable[Tensor]) -> Tensor:
        """Return a storage (1-D, uint8) that is not one of ``in_use``."""
        busy = {id(storage) for storage in in_use}
        for storage in self._storages:
            if id(storage) not in busy:
                return storage
        storage = torch.zeros(self._layout.nbytes, dtype=torch.uint8, pin_memory=self._staging is not None)
        self._storages.append(storage)
        return storage

    @torch.no_grad()
    def read(self, parameters: Mapping[str, Tensor], storage: Tensor) -> None:
        """Copy ``parameters`` to ``storage``."""
        if self._staging is not None:
            self._staging.pack(parameters)
            storage.copy_(self._staging.storage)
            return
        for segment, views in zip(self._layout.segments, self._shaped(storage), strict=True):
            torch._foreach_copy_(views, [parameters[name].detach() for name in segment.names])

    @torch.no_grad()
    def write(self, storage: Tensor, parameters: Mapping[str, Tensor], add: bool = False) -> None:
        """Copy ``storage`` to ``parameters``, or add it to them."""
        operation = torch._foreach_add_ if add else torch._foreach_copy_
        for segment, views in zip(self._layout.segments, self._shaped(storage), strict=True):
            operation([parameters[name] for name in segment.names], views)

    def _shaped(self, storage: Tensor) -> list[list[Tensor]]:
        if self._staging is not None:
            self._staging.storage.copy_(storage)
            return [
                self._layout.views(s, f) for s, f in zip(self._layout.segments, self._staging.segments, strict=True)
            ]
        if id(storage) not in self._views:
            self._views[id(storage)] = [self._layout.views(s, s.of(storage)) for s in self._layout.segments]
        return self._views[id(storage)]


@dataclass(frozen=True, eq=False)
class Push:
    """A push under way: ``delta`` = ``copy`` − ``since``."""

    copy: Tensor
    since: Reference
    delta: Tensor


@dataclass(frozen=True, eq=False)
class Pull:
    """A pull under way: ``move`` = ``received`` − ``since``."""

    since: Reference
    received: Tensor
    move: Tensor


class Displacement:
    """One worker's reference, and the buffers of the one push and the one pull that may be under way.

    Args:
        cut: of the parameters.
        device: where they are.
    """

    def __init__(self, cut: Cut, device: torch.device) -> None:
        self.cut = cut
        self.copies = Copies(cut.layout, device)
        self.push: Push | None = None
        self.pull: Pull | None = None
        self._reference: Reference = ()
        self._pulled = False  # the reference is no copy of the parameters any more

    def begin(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Make ``parameters`` the reference: nothing was made yet. Return the copy of them."""
        self.push = self.pull = None
        copy = self.copies.take(())
        self.copies.read(parameters, copy)
        self._reference = (copy,)
        self._pulled = False
        return copy

    def begin_from(self, reference: Sequence[Tensor]) -> None:
        """Make ``reference`` (a 1-D tensor a segment) the reference: what the parameters differ by was made already."""
        self.push = self.pull = None
        copy = self.copies.take(())
        for part, saved in zip(self.cut.whole(copy), reference, strict=True):
            part.copy_(saved)
        self._reference = (copy,)
        self._pulled = True  # it may have been, before it was saved

    def start_push(self, parameters: Mapping[str, Tensor]) -> Push | None:
        """Copy ``parameters``; they are the reference from now on. Return None, and change nothing, if not finite."""
        copy = self.free()
        self.copies.read(parameters, copy)
        if not is_finite(copy, self.cut.layout):
            return None
        since = self._reference
        # in place, even where a pull is measured from ``since``: on every link that comes before this push
        self.push = Push(copy, since, delta=since[0])
        self._reference = (copy,)
        self._pulled = False
        return self.push

    def start_pull(self, after: Push | None = None) -> Pull:
        """Prepare for θ̃; ``after`` is the push of the same round trip, whose buffer is free when the answer comes."""
        received = self.free() if after is None else after.delta
        self.pull = Pull(self._reference, received, self.free(received))
        return self.pull

    def end_push(self) -> None:
        """The push was acknowledged."""
        self.push = None

    def end_pull(self, parameters: Mapping[str, Tensor]) -> None:
        """θ̃ is here and the move known: move ``parameters`` and the reference."""
        if self.pull is None:
            raise RuntimeError("no pull is under way")
        pull, self.pull = self.pull, None
        self.copies.write(pull.move, parameters, add=True)
        # without a push since the request, the reference is θ̃ itself, and no rounding adds up
        nothing_pushed = self._reference is pull.since
        self._reference = (pull.received,) if nothing_pushed else (*self._reference, pull.move)
        self._pulled = True

    def changed(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether ``parameters`` are no longer what the last push copied.

        Not told where a pull was applied since: what they differ from the reference by may be its rounding.
        """
        if self._pulled:
            return False
        now = self.free()
        self.copies.read(parameters, now)
        pairs = zip(self.cut.whole(now), self.cut.whole(self._reference[0]), strict=True)
        return any(not torch.equal(own.view(torch.uint8), copied.view(torch.uint8)) for own, copied in pairs)

    def reference(self) -> Tensor:
        """Return the reference as one storage; neither push nor pull may be unfinished in a thread."""
        if len(self._reference) == 1:
            return self._reference[0]
        merged = self.free()
        copies, moves = (self.cut.whole(storage) for storage in self._reference)
        for out, copy, move in zip(self.cut.whole(merged), copies, moves, strict=True):
            torch.add(copy, move, out=out)
        self._reference = (merged,)
        return merged

    def free(self, *also: Tensor) -> Tensor:
        """Return a storage that nothing here uses, nor is one of ``also``."""
        push = () if self.push is None else (self.push.copy, *self.push.since, self.push.delta)
        pull = () if self.pull is None else (*self.pull.since, self.pull.received, self.pull.move)
        return self.copies.take((*self._reference, *push, *pull, *also))
