"""Gossiping SGD (Jin, Yuan, Iandola, Keutzer 2016, "How to scale distributed deep learning?", arXiv:1611.04581)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
from typing_extensions import override

from lightning_gossip.arguments import check_choice
from lightning_gossip.rules.mixing import MixingRule, PullMixing, PushMixing
from lightning_gossip.rules.schedule import Chooser, Peers
from lightning_gossip.strategies.base import LOST_AFTER, TIMEOUT, EpochEnds, Evaluate, NonFinite, StartMethod
from lightning_gossip.strategies.lightning_names import Accelerator, CheckpointIO, ClusterEnvironment, Precision
from lightning_gossip.strategies.pairwise import PairwiseStrategy

_RULES: dict[str, MixingRule] = {"pull": PullMixing(), "push": PushMixing()}


class GossipStrategy(PairwiseStrategy):
    """Gossiping SGD: a replica takes the mean with the one it chose (pull), or with those that chose it (push).

    Args:
        variant: ``"pull"``: θ_i ← θ_i + u_i − ½ (s_i − s_k), k chosen by i; or ``"push"``:
            θ_i ← θ_i + u_i − 1/(c+1) Σ_{k ∈ C} (s_i − s_k), C the c ranks that chose i.
        probability: in (0, 1]: of a rank (``uniform``, ``weighted``) or a pair (others) to take part in a round.
        period: steps from one round to the next, at least 1.
        peers: who chooses whom: ``"matching"``, ``"uniform"``, ``"weighted"`` (or a
            :class:`~lightning_gossip.rules.schedule.WeightedPeers`), ``"ring"``, ``"exponential"``, or an object of
            yours with ``choices(step, world_size)``.
        delay: steps from posting an exchange to applying it, from 0 to ``period - 1``.
        wire_dtype: dtype (or its name) in which snapshots travel where it is narrower than the parameter's;
            ``torch.bfloat16`` and ``torch.float16`` halve the bytes of float32. float16 overflows beyond 65,504.
        evaluate: ``"consensus"`` or ``"replica"``; what validation and test run on, and what remains after ``fit``.
        seed: of the schedule, at least 0; the same on all ranks.
        timeout: how long an exchange may take, the wait for its partners included: one that takes longer ends the run,
            also where the partner is only slow. At a validation, a checkpoint or the end, where all meet: how long a
            rank waits for one that gives no sign of life.
        shared_memory: whether ranks on one host read each other's snapshots where they were written, instead of
            sending them over loopback; found out for each pair by itself. Linux; page-locked on CUDA.
        min_replicas: None: the run ends with the first rank that is lost. With a number it begins with so many ranks at
            least, and goes on as long as so many are left: whoever is lost is skipped, and rounds are drawn among the
            others. It needs gloo, and the run's store in a process of its own, which our launchers start.
        restarts: how often this strategy's launchers start the process of each rank again that was lost, with
            ``min_replicas``; it joins with the state of one that trains (as does one that is started by hand).
        lost_after: with ``min_replicas``: a rank that gives no sign of life for so long is lost; more than 2 s.
        nonfinite: what becomes of a replica with NaN or infinite parameters, which is never mixed into another:
            ``"heal"``: it takes a partner's, and its optimizers begin anew; ``"error"``: whoever finds it ends. None is
            ``"heal"`` with ``min_replicas``, and else ``"error"``.
        asynchronous: whether ranks exchange at their own pace, and nobody waits for anybody but at a validation, a
            checkpoint and the end: in its own rounds a rank asks for an exchange and trains on, and the other answers
            at once, whatever it is at. Both apply it at the end of the step that they are in by then. `period` and
            `probability` count a rank's own steps; `delay` is 0; on the CPU.
        dealt: whether ranks take an epoch's batches as they have need of them, in place of even shares; None: not.
        epoch_ends: whether an epoch of even shares ends with the ``"first"`` rank that is through, or with ``"all"``.
        accelerator, parallel_devices, cluster_environment, checkpoint_io: as for Lightning's ``DDPStrategy``.
        precision_plugin, process_group_backend, start_method: likewise.

    Raises:
        ValueError: for an argument that is not allowed.

    Example::

        Trainer(accelerator="cpu", devices=4, strategy=GossipStrategy(variant="push", period=8))
    """

    def __init__(
        self,
        variant: Literal["pull", "push"] = "pull",
        probability: float = 1.0,
        period: int = 1,
        peers: str | Peers | Chooser = "matching",
        delay: int = 0,
        wire_dtype: torch.dtype | str | None = None,
        evaluate: Evaluate = "consensus",
        seed: int = 0,
        timeout: timedelta = TIMEOUT,
        shared_memory: bool = True,
        min_replicas: int | None = None,
        restarts: int = 0,
        lost_after: timedelta = LOST_AFTER,
        nonfinite: NonFinite | None = None,
        asynchronous: bool = False,
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
        self.variant = check_choice("variant", variant, tuple(_RULES))
        super().__init__(
            rule=_RULES[variant],
            probability=probability,
            period=period,
            peers=peers,
            delay=delay,
            wire_dtype=wire_dtype,
            evaluate=evaluate,
            seed=seed,
            timeout=timeout,
            shared_memory=shared_memory,
            asynchronous=asynchronous,
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

    @property
    @override
    def hyperparameters(self) -> dict[str, Any]:
        return {"variant": self.variant, **super().hyperparameters}
