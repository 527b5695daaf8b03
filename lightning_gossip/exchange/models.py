"""What the ranks' models have in common: which tensors they share, whether these fit, and which of them differ.

Nothing reaches a collective whose sizes have not been agreed on: see :func:`agree`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store

from lightning_gossip.control.run import Control
from lightning_gossip.control.together import Disagreement
from lightning_gossip.exchange.tensors import describe, digest, elements, has_mean

T = TypeVar("T")

log = logging.getLogger(__name__)

_DIGEST = 8  # bytes

STATISTICS = ("running_mean", "running_var")
"""Names of buffers that are averaged, in BatchNorm and its kin; a module adds its own by ``averaged_buffers``."""

Manifest = dict[str, str]
"""What each parameter and buffer is, by name."""


def ignored_names(module: nn.Module) -> frozenset[str]:
    """Return what stays with each rank: the names in DDP's ``_ddp_params_and_buffers_to_ignore``."""
    return frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def shared_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the ranks have in common, by name."""
    ignored = ignored_names(module)
    return {name: p for name, p in module.named_parameters() if name not in ignored}


def shared_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the ranks have in common, by name."""
    ignored = ignored_names(module)
    return {name: b for name, b in module.named_buffers() if name not in ignored}


def averaged_buffers(module: nn.Module) -> frozenset[str]:
    """Return the buffers of which the consensus model has the mean over ranks: of the others it has rank 0's.

    These are floating-point buffers named ``running_mean`` or ``running_var``, as BatchNorm and its kin have them, and
    those that a module lists, by their names in it, in an attribute ``averaged_buffers``::

        class Centers(nn.Module):
            averaged_buffers = ("center",)

    Raises:
        ValueError: if such an attribute names what is no floating-point buffer of the module.
    """
    buffers = dict(module.named_buffers(remove_duplicate=False))
    found = {name for name, b in buffers.items() if name.rpartition(".")[2] in STATISTICS and has_mean(b)}
    for prefix, part in module.named_modules():
        for name in getattr(part, "averaged_buffers", ()):
            full = f"{prefix}.{name}" if prefix else name
            if full not in buffers or not has_mean(buffers[full]):
                raise ValueError(
                    f"`averaged_buffers` of {type(part).__name__} must name floating-point buffers of it;"
                    f" {name!r} is none"
                )
            found.add(full)
    return frozenset(found)


def manifest(module: nn.Module) -> Manifest:
    """Return shape, dtype and whether it requires a gradient, in words, for every shared parameter and buffer."""
    parameters = {
        f"parameter '{name}'": f"{describe(p)}, {'trainable' if p.requires_grad else 'frozen'}"
        for name, p in shared_parameters(module).items()
    }
    buffers = {f"buffer '{name}'": describe(b) for name, b in shared_buffers(module).items()}
    return parameters | buffers


def check_models_agree(module: nn.Module) -> None:
    """Raise on every rank if a parameter or buffer of one differs from rank 0's; a collective of the default group.

    Raises:
        Disagreement: naming it, the rank, and what both have.
    """
    if group_size() == 1:
        return
    own = manifest(module)
    digests = gathered(hashlib.sha256(repr(list(own.items())).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    raise Disagreement("the ranks have different models: " + "; ".join(_differences(gathered(own))))


def _differences(manifests: list[Manifest]) -> list[str]:
    first = manifests[0]
    found = []
    for rank, other in enumerate(manifests[1:], start=1):
        for name in [*first, *(name for name in other if name not in first)]:
            here, there = first.get(name, "missing"), other.get(name, "missing")
            if here != there:
                found.append(f"{name} is {here} on rank 0 but {there} on rank {rank}")
                break
        else:
            if list(first) != list(other):
                found.append(f"parameters and buffers are in another order on rank {rank} than on rank 0")
    return found


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of their tensors after :func:`agree`.

    Attributes:
        differing: names, in rank 0's order, of tensors that fit on all ranks, can be written in place, and differ.
        misfits: by name, why a tensor that is not alike on all ranks cannot be made so.
        flagged: whether some rank raised its flag.
        contents: by name, what tells this rank's tensors apart; empty for those that are taken to differ.
    """

    differing: tuple[str, ...]
    misfits: Mapping[str, str]
    flagged: bool = False
    contents: Mapping[str, bytes] = field(default_factory=dict)


def agree(tensors: Mapping[str, Tensor], changing: Collection[str] = (), flag: bool = False) -> Agreement:
    """Find out which of the ranks' tensors differ; a collective of the default group.

    Where all are alike, as buffers mostly are, one small message a rank says so. Contents are hashed, but for
    those that change at every step.

    Args:
        tensors: by name.
        changing: names of tensors that are taken to differ, if some rank says so.
        flag: anything that the others should know.
    """
    if group_size() == 1:
        return Agreement((), {}, flag)
    own = {name: elements(tensor) for name, tensor in tensors.items()}
    words = {name: _words(tensor, own[name]) for name, tensor in tensors.items()}
    changes = {name for name in changing if own[name] is not None}
    contents = {name: b"" if name in changes else digest(tensor) for name, tensor in tensors.items()}
    everything = repr([(name, words[name], name in changes) for name in tensors])
    inventory = hashlib.blake2b(everything.encode(), digest_size=_DIGEST).digest()
    whole = hashlib.blake2b(b"".join(contents.values()), digest_size=_DIGEST).digest()
    rows = _gathered_bytes(inventory + whole + bytes([flag]))
    flagged = any(row[-1] for row in rows)
    if len({row[:-1] for row in rows}) == 1:
        return Agreement(tuple(name for name in tensors if name in changes), {}, flagged, contents)
    if len({row[:_DIGEST] for row in rows}) == 1:  # the same tensors, of which some differ
        hashed = [name for name in tensors if name not in changes]
        columns = [
            {row[_DIGEST * i : _DIGEST * (i + 1)] for row in rows}
            for rows in [_gathered_bytes(b"".join(contents[name] for name in hashed))]
            for i in range(len(hashed))
        ]
        unlike = changes | {name for name, column in zip(hashed, columns, strict=True) if len(column) > 1}
        fits = {name for name in unlike if own[name] is not None}
        misfits = {name: f"{words[name]} on every rank, of other contents" for name in unlike - fits}
        return Agreement(tuple(name for name in tensors if name in fits), misfits, flagged, contents)
    compared = _compare(gathered({name: (words[name], contents[name]) for name in tensors}), flagged)
    return replace(compared, contents=contents)


def _compare(everybody: list[dict[str, tuple[str, bytes]]], flagged: bool) -> Agreement:
    differing, misfits = [], {}
    for name in dict.fromkeys(chain.from_iterable(everybody)):
        words = [rank[name][0] if name in rank else "missing" for rank in everybody]
        contents = {rank[name][1] if name in rank else None for rank in everybody}
        if len(set(words)) > 1 and (len(contents) > 1 or b"" in contents):
            other = next(k for k, told in enumerate(words) if told != words[0])
            misfits[name] = f"{words[0]} on rank 0 but {words[other]} on rank {other}"
        elif len(contents) > 1 or b"" in contents:
            if words[0].endswith(_UNWRITABLE):
                misfits[name] = f"{words[0]} on every rank, of other contents"
            else:
                differing.append(name)
    return Agreement(tuple(differing), misfits, flagged)


_UNWRITABLE = ", which cannot be written in place"


def _words(tensor: Tensor, own: Tensor | None) -> str:
    if own is None:
        return describe(tensor) + _UNWRITABLE
    return describe(tensor) + ("" if own.shape == tensor.shape else f", expanded from {tuple(own.shape)}")


def gathered(value: T) -> list[T]:
    """Return the value of each rank, which pickles; a collective of the default group."""
    values = [value] * group_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_group.get())
    return values


def _gathered_bytes(data: bytes) -> list[bytes]:
    """Return the bytes of each rank; all give as many."""
    device = collective_device()
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    rows = [torch.empty_like(mine) for _ in range(group_size())]
    dist.all_gather(rows, mine, group=_group.get())
    return [row.cpu().numpy().tobytes() for row in rows]


_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)


@contextmanager
def over(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let collectives of this room be those of ``group`` within a block, in place of the default one."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def group_size() -> int:
    """Return the number of ranks in the default group: of members, where a run goes on without those it loses."""
    if (group := _group.get()) is not None:
        return group.size()
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def group_rank() -> int:
    """Return this process's rank in the default group."""
    if (group := _group.get()) is not None:
        return group.rank()
    return dist.get_rank(group) if group_size() > 1 else 0


def collective_device() -> torch.device:
    """Return where tensors have to lie for the default group."""
    group = _group.get()  # of torch's own making, or not
    backend = dist.get_backend(group) if group is None else group.name()
    return torch.device("cuda") if backend == "nccl" else torch.device("cpu")


def broadcast_(tensor: Tensor) -> None:
    """Replace ``tensor`` by rank 0's."""
    dist.broadcast(tensor, group=_group.get(), group_src=0)


def all_reduce_(tensor: Tensor) -> None:
    """Replace ``tensor`` by its sum over ranks."""
    dist.all_reduce(tensor, group=_group.get())


@torch.no_grad()
def rank_zeros(module: nn.Module) -> dict[str, Tensor]:
    """Return rank 0's parameters and buffers where some rank's differ, by name; a collective of the default group.

    What cannot be written in place is left alone. :func:`take` puts them into the module.

    Raises:
        RuntimeError: naming a parameter that does not fit.
    """
    if group_size() == 1:
        return {}
    tensors: dict[str, Tensor] = {**shared_parameters(module), **shared_buffers(module)}
    agreement = agree(tensors)
    report_misfits(agreement, shared_parameters(module))
    found = {}
    for name in agreement.differing:
        # as bytes, which every backend moves; in the order of the elements, which ranks may lay out differently
        data = elements(tensors[name])
        if data is None:
            raise RuntimeError(f"{name} cannot be written in place")  # `agree` told so
        found[name] = data.clone(memory_format=torch.contiguous_format)
        broadcast_(found[name].view(-1).view(torch.uint8))
    return found


@torch.no_grad()
def take(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write ``values`` into the module's parameters and buffers of these names."""
    tensors: dict[str, Tensor] = {**shared_parameters(module), **shared_buffers(module)}
    for name, value in values.items():
        data = elements(tensors[name])
        if data is not None:
            data.copy_(value)


_reported: set[str] = set()


def report_misfits(agreement: Agreement, parameters: Collection[str]) -> None:
    """Raise for a parameter that does not fit on all ranks; warn, once a name, of a buffer that stays with each rank.

    Args:
        agreement: of all ranks.
        parameters: the names of parameters.

    Raises:
        Disagreement: on all ranks alike.
    """
    known = [f"parameter '{name}' is {why}" for name, why in agreement.misfits.items() if name in parameters]
    if known:
        raise Disagreement(
            f"the ranks have different models: {'; '.join(known)}. What is renamed in training (pruned, parametrized)"
            " must be so on all ranks; names in the module's `_ddp_params_and_buffers_to_ignore` stay with each rank."
        )
    for name, why in agreement.misfits.items():
        if name not in _reported:
            _reported.add(name)
            log.warning("buffer '%s' is %s: it stays with each rank", name, why)


def has_told_trained(store: Store, rank: int, step: int) -> bool:
    """Whether ``rank`` has called :func:`tell_trained` at ``step``."""
    return bool(store.check([f"trained/{step}/{rank}"]))


def tell_trained(store: Store, control: Control, module: nn.Module, partner: int, step: int) -> str:
    """Say how the parameters that this rank trains differ from those of ``partner``, which asks the same.

    Args:
        store: of the run.
        control: of the run.
        module: this rank's.
        partner: the other rank.
        step: at which their snapshots did not fit.
    """
    own = {name: describe(p) for name, p in shared_parameters(module).items() if p.requires_grad}
    store.set(f"trained/{step}/{control.rank}", json.dumps(own))
    deadline = time.monotonic() + 5
    while not has_told_trained(store, partner, step):
        if time.monotonic() > deadline:
            return f"the ranks' trainable parameters differ at step {step}: rank {control.rank} trains {list(own)}"
        time.sleep(0.01)
    theirs: Manifest = json.loads(store.get(f"trained/{step}/{partner}"))
    (first, ours), (second, others) = sorted([(control.rank, own), (partner, theirs)], key=lambda rank: rank[0])
    found = []
    for name in [*ours, *(name for name in others if name not in ours)]:
        if name not in ours or name not in others:
            rank, words = (first, ours[name]) if name in ours else (second, others[name])
            found.append(f"'{name}' ({words}) is trained on rank {rank} only")
        elif ours[name] != others[name]:
            found.append(f"'{name}' is {ours[name]} on rank {first} but {others[name]} on rank {second}")
    renamed = "; what is renamed (pruned, parametrized) must be so on all ranks" if set(ours) - set(others) else ""
    return f"the ranks' trainable parameters differ at step {step}: {'; '.join(found) or 'in their order'}{renamed}"
