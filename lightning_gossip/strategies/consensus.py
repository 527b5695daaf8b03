"""The consensus model under Lightning: when it is built, evaluated and adopted (design §2, §4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch.distributed as dist
from torchmetrics import Metric
from typing_extensions import override

from lightning_gossip.arguments import check_choice
from lightning_gossip.exchange.consensus import Consensus
from lightning_gossip.strategies import lightning_compat
from lightning_gossip.strategies.lightning_names import pl
from lightning_gossip.strategies.returning import ReturningStrategy
from lightning_gossip.strategies.stand_in import SharedStandIn
from lightning_gossip.strategies.window import ConsensusWindow

Evaluate = Literal["consensus", "replica"]


class ConsensusStrategy(ReturningStrategy):
    """Ranks with replicas of one model, whose consensus is what is evaluated.

    Args:
        evaluate: see :class:`~lightning_gossip.strategies.base.ReplicaStrategy`.
        launch: as for Lightning's ``DDPStrategy``.

    Raises:
        ValueError: if ``evaluate`` is neither ``"consensus"`` nor ``"replica"``.
    """

    def __init__(self, *, evaluate: Evaluate, **launch: Any) -> None:
        self.evaluate = check_choice("evaluate", evaluate, ("consensus", "replica"))
        super().__init__(**launch)
        self.consensus_distance: float | None = None  # when the consensus model was last built
        self.consensus_built = 0  # how often it was built
        self._consensus: Consensus | None = None  # in a `fit`
        self._window: ConsensusWindow | None = None  # in a `fit` whose validations run on the consensus model
        self._unsynced: list[tuple[Metric, Any]] = []  # torchmetrics objects, and when they sync otherwise

    # -- what a subclass does -----------------------------------------------------------------------------------

    def make_consensus(self, module: pl.LightningModule) -> Consensus:
        """Return what builds the consensus model, in ``fit`` and after it: the mean of the replicas, by default."""
        return Consensus(module)

    # -- life of a call of the Trainer ---------------------------------------------------------------------------

    def _set_up_consensus(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin a ``fit``: until :meth:`teardown` validations and checkpoints may build the consensus model."""
        self._consensus = self.make_consensus(module)
        if self.evaluate == "consensus":
            swaps = any(self.gather(lightning_compat.may_swap_in_validation(trainer)))
            self._window = ConsensusWindow(self._consensus, Consensus(module), self._build, self.gather, swaps)
            lightning_compat.open_in_validation(trainer, self._window)

    @override
    def on_train_end(self) -> None:
        if self.evaluate == "consensus" and self._consensus is not None:
            self._build(self._consensus, "the end of training")
            self._consensus.adopt()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._window is not None:
            self._window.after_end_hooks()
        self._end_evaluation()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        self._consensus = self._window = None
        super().teardown()

    @override
    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_consensus": None, "_window": None}

    # -- consensus ----------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self.evaluate == "replica" and self._trainer is not None and not self._trainer.training:
            return {"num_replicas": 1, "rank": 0}  # each rank evaluates its own replica on the whole data
        return super().distributed_sampler_kwargs

    def _build(self, consensus: Consensus, reason: str) -> None:
        """Build what :meth:`Consensus.enter` or :meth:`Consensus.adopt` takes; a collective."""
        consensus.prepare()
        distance = self._together(f"consensus for {reason}", consensus.build)
        if consensus is self._consensus:
            self.consensus_distance = distance
            self.consensus_built += 1

    @property
    def _reaches_others(self) -> bool:
        """Whether collectives work: not in the launching process of spawn and fork."""
        return self.world_size == 1 or dist.is_initialized()

    def adopt_consensus(self) -> None:
        """Make every rank's module the consensus model; call it on all ranks, after ``fit``.

        Raises:
            RuntimeError: where the other replicas are out of reach: in the launching process of spawn and fork, whose
                ranks have ended, or before any ``fit``.
        """
        if not self._reaches_others:
            raise RuntimeError(
                "adopt_consensus() needs the other ranks, and they are not there: with `start_method='spawn'` and"
                " 'fork' their processes end with `fit`. Use `evaluate='consensus'`, or start with 'popen' or torchrun."
            )
        with self._on_root_device():
            consensus = self.make_consensus(self._module)
            self._build(consensus, "adopt_consensus")
            consensus.adopt()

    @contextmanager
    def _on_root_device(self) -> Iterator[None]:
        """Have the module where collectives reach it: after ``fit`` Lightning moves it to the CPU."""
        module = self._module
        device = module.device
        module.to(self.root_device)
        yield
        module.to(device)

    @override
    def on_validation_start(self) -> None:
        self._start_evaluation()
        if self._window is not None:
            self._window.after_start_hooks()

    @override
    def on_validation_end(self) -> None:
        if self._window is not None:
            self._window.after_end_hooks()
        self._end_evaluation()

    @override
    def on_test_start(self) -> None:
        self._start_evaluation()

    @override
    def on_test_end(self) -> None:
        self._end_evaluation()

    def _start_evaluation(self) -> None:
        """Keep torchmetrics objects from pooling the ranks' results where each rank evaluates its own replica."""
        if self.evaluate == "replica":
            self._unsynced = [(m, m.distributed_available_fn) for m in self._module.modules() if isinstance(m, Metric)]
            for metric, _ in self._unsynced:
                metric.distributed_available_fn = SharedStandIn(_not_available, metric.distributed_available_fn)

    def _end_evaluation(self) -> None:
        for metric, available in self._unsynced:
            metric.distributed_available_fn = available
        self._unsynced = []


def _not_available() -> bool:
    return False
