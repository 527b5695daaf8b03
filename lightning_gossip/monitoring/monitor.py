"""What gossip and the parameter server do, as curves: read from the strategy's own counts, without a message."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_gossip.arguments import check_integer
from lightning_gossip.strategies import lightning_compat
from lightning_gossip.strategies.base import ReplicaStrategy
from lightning_gossip.strategies.lightning_names import STEP_OUTPUT, Callback, Strategy, pl, rank_zero_warn

Metrics = dict[str, float]
Fields = dict[str, tuple[str, ...]]

# tags: a prefix and a field of ExchangeStats, or of Downpour's stats: counted since the start, of the logged step, or
# averaged over the steps since they were logged last
_TOTALS: Fields = {"gossip": ("exchanges", "bytes_sent"), "downpour": ("pushes", "pulls", "bytes_sent")}
_OF_THE_STEP: Fields = {"gossip": ("partner", "partner_step_lag", "busy"), "downpour": ("staleness",)}
_SECONDS: Fields = {"gossip": ("wait_seconds", "mix_seconds"), "downpour": ("wait_seconds",)}


class GossipMonitor(Callback):
    """Log how far the replicas are apart and what their exchanges cost, to every logger of the Trainer.

    It sends nothing and runs no collective: a rank logs what it knows, where its loggers write
    (:class:`~lightning_gossip.monitoring.loggers.RankTensorBoardLogger` on every rank, Lightning's own on rank 0). The
    abscissa is that of the module's own metrics. The progress bar shows ``partner_distance`` and ``exchanges``.

    =============================  =====================================================================================
    ``gossip/consensus_distance``  sqrt(mean over ranks of ‖θ_i − θ̄‖²) / ‖θ̄‖, whenever the consensus model was built:
                                   for a validation, a checkpoint, or the end
    ``gossip/partner_distance``    ‖s_i − s_k‖ / ‖s_i‖, mean over its partners, of the first exchange that is applied at
                                   or after every ``every_n_steps``-th step
    ``gossip/exchanges``           payloads received and mixed since the start
    ``gossip/bytes_sent``          bytes of payload sent since the start
    ``gossip/wait_seconds``        seconds a step that training waited, mean since they were logged last
    ``gossip/mix_seconds``         seconds a step that snapshots and mixing took, likewise
    ``gossip/members``             ranks that take part, how often one was lost so far, and how often one joined, with
    ``gossip/lost``                ``min_replicas``: at the start, whenever they change, and at the end
    ``gossip/joined``
    ``gossip/partner``             rank in the exchange applied in the logged step, the smallest of several, -1 for none
    ``gossip/partner_step_lag``    with ``asynchronous=True``: by how many steps its snapshot was behind the own one;
    ``gossip/busy``                and the share of this rank's rounds since the start that brought no partner
    =============================  =====================================================================================

    Under a parameter server: ``downpour/pushes``, ``downpour/pulls``, ``downpour/bytes_sent``,
    ``downpour/wait_seconds`` and ``downpour/staleness`` (server updates by others) in place of all but the first.
    Totals are logged once more at the end of training, so that a curve's last point is the whole run's. With
    uniformly random partners the expectation of partner_distance² is 2n / (n − 1) times consensus_distance².

    Args:
        every_n_steps: steps (accumulation windows, not batches) from one logged step to the next.

    Raises:
        ValueError: if it is not an integer of at least 1.

    Example::

        Trainer(strategy="elastic_gossip", logger=RankTensorBoardLogger("logs"), callbacks=[GossipMonitor()])
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, low=1)
        self._step = 0  # the last one seen
        self._abscissa = 0  # of that step, as Lightning's loggers count
        self._consensus_built = 0
        self._stats: dict[str, Any] = {}  # by the tags' prefix; they outlive the strategy's connections
        self._totals: Metrics = {}  # as last logged
        self._members: Metrics = {}  # as last logged
        self._seconds: Metrics = {}  # summed over the steps since they were logged
        self._steps = 0
        self._warned = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, ReplicaStrategy) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"GossipMonitor logs nothing with {type(trainer.strategy).__name__}: it reads the strategies of"
                " lightning_gossip, such as `Trainer(strategy='elastic_gossip')`."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, ReplicaStrategy):
            self._step = strategy.step
            self._abscissa = lightning_compat.logging_step(trainer)
            self._consensus_built = strategy.consensus_built
            self._totals = {}
            self._seconds, self._steps = {}, 0
            self._stats = _stats_of(strategy)
            self._members = {}
            self._log(trainer, self._news_of_members(strategy))
            self._arm(strategy, waiting=False)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, ReplicaStrategy) or strategy.step == self._step:
            return  # within an accumulation window nothing is new
        self._log_consensus_distance(trainer)  # of a checkpoint after the last step
        self._step = strategy.step
        self._abscissa = lightning_compat.logging_step(trainer)
        self._stats = _stats_of(strategy)
        distance = getattr(self._stats.get("gossip"), "partner_distance", None)
        self._arm(strategy, waiting=distance is None)
        self._steps += 1
        for tag, seconds in _read(self._stats, _SECONDS).items():
            self._seconds[tag] = self._seconds.get(tag, 0.0) + seconds
        metrics = self._news_of_members(strategy)
        if distance is not None:
            metrics["gossip/partner_distance"] = distance
        if self._step % self.every_n_steps == 0:
            self._totals = _read(self._stats, _TOTALS)
            metrics |= self._totals | _read(self._stats, _OF_THE_STEP)
            metrics |= {tag: seconds / self._steps for tag, seconds in self._seconds.items()}
            self._seconds, self._steps = {}, 0
        self._log(trainer, metrics)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_consensus_distance(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_consensus_distance(trainer)  # of the model that remains
        totals = _read(self._stats | _stats_of(trainer.strategy), _TOTALS)
        if totals != self._totals:
            self._log(trainer, totals)
        self._log(trainer, self._members)
        self._stats = {}

    def _news_of_members(self, strategy: ReplicaStrategy) -> Metrics:
        """Return who takes part, where that is news."""
        if not strategy.survives:
            return {}
        lost, joined = strategy.lost, strategy.joined
        members: Metrics = {
            "gossip/members": strategy.world_size - lost + joined,
            "gossip/lost": lost,
            "gossip/joined": joined,
        }
        if members == self._members:
            return {}
        self._members = members
        return dict(members)

    def _arm(self, strategy: ReplicaStrategy, waiting: bool) -> None:
        """Have the coming step's exchange measured if the step is due, or one that was due had no exchange yet."""
        exchange = getattr(strategy, "exchange", None)
        if exchange is not None:
            exchange.measure = (exchange.measure and waiting) or (self._step + 1) % self.every_n_steps == 0

    def _log_consensus_distance(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, ReplicaStrategy) or strategy.consensus_built == self._consensus_built:
            return
        self._consensus_built = strategy.consensus_built
        if strategy.consensus_distance is not None and not trainer.sanity_checking:
            self._log(trainer, {"gossip/consensus_distance": strategy.consensus_distance})

    def _log(self, trainer: pl.Trainer, metrics: Metrics) -> None:
        if not metrics:
            return
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._abscissa)
        shown = ("partner_distance", "exchanges")
        lightning_compat.show_in_progress_bar(
            trainer, {name: metrics[f"gossip/{name}"] for name in shown if f"gossip/{name}" in metrics}
        )


def _stats_of(strategy: Strategy) -> dict[str, Any]:
    """Return the counts that the strategy keeps, by the prefix of their tags."""
    exchange = getattr(strategy, "exchange", None)
    found = {"gossip": getattr(exchange, "stats", None), "downpour": getattr(strategy, "downpour_stats", None)}
    return {prefix: stats for prefix, stats in found.items() if stats is not None}


def _read(stats: dict[str, Any], fields: Fields) -> Metrics:
    """Return the values of ``fields`` by tag, without those that are not known yet."""
    values = {
        f"{prefix}/{name}": getattr(source, name, None) for prefix, source in stats.items() for name in fields[prefix]
    }
    return {tag: value for tag, value in values.items() if value is not None}
