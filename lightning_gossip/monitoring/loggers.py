"""A TensorBoard curve for every rank: Lightning's logger, writing on all of them into one folder of the run.

<save_dir>/<name>/version_<n>/
    metadata.json   hparams.yaml
    rank_0/  rank_1/  …              event files
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from lightning_gossip.arguments import check_integer
from lightning_gossip.monitoring import run_folder
from lightning_gossip.monitoring.run_folder import RunFolder
from lightning_gossip.strategies.lightning_names import (
    LightningModule,
    TensorBoardLogger,
    Trainer,
    get_filesystem,
    rank_zero_only,
)

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.utils.tensorboard import SummaryWriter

_constructed = count()


class RankTensorBoardLogger(TensorBoardLogger):
    """Log on every rank, to ``<save_dir>/<name>/version_<n>/rank_<k>``.

    All ranks, and ``fit``, ``validate`` and ``test`` of one logger object, share one ``version_<n>``, which
    rank 0 chooses when it constructs the logger. Construct the loggers on every rank, in the same order.
    Where ``save_dir``, ``name`` or ``version`` differ between ranks (a time stamp, a temporary folder), rank
    0's hold and the others warn. Machines without a common disk each get the rank folders of their own ranks,
    and a ``metadata.json``; a ``save_dir`` that must differ between them can hold an environment variable
    (``"$SCRATCH/logs"``), which each machine expands for itself.

    ``log_dir`` is the version folder, where ``hparams.yaml`` and ``metadata.json`` lie; ``rank_dir`` is this
    rank's.

    Args:
        save_dir: folder of all experiments; a local path or an fsspec URL.
        name: experiment; ``None`` or ``""`` for no folder of its own.
        version: ``None`` for the next free ``version_<n>``. An int or a string (a folder name) is taken as it
            is, and appended to where it exists: give it to resume a run.
        log_graph: add the model's graph (rank 0's); needs ``example_input_array`` in the module.
        default_hp_metric: log a placeholder ``hp_metric`` with hyperparameters that come without metrics.
        prefix: put before every metric's name, with a dash.
        max_queue: events kept in memory before they are written.
        flush_secs: seconds after which they are written in any case.

    Raises:
        ValueError: if an argument is not as above.

    Example::

        logger = RankTensorBoardLogger("logs", name="mnist")
        trainer = Trainer(strategy="elastic_gossip", devices=4, logger=logger)
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        max_queue: int = 10,
        flush_secs: int = 120,
    ) -> None:
        _check_arguments(save_dir, name, version, prefix)
        super().__init__(
            save_dir=os.fspath(save_dir),
            name=name,
            version=version,
            log_graph=log_graph,
            default_hp_metric=default_hp_metric,
            prefix=prefix,
            max_queue=check_integer("max_queue", max_queue, low=1),
            flush_secs=check_integer("flush_secs", flush_secs, low=1),
        )
        self._ordinal = next(_constructed)
        self._given_version = version
        self._start_time = run_folder.utc_now()
        self._metadata: dict[str, Any] = {}
        self._reservation: Callable[[], object] | None = None
        self._agreed_in: Store | None = None
        self._writer_of: tuple[str, int] | None = None
        if _rank() == 0:
            self._choose()
            self._agree()
        elif run_folder.group_store() is None and (folder := run_folder.handed_on(self._ordinal)) is not None:
            self._adopt(folder)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_reservation": None, "_agreed_in": None}

    # One folder for all ranks

    def _choose(self) -> RunFolder:
        """Fix the version, before any process is started, and hand it on to those that will be."""
        if self._version is None:
            root = self._expanded(self._name)
            self._version = run_folder.reserve_version(root)
            reserved = os.path.join(root, f"version_{self._version}")
            self._reservation = weakref.finalize(self, run_folder.remove_if_empty, reserved)
        folder = RunFolder(self._root_dir, self._name, self._version, self._start_time)
        run_folder.hand_on(self._ordinal, folder)
        return folder

    def _agree(self) -> None:
        """Tell, or learn, where rank 0 writes: once in each process group, and without a collective."""
        group = run_folder.group_store()
        folder = run_folder.handed_on(self._ordinal) if group is None else None
        own = self._root_dir, self._name, self._version
        if folder is not None and (folder.save_dir, folder.name, folder.version) != own:
            self._follow(folder)  # this process has joined a run, whatever it chose where it comes as rank 0
        if group is None or group.store is self._agreed_in:
            return
        run_folder.publish_host(group)
        if group.rank == 0:
            run_folder.publish(group, self._ordinal, self._choose())
        else:
            self._follow(run_folder.fetch(group, self._ordinal))
        self._agreed_in = group.store

    def _follow(self, folder: RunFolder) -> None:
        """Write there, and hand it on: any rank may be the one that tells those who join."""
        self._adopt(folder)
        run_folder.hand_on(self._ordinal, folder)

    def _adopt(self, folder: RunFolder) -> None:
        """Write where rank 0 writes, whatever this rank was given."""
        given = {"save_dir": self._root_dir, "name": self._name, "version": self._given_version}
        taken = {"save_dir": folder.save_dir, "name": folder.name, "version": folder.version}
        differing = [key for key, value in given.items() if value is not None and value != taken[key]]
        if differing:
            warnings.warn(
                f"RankTensorBoardLogger: rank {_rank()} was given "
                + ", ".join(f"{key}={given[key]!r}" for key in differing)
                + " and follows rank 0: "
                + ", ".join(f"{key}={taken[key]!r}" for key in differing),
                stacklevel=2,
            )
        self._root_dir, self._name, self._version = folder.save_dir, folder.name, folder.version
        self._start_time = folder.start_time
        self._fs = get_filesystem(self._root_dir)
        if self._given_version is not None:
            self._given_version = folder.version  # told once
        if self._reservation is not None:
            self._reservation()
            self._reservation = None

    def _expanded(self, *folders: str) -> str:
        return os.path.expanduser(os.path.expandvars(os.path.join(self._root_dir, *filter(None, folders))))

    @property
    @override
    def save_dir(self) -> str:
        """The folder of all experiments, expanded."""
        self._agree()
        return self._expanded()

    @property
    @override
    def name(self) -> str:
        """The experiment; empty for none."""
        self._agree()
        return self._name

    @property
    @override
    def root_dir(self) -> str:
        """The folder of the experiment, in which the version folders lie."""
        self._agree()
        return self._expanded(self._name)

    @property
    @override
    def version(self) -> int | str:
        """The version that rank 0 chose.

        Raises:
            RuntimeError: on other ranks of an external launcher, before they are connected.
        """
        self._agree()
        if self._version is None:
            raise RuntimeError(
                f"Rank {_rank()} does not know yet which version rank 0 chose: it learns it once the Trainer has "
                "started. Read `version` and `log_dir` then, or construct the logger with `version=...`."
            )
        return self._version

    @property
    def rank_dir(self) -> str:
        """The folder of this rank's event files."""
        return os.path.join(self.log_dir, f"rank_{_rank()}")

    # What a rank writes

    @property
    @override
    def experiment(self) -> SummaryWriter:
        """This rank's writer."""
        writer_of = (self.rank_dir, os.getpid())
        if self._experiment is None or self._writer_of != writer_of:
            from torch.utils.tensorboard import SummaryWriter

            # a forked process must leave its parent's writer alone: the thread that writes is not here
            if self._experiment is not None and self._writer_of is not None and self._writer_of[1] == os.getpid():
                self._experiment.close()
            self._fs.makedirs(self.rank_dir, exist_ok=True)
            self._experiment = SummaryWriter(log_dir=self.rank_dir, **self._kwargs)
            self._writer_of = writer_of
        return self._experiment

    @override
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics of this rank.

        Args:
            metrics: scalars (numbers, or tensors of one element), or dicts of them.
            step: the abscissa.

        Raises:
            ValueError: if a metric is neither.
        """
        for key, value in metrics.items():
            tag = f"{self._prefix}{self.LOGGER_JOIN_CHAR}{key}" if self._prefix else key
            if isinstance(value, dict):
                self.experiment.add_scalars(tag, value, step)
                continue
            try:
                scalar = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"metric {key!r} must be a scalar or a dict of scalars, got {value!r}") from error
            self.experiment.add_scalar(tag, scalar, step)

    @override
    def log_graph(self, model: LightningModule, input_array: Tensor | None = None) -> None:  # type: ignore[override]
        """Write the model's graph on rank 0, if asked for, and the run's ``metadata.json``.

        Lightning calls this on every rank once the strategy is set up: it is the one moment at which a logger
        is handed the module, and with it the Trainer.
        """
        trainer = None
        with contextlib.suppress(RuntimeError):  # a module that no Trainer runs
            trainer = model.trainer
        if trainer is not None:
            self.log_metadata(_trainer_facts(trainer))
        super().log_graph(model, input_array)

    def log_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Merge facts into ``metadata.json``, with versions, seed, host names and start time; call it on all
        ranks.

        Rank 0 writes the file. So does the first rank of any other machine that does not see rank 0's. The
        record of an earlier start of the same version is kept under ``"earlier"``.

        Args:
            metadata: values that JSON can hold (others become their ``str``), by name.
        """
        self._metadata.update(metadata)
        first_of_machine = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID")) == "0"
        if _rank() != 0 and not first_of_machine:
            return
        written = run_folder.read_metadata(self.log_dir)
        if _rank() != 0 and written:
            return
        record = run_folder.environment_facts() | {"start_time": self._start_time} | self._metadata
        earlier = written.pop("earlier", [])
        if written and written.get("start_time") != self._start_time:
            earlier = [*earlier, written]
        if earlier:
            record["earlier"] = earlier
        run_folder.write_metadata(self.log_dir, record)

    @override
    def save(self) -> None:
        """Flush this rank's events; on rank 0 also write ``hparams.yaml`` where it is missing."""
        if _rank() == 0:
            super().save()
        elif self._experiment is not None:
            self.experiment.flush()

    @override
    def finalize(self, status: str) -> None:
        """Flush and close this rank's writer; logging again opens it again."""
        if _rank() == 0:
            super().finalize(status)
        elif self._experiment is not None:
            self.experiment.close()


def _trainer_facts(trainer: Trainer) -> dict[str, Any]:
    """Return the strategy's class, its arguments where it tells them (``hyperparameters``), and the world
    size."""
    strategy = trainer.strategy
    kind = type(strategy)
    facts: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    arguments = getattr(strategy, "hyperparameters", None)
    if isinstance(arguments, Mapping):
        facts["arguments"] = dict(arguments)
    return {"strategy": facts, "world_size": trainer.world_size}


def _rank() -> int:
    # set by Lightning from the launcher's environment on import, and for certain before a run's first hook
    return int(getattr(rank_zero_only, "rank", 0))


def _check_arguments(save_dir: Any, name: Any, version: Any, prefix: Any) -> None:
    if not isinstance(save_dir, (str, os.PathLike)):
        raise ValueError(f"`save_dir` must be a path or a URL, got {save_dir!r}")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"`name` must be a string or None, got {name!r}")
    if not isinstance(prefix, str):
        raise ValueError(f"`prefix` must be a string, got {prefix!r}")
    is_number = isinstance(version, int) and not isinstance(version, bool) and version >= 0
    if version is not None and not is_number and not (isinstance(version, str) and version):
        raise ValueError(f"`version` must be None, an integer of at least 0 or a folder's name, got {version!r}")
