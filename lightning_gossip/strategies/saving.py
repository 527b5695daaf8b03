"""Checkpoints under Lightning: the consensus model, with each rank's replica beside it (design §4)."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from typing_extensions import override

from lightning_gossip.control.stop import RunStopped
from lightning_gossip.exchange.consensus import average_state
from lightning_gossip.exchange.models import agree, averaged_buffers, manifest
from lightning_gossip.strategies import checkpoint as files
from lightning_gossip.strategies import lightning_compat, lightning_members
from lightning_gossip.strategies.consensus import ConsensusStrategy, Evaluate
from lightning_gossip.strategies.joining import identity_of
from lightning_gossip.strategies.lightning_names import _PATH, CheckpointIO, pl, rank_zero_warn
from lightning_gossip.strategies.saved_state import CURRENT_STATE, Dumped, completed, copied, in_both, without

log = logging.getLogger(__name__)


class CheckpointedStrategy(ConsensusStrategy):
    """Ranks with replicas of one model, whose consensus is what a checkpoint holds, with the replicas beside it.

    Args:
        evaluate: see :class:`~lightning_gossip.strategies.base.ReplicaStrategy`.
        launch: as for Lightning's ``DDPStrategy``.
    """

    def __init__(self, *, evaluate: Evaluate, **launch: Any) -> None:
        super().__init__(evaluate=evaluate, **launch)
        self._dumped: dict[str, Any] = {}  # the module's state, as last given to a checkpoint
        self._replica_state: dict[str, Any] | None = None  # this replica's, while the consensus model is saved
        self._resume: dict[str, Any] | None = None  # this package's entry in the checkpoint that is resumed
        self._began = 0.0  # when this call of the Trainer did
        self._saved: dict[str, str] = {}  # id of the last save to a path
        self._own_disk = False  # whether rank 0's files are out of sight, and this rank keeps order on its node
        self._resumed: tuple[_PATH, bool | None] | None = None  # where it came from, until its training ends

    # -- what a subclass does -----------------------------------------------------------------------------------

    @abstractmethod
    def training_state(self) -> dict[str, Any]:
        """Return what this rank needs to continue, as tensors and primitives; called on all ranks at one clock."""

    @abstractmethod
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`training_state` returned."""

    def training_state_to_join(self) -> dict[str, Any]:
        """Return what one that joins begins with, as :meth:`load_training_state` takes it."""
        return self.training_state()

    def continue_from(self, step: int) -> None:
        """Set the exchange clock, where a training goes on from a consensus model."""

    def common_state(self) -> dict[str, Any]:
        """Return what all ranks need alike to continue, however many they are; a collective."""
        return {}

    # -- life of a call of the Trainer ---------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        self._resume = self._resumed = None
        self._began = time.time()
        super().setup_environment()

    @override
    def _set_up_consensus(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super()._set_up_consensus(trainer, module)
        if self._window is not None:
            lightning_compat.save_within(trainer, self._saving)

    def _resume_training(self, trainer: pl.Trainer) -> None:
        """Go on from the checkpoint that was loaded, if one was."""
        resume = self._resume
        if resume is not None and "state" in resume:
            self.load_training_state(resume["state"])
            if "rng" not in resume:  # another rank's: this one draws its own numbers
                lightning_compat.before_iterating(trainer, lambda: None)
                return
            lightning_compat.before_iterating(trainer, lambda: files.restore_rng_state(resume["rng"]))
        elif resume is not None:
            self.continue_from(resume["step"])

    @override
    def on_train_end(self) -> None:
        self._resumed = None
        super().on_train_end()

    def end_resumed(self) -> None:
        """Take over the consensus model that was saved, where a training was at its end when it was resumed.

        Lightning calls no hook of training then, and the modules hold the replicas of the replica files.
        """
        if self._resumed is not None and self.evaluate == "consensus":
            checkpoint = super().load_checkpoint(*self._resumed)
            self._module.on_load_checkpoint(checkpoint)
            self.load_model_state_dict(checkpoint, strict=self._module.strict_loading)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.survives and isinstance(exception, RunStopped) and self._saved:
            log.error("the last checkpoint is %s", next(reversed(self._saved)))

    @override
    def teardown(self) -> None:
        self._dumped = {}
        super().teardown()

    @property
    @abstractmethod
    def hyperparameters(self) -> dict[str, Any]:
        """The strategy's arguments as JSON-able values, defaults filled in, for a run's metadata."""

    # -- joining --------------------------------------------------------------------------------------------------

    @override
    def identity(self) -> dict[str, Any]:
        return identity_of(type(self).__name__, self.hyperparameters, manifest(self._module))

    @override
    def state_to_join(self) -> dict[str, Any]:
        checkpoint = lightning_members.dumped(self._module.trainer)
        self._dumped = {}
        return {"checkpoint": checkpoint, "training": self.training_state_to_join(), "saved": dict(self._saved)}

    @override
    def take_state(self, state: dict[str, Any]) -> dict[str, Any]:
        self._saved = dict(state["saved"])
        self._resume = {"state": state["training"]}
        checkpoint: dict[str, Any] = state["checkpoint"]
        return checkpoint

    @override
    def _what_is_left(self) -> str:
        saved = next(reversed(self._saved), None)
        return f"the last checkpoint is {saved}" if saved else super()._what_is_left()

    # -- saving ---------------------------------------------------------------------------------------------------

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = files.AtomicCheckpointIO()
        elif files.is_wrapper(self._checkpoint_io) and self._checkpoint_io.checkpoint_io is None:
            self._checkpoint_io.checkpoint_io = files.AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Have the module, its state and so whatever hooks see be the consensus model while a checkpoint is saved.

        Not where this rank ends on an exception: then its replica is saved alone.
        """
        if self._alone or self._window is None or self._replica_state is not None:
            yield
            return
        window = self._window
        try:
            with ExitStack() as stack:
                if not (kept := window.kept):
                    stack.enter_context(window.saving())
                with window.replica():
                    self._replica_state = copied(super().lightning_module_state_dict(), window.touched())
                self._dumped = {}
                if kept:
                    stack.enter_context(window.saving())
                yield
        finally:
            self._replica_state = None

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state: in a save the consensus model's, but its own where replicas are evaluated."""
        if self._replica_state is not None and self._dumped:
            return dict(self._dumped)  # a hook asks for it once more
        window = self._window
        with window.replica() if window is not None and self._replica_state is None else nullcontext():
            # without a window nothing is swapped until it is copied, in `_parted`
            touched = frozenset() if window is None else window.touched()
            self._dumped = copied(super().lightning_module_state_dict(), touched)
        return dict(self._dumped)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if self._alone or not self._reaches_others:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path, save_id = self.broadcast((str(filepath), files.new_save_id()))
        replica, consensus = self._parted(checkpoint)
        whole = "optimizer_states" in checkpoint  # not `weights_only`
        replicas = whole and self._consensus is not None  # after `fit` the clock is all that is left of the training
        if replicas:
            replica = self._without_shared(replica, consensus)
        common = self.common_state() if replicas else {}
        while True:
            lowest = self.members[0]
            if replicas:
                self._save_replica(replica, path, save_id, common, storage_options)
            self._meet("replica files are complete")
            if lowest not in self.members:
                continue  # what only the lowest saves is in nobody's file that is left
            if whole:
                consensus[files.KEY] = self._entry(save_id if replicas else None) | common
            self._write(consensus, path, save_id, replicas, storage_options)
            if not self.survives:
                break
            self._meet("the checkpoint is written")
            if lowest in self.members:
                break  # else it is not known whether its writer came to the end of that
        self._saved.pop(path, None)
        self._saved[path] = save_id  # the last one stands last

    def _entry(self, save_id: str | None) -> dict[str, Any]:
        """Return what a checkpoint says of the ranks that wrote replica files beside it."""
        return {"save_id": save_id, "world_size": len(self.members), "ranks": list(self.members), "step": self.step}

    def _write(
        self, consensus: dict[str, Any], path: str, save_id: str, replicas: bool, storage_options: Any | None
    ) -> None:
        """Write the checkpoint that names the replica files, on rank 0, and remove those of the saves before."""
        io = self.checkpoint_io
        try:
            if replicas and self.local_rank == 0 and not self.is_global_zero:
                self._own_disk = not files.exists(files.replica_path(path, save_id, self.members[0]))
            others = files.other_saves(path, save_id) if self.is_global_zero or self._own_disk else []
            super().save_checkpoint(consensus, path, storage_options)
        except BaseException:
            if self.is_global_zero:
                files.remove_save(io, path, save_id)
            raise
        if self.is_global_zero:
            written = {*self._saved, path}

            def tidy() -> None:
                files.remove_saves(io, path, others)
                for folder in files.orphans(path, written, self._began):
                    files.remove(io, folder)

            lightning_compat.after_saving(io, tidy)
        else:  # rank 0 may be writing still: what the `.ckpt` of before names stays until the next save
            files.remove_saves(io, path, set(others) - {self._saved.get(path)})

    def _save_replica(
        self,
        checkpoint: dict[str, Any],
        path: str,
        save_id: str,
        common: dict[str, Any],
        storage_options: Any | None,
    ) -> None:
        entry = {
            "save_id": save_id,
            "rank": self.global_rank,
            "strategy": type(self).__name__,
            "state": self.training_state(),
            "rng": files.rng_state(),
        }
        file = files.replica_path(path, save_id, self.global_rank)
        whole = checkpoint | {files.KEY: entry | common | checkpoint.get(files.KEY, {})}
        files.synchronous(self.checkpoint_io).save_checkpoint(whole, file, storage_options)

    def _parted(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return ``checkpoint`` with this replica's state, and with the consensus model's; a collective."""
        state, self._dumped = self._dumped, {}
        if self._replica_state is not None:
            replica, consensus = self._replica_state, state
        else:
            replica, consensus = self._replica_and_consensus(state)
        dumped = Dumped(checkpoint, state)
        own, replaced = dumped.of_replica(replica)
        if replaced:  # by a hook: the replica goes on from what it is all the same
            own[files.KEY] = {"replaced": replaced}
        ours = set(dict(self._module.named_buffers())) - averaged_buffers(self._module)
        of_consensus = partial(dumped.of_consensus, consensus, lambda name: name not in ours)
        saved = self._together("what hooks put into a checkpoint", of_consensus)
        if CURRENT_STATE in saved and self._window is not None and self._window.swapped:
            mean = partial(average_state, own[CURRENT_STATE], lambda name: name not in ours)
            saved[CURRENT_STATE] = self._together("the present state in a checkpoint", mean)
        return own, saved

    def _replica_and_consensus(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return this replica's ``state``, to be kept, and the consensus model's; a collective."""
        consensus = self._consensus or self.make_consensus(self._module)
        with self._on_root_device():
            if consensus.holds:
                return state, copied(super().lightning_module_state_dict(), consensus.touched())
            self._build(consensus, "a checkpoint")
            touched = consensus.touched()
            replica = copied(state, touched)
            consensus.enter()
            built = copied(super().lightning_module_state_dict(), touched)
            consensus.leave()
            consensus.forget()
        return replica, built

    def _without_shared(self, replica: dict[str, Any], consensus: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out of a replica file what is alike on all ranks and stands in the ``.ckpt``, such as a frozen base."""
        both = in_both(replica, consensus)
        agreement = self._together("what all replicas share", partial(agree, both))
        shared = [entry for entry in both if entry not in {*agreement.differing, *agreement.misfits}]
        entry = {**replica.get(files.KEY, {}), "shared": shared}
        return {**without(replica, shared), files.KEY: entry}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        replaced = checkpoint.get(files.KEY, {}).get("replaced")
        if replaced:
            self._module.load_state_dict(replaced, strict=False)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        super().remove_checkpoint(filepath)
        self._saved.pop(str(filepath), None)
        if self.is_global_zero or self._own_disk:  # after the file that names them; of a symbolic link there are none
            self.checkpoint_io.remove_checkpoint(files.replica_folder(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        entry = checkpoint.get(files.KEY)
        if entry is None or not lightning_compat.is_fitting(self._trainer):
            return checkpoint
        replica: dict[str, Any] = {}
        problem = ""
        try:
            replica = self._load_replica(entry, checkpoint, checkpoint_path, weights_only)
        except files.ReplicaFileError as error:
            problem = str(error)
        problems = [p for p in self.gather(problem) if p]
        if problems:  # all ranks or none
            rank_zero_warn(
                f"Resuming all ranks from the consensus model and rank 0's optimizer state in {checkpoint_path}, not"
                f" from their replicas: {'; '.join(dict.fromkeys(problems))}."
            )
            self._resume = {name: entry[name] for name in entry if name not in ("save_id", "world_size", "ranks")}
            return checkpoint
        self._resume = replica[files.KEY]
        if self._consensus is None:
            self._resumed = (checkpoint_path, weights_only)
        else:  # in the middle of a fit, as the learning-rate finder does
            self.load_training_state(self._resume["state"])
        return replica

    def _load_replica(
        self, entry: dict[str, Any], checkpoint: dict[str, Any], path: _PATH, weights_only: bool | None
    ) -> dict[str, Any]:
        if entry["save_id"] is None:
            raise files.ReplicaFileError("it was saved after `fit`, when the replicas' states were gone")
        if entry["world_size"] != (present := len(self.members)):
            raise files.ReplicaFileError(f"it was saved by {entry['world_size']} ranks, and there are {present} now")
        ranks = entry.get("ranks", range(present))  # all, in checkpoints of before there were members
        path = files.followed(path)
        rank = ranks[self.members.index(self.global_rank)]
        replica = files.load_replica(self.checkpoint_io, path, entry["save_id"], rank, weights_only)
        replica[files.KEY]["ranks"] = list(ranks)
        if (saved_by := replica[files.KEY]["strategy"]) != type(self).__name__:
            raise files.ReplicaFileError(f"it was saved by {saved_by}, and this is {type(self).__name__}")
        return completed(replica, replica[files.KEY].get("shared", ()), checkpoint)
