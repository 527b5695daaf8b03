"""Lightning's DDP with torch's communication hooks: what a user with slow links would try first."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

ONE_BUCKET = 1024
"""MB of a bucket: all gradients are in one."""


class HookedDDP(DDPStrategy):
    """DDP over gloo with a hook, on the CPU too, where Lightning 2.6 registers none.

    Args:
        make_state: returns the hook's state; called when there are process groups.
        hook: of torch's ``ddp_comm_hooks``.
        timeout: of collectives.
        ddp: further arguments of ``DDPStrategy``.
    """

    def __init__(self, make_state: Callable[[], Any], hook: Callable[..., Any], timeout: timedelta, **ddp: Any) -> None:
        super().__init__(ddp_comm_hook=hook, process_group_backend="gloo", timeout=timeout, **ddp)
        self._make_state = make_state

    @override
    def _register_ddp_hooks(self) -> None:
        if not isinstance(self.model, DistributedDataParallel) or self._ddp_comm_hook is None:
            raise RuntimeError("a hook is registered within `fit`, with a module that DDP wraps")
        self._ddp_comm_state = self._make_state()
        self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)

    @property
    def comm_state(self) -> Any:
        """The hook's state within ``fit``."""
        return self._ddp_comm_state


def power_sgd(rank: int, start: int, timeout: timedelta) -> HookedDDP:
    """Return DDP with PowerSGD (Vogels et al. 2019, arXiv:1905.13727), error feedback and warm start.

    Args:
        rank: of the matrices that are sent.
        start: step from which gradients are compressed, at least 2; torch counts from 0.
        timeout: of collectives.
    """

    def state() -> PowerSGDState:
        return PowerSGDState(dist.group.WORLD, matrix_approximation_rank=rank, start_powerSGD_iter=start)

    # the hook calls collectives in callbacks of others: with a second bucket, ranks call gloo's in different orders
    return HookedDDP(state, powerSGD_hook, timeout, bucket_cap_mb=ONE_BUCKET)


def bfloat16(timeout: timedelta) -> HookedDDP:
    """Return DDP that sends gradients in bfloat16."""
    return HookedDDP(lambda: dist.group.WORLD, bf16_compress_hook, timeout)


def post_local_sgd(period: int, start: int, timeout: timedelta) -> HookedDDP:
    """Return post-local SGD (Lin et al. 2018, arXiv:1808.07217): DDP at first, then means of parameters now and then.

    Args:
        period: steps from one mean to the next.
        start: steps with an all-reduce of gradients; the mean after step ``start + 1`` is the first.
        timeout: of collectives.
    """

    def state() -> PostLocalSGDState:
        return PostLocalSGDState(None, None, start, post_local_gradient_allreduce=False)

    return HookedDDP(state, post_localSGD_hook, timeout, model_averaging_period=period)
