"""Elastic gossip (Pramod 2018, "Elastic Gossip: Distributing Neural Network Training…", arXiv:1812.02407)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store
from typing_extensions import override

from lightning_gossip.arguments import check_number
from lightning_gossip.control.run import Control
from lightning_gossip.rules.mixing import ElasticMixing
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Chooser, Peers, stability_limit
from lightning_gossip.strategies.base import LOST_AFTER, TIMEOUT, EpochEnds, Evaluate, NonFinite, StartMethod
from lightning_gossip.strategies.lightning_names import (
    Accelerator,
    CheckpointIO,
    ClusterEnvironment,
    Precision,
    pl,
    rank_zero_warn,
)
from lightning_gossip.strategies.pairwise import PairwiseStrategy


class ElasticGossipStrategy(PairwiseStrategy):
    """Elastic gossip: partners move towards each other by the same amount, so that the replicas' mean stays.

    θ_i ← θ_i + u_i − α Σ_{k ∈ K_i} (s_i − s_k), K_i the rank that i chose and those that chose i.

    With an outer step, for rare exchanges (``period`` of 25 and more): every replica takes what it drifted since its
    last round for a gradient, makes a step of SGD with Nesterov momentum with it, as DiLoCo does with the mean, and
    exchanges the result (:mod:`~lightning_gossip.rules.outer`). The mean of the replicas then follows DiLoCo's rule,
    with pairs in place of an all-reduce. It keeps two copies of the parameters that travel: where the round began,
    and the momentum; with a narrower ``wire_dtype`` a third one, of about the size that the wire saves.

    Args:
        alpha: α in (0, 1]: ½ makes a pair meet in the middle. A warning at set-up says where it exceeds the schedule's
            stability limit (:func:`~lightning_gossip.rules.schedule.stability_limit`). ½ is stable on every schedule
            that has a name; on one of yours the limit may be lower, down to 2 / world size.
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
            at once, whatever it is at. Both apply it at the end of the step that they are in by then. The mean of the
            replicas moves by the optimizers alone, whatever the order of events. `period` and
            `probability` count a rank's own steps; `delay` is 0; on the CPU.
        outer_lr: η, above 0, of the outer step; DiLoCo's 0.7 is a good start where there is momentum.
        outer_momentum: γ, at least 0 and below 1, of the outer step; DiLoCo's is 0.9. 1 and 0 are plain elastic gossip.
        dealt: whether ranks take an epoch's batches as they have need of them, in place of even shares; None: not.
        epoch_ends: whether an epoch of even shares ends with the ``"first"`` rank that is through, or with ``"all"``.
        accelerator, parallel_devices, cluster_environment, checkpoint_io: as for Lightning's ``DDPStrategy``.
        precision_plugin, process_group_backend, start_method: likewise.

    Raises:
        ValueError: for an argument that is not allowed.

    Example::

        Trainer(accelerator="cpu", devices=4, strategy=ElasticGossipStrategy(alpha=0.5, period=32))
    """

    def __init__(
        self,
        alpha: float = 0.5,
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
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
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
        self.alpha = check_number("alpha", alpha, low=0, high=1, open_low=True)
        step = OuterStep(outer_lr, outer_momentum)
        self.outer_lr, self.outer_momentum = float(outer_lr), float(outer_momentum)
        super().__init__(
            rule=ElasticMixing(self.alpha),
            outer=None if step.is_plain else step,
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
        outer = {"outer_lr": self.outer_lr, "outer_momentum": self.outer_momentum}
        return {"alpha": self.alpha, **outer, **super().hyperparameters}

    @override
    def start_training(self, trainer: pl.Trainer, control: Control, store: Store) -> None:
        super().start_training(trainer, control, store)
        if self.is_global_zero and not self.asynchronous:  # one rank's word is enough; pairs are always stable
            self._warn_if_unstable()

    def _warn_if_unstable(self) -> None:
        # an object of the user's is not asked ahead for nothing
        surely_stable = 0.5 if isinstance(self.schedule.peers, Peers) else 2 / self.world_size
        if self.alpha <= surely_stable:
            return
        limit = stability_limit(self.schedule, self.world_size)
        if self.alpha > limit:
            rank_zero_warn(
                f"alpha={self.alpha:g} exceeds {limit:.2f}, the stability limit of this schedule among"
                f" {self.world_size} ranks: replicas will drift apart where gradients do not hold them."
                " Take an alpha below it."
            )
