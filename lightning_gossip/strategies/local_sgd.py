"""LocalSGD (Stich 2019, "Local SGD Converges Fast and Communicates Little", arXiv:1805.09767)."""

from __future__ import annotations

from datetime import timedelta

import torch

from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.strategies.all_reduced import AllReducedStrategy
from lightning_gossip.strategies.base import LOST_AFTER, TIMEOUT, EpochEnds, Evaluate, NonFinite, StartMethod
from lightning_gossip.strategies.lightning_names import Accelerator, CheckpointIO, ClusterEnvironment, Precision


class LocalSGDStrategy(AllReducedStrategy):
    """LocalSGD: replicas train for ``period`` steps on their own, then all begin the next round from their mean.

    Any optimizer works on the replicas. A rank that is out of batches makes the others drop the rounds that are left of
    the epoch. One copy of the parameters that travel is kept, the start of the round, beside what is sent and received.

    Args:
        period: steps from one round to the next, at least 1.
        delay: steps from posting a round to applying it, from 0 to ``period - 1``: more time for slow links. Steps made
            meanwhile are kept.
        fragments: parts of the model, by layers, each with rounds of its own, period / fragments steps apart, so that
            traffic has as low a peak (Streaming DiLoCo, Douillard et al. 2025, arXiv:2501.18512); from 1 to ``period``,
            and no more than the model has layers.
        wire_dtype: dtype (or its name) in which a replica's drift travels where it is narrower than the parameter's;
            ``torch.bfloat16`` and ``torch.float16`` halve the bytes of float32.
        evaluate: ``"consensus"`` or ``"replica"``; what validation and test run on, and what remains after ``fit``.
        timeout: how long a round may take, the wait for its slowest rank included: one that takes longer ends the run,
            or is dropped by all where there is ``min_replicas``. At a validation, a checkpoint or the end, where all
            meet: how long a rank waits for one that gives no sign of life.
        min_replicas: None: the run ends with the first rank that is lost. With a number it begins with so many ranks at
            least, and goes on as long as so many are left. A round in which one is lost is applied by all others or by
            none, and the next one is theirs. It needs gloo, and the run's store in a process of its own, which our
            launchers start.
        restarts: how often this strategy's launchers start the process of each rank again that was lost, with
            ``min_replicas``; it joins with the state of one that trains (as does one that is started by hand).
        lost_after: with ``min_replicas``: a rank that gives no sign of life for so long is lost; more than 2 s.
        nonfinite: what becomes of a replica with NaN or infinite parameters, which never get into a mean: ``"heal"``:
            it goes back to the round's common start, and its optimizers begin anew; ``"error"``: its rank ends. None is
            ``"heal"`` with ``min_replicas``, and else ``"error"``.
        dealt: whether ranks take an epoch's batches as they have need of them, in place of even shares; None: not.
        epoch_ends: whether an epoch of even shares ends with the ``"first"`` rank that is through, or with ``"all"``.
        accelerator, parallel_devices, cluster_environment, checkpoint_io: as for Lightning's ``DDPStrategy``.
        precision_plugin, process_group_backend, start_method: likewise; the backend is gloo.

    Raises:
        ValueError: for an argument that is not allowed.

    Example::

        Trainer(accelerator="cpu", devices=4, strategy=LocalSGDStrategy(period=32))
    """

    def __init__(
        self,
        period: int = 32,
        delay: int = 0,
        fragments: int = 1,
        wire_dtype: torch.dtype | str | None = None,
        evaluate: Evaluate = "consensus",
        timeout: timedelta = TIMEOUT,
        min_replicas: int | None = None,
        restarts: int = 0,
        lost_after: timedelta = LOST_AFTER,
        nonfinite: NonFinite | None = None,
        dealt: bool | None = None,
        epoch_ends: EpochEnds = "all",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            outer=OuterStep(),
            period=period,
            delay=delay,
            fragments=fragments,
            wire_dtype=wire_dtype,
            evaluate=evaluate,
            timeout=timeout,
            min_replicas=min_replicas,
            restarts=restarts,
            lost_after=lost_after,
            nonfinite=nonfinite,
            dealt=dealt,
            epoch_ends=epoch_ends,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )
