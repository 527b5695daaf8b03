"""Others swap weights around a validation too: everybody finds what they left, last in, first out (design §4)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from forked import Linear, Recorder, fit, recorded, regression
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.trainer import call
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gossip import DownpourStrategy, ElasticGossipStrategy
from lightning_gossip.strategies.base import ReplicaStrategy

PAIRS = [
    ("on_validation_start", "on_validation_end"),
    ("on_validation_epoch_start", "on_validation_epoch_end"),
    ("on_validation_start", "on_validation_epoch_end"),
    ("on_validation_epoch_start", "on_validation_end"),
]


def apart() -> ElasticGossipStrategy:
    """Replicas that never exchange: what they are is up to them alone."""
    return ElasticGossipStrategy(period=10**6, start_method="fork")


def loader() -> DataLoader[Any]:
    return DataLoader(regression(), 8)


class Replicas(Linear):
    """Keeps this rank's parameters after every step, and what its last validation ran on."""

    def seen(self) -> dict[str, Any]:
        return recorded(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen().setdefault("steps", []).append(weights(self))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen()["validated"] = weights(self)


def weights(module: pl.LightningModule) -> Tensor:
    return torch.cat([p.detach().clone().view(-1) for p in module.parameters()])


def put(module: pl.LightningModule, values: Tensor) -> None:
    with torch.no_grad():
        for p, value in zip(module.parameters(), values.split([p.numel() for p in module.parameters()]), strict=True):
            p.copy_(value.view_as(p))


def replace(module: pl.LightningModule, values: Tensor) -> None:
    """Give the parameters other values in other memory."""
    torch.nn.utils.vector_to_parameters(values.clone(), module.parameters())


class Average:
    """An exponential average by hand, swapped in and out: by a copy, by exchanging the two, or by other memory."""

    def __init__(self, by: str = "copy") -> None:
        self.by = by
        self.put = replace if by == "memory" else put
        self.average: Tensor | None = None
        self.kept: Tensor | None = None

    def update(self, module: pl.LightningModule) -> None:
        present = weights(module)
        self.average = present if self.average is None else 0.9 * self.average + 0.1 * present

    def swap_in(self, module: pl.LightningModule) -> None:
        if self.average is None:
            self.average = weights(module)
        self.kept = weights(module)
        self.put(module, self.average)

    def swap_out(self, module: pl.LightningModule) -> None:
        if self.kept is None:
            return
        if self.by == "exchange":
            self.average = weights(module)
        self.put(module, self.kept)
        self.kept = None


class AverageCallback(Callback):
    def __init__(self, start: str, end: str, by: str = "copy") -> None:
        self.average = Average(by)
        setattr(self, start, lambda trainer, module: self.average.swap_in(module))
        setattr(self, end, lambda trainer, module: self.average.swap_out(module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.average.update(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.average.swap_out(pl_module)


def train(folder: Path, module: Any, strategy: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    return fit(folder, module(), strategy or apart(), max_epochs=3, train=loader(), **kwargs)


def assert_same_steps(with_swaps: list[dict[str, Any]], without: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(with_swaps, without, strict=True):
        torch.testing.assert_close(torch.stack(ours["steps"]), torch.stack(theirs["steps"]), rtol=1e-12, atol=1e-12)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("by", ["copy", "exchange", "memory"])
@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_a_callback_that_swaps_an_average_in_and_out_leaves_training_as_it_was(
    tmp_path: Path, start: str, end: str, by: str
) -> None:
    callback = AverageCallback(start, end, by)
    if by == "exchange" and PAIRS.index((start, end)) >= 2:
        pytest.skip("what is exchanged must be exchanged at hooks that answer each other")
    without = train(tmp_path, Replicas, val=None)
    ranks = train(tmp_path, Replicas, val=loader(), callbacks=[callback])
    assert_same_steps(ranks, without)
    assert not torch.equal(ranks[0]["steps"][-1], ranks[1]["steps"][-1]), "else it would show nothing"


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_hooks_of_the_module_swap_too(tmp_path: Path, start: str, end: str) -> None:
    class Swaps(Replicas):
        def __init__(self) -> None:
            super().__init__()
            self.average = Average()

        def on_train_batch_end(self, *_: Any) -> None:
            self.average.update(self)

    setattr(Swaps, start, lambda self: self.average.swap_in(self))
    setattr(Swaps, end, lambda self: self.average.swap_out(self))
    assert_same_steps(train(tmp_path, Swaps, val=loader()), train(tmp_path, Replicas, val=None))


class ScheduleFree(torch.optim.SGD):
    """Has two sets of weights, like the optimizers of Defazio et al. 2024; ``eval()`` and ``train()`` interpolate."""

    mode = "train"

    def eval(self) -> None:
        assert self.mode == "train"
        self.mode = "eval"
        self._move(-0.25)

    def train(self) -> None:
        assert self.mode == "eval"
        self.mode = "train"
        self._move(0.2)  # p + w (z − p) is undone by w' = w / (w − 1)

    def _move(self, weight: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                anchor = self.state[p].setdefault("anchor", p.detach().clone())
                p.data.lerp_(anchor, weight)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("start", "end"), [*PAIRS[:2], ("on_validation_model_eval", "on_validation_model_train")])
def test_optimizers_with_two_sets_of_weights(tmp_path: Path, start: str, end: str) -> None:
    class Free(Replicas):
        def configure_optimizers(self) -> Any:
            return ScheduleFree(self.parameters(), lr=0.02)

    class Swaps(Free):
        pass

    def at_start(self: Any) -> None:
        if start.endswith("model_eval"):
            pl.LightningModule.on_validation_model_eval(self)
        self.optimizers().optimizer.eval()

    def at_end(self: Any) -> None:
        if end.endswith("model_train"):
            pl.LightningModule.on_validation_model_train(self)
        self.optimizers().optimizer.train()

    setattr(Swaps, start, at_start)
    setattr(Swaps, end, at_end)
    ranks = train(tmp_path, Swaps, val=loader(), num_sanity_val_steps=0)
    without = train(tmp_path, Free, val=None)
    for ours, theirs in zip(ranks, without, strict=True):
        torch.testing.assert_close(ours["steps"][-1], theirs["steps"][-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("start", "end"), PAIRS[:2])
def test_under_downpour_the_mean_of_averages_is_validated_and_training_goes_on_from_the_replica(
    tmp_path: Path, start: str, end: str
) -> None:
    class Checks(AverageCallback):
        last: Tensor | None = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            kept, self.last = self.last, None
            if kept is not None:
                pl_module.seen().setdefault("off", []).append(float((weights(pl_module) - kept).abs().max()))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            super().on_train_batch_end(trainer, pl_module)
            self.last = weights(pl_module)
            pl_module.seen()["average"] = self.average.average

    strategy = DownpourStrategy(n_push=10**6, n_pull=10**6, start_method="fork")
    ranks = train(tmp_path, Replicas, strategy, val=loader(), callbacks=[Checks(start, end)])
    mean = torch.stack([rank["average"] for rank in ranks]).mean(0)
    for rank in ranks:
        assert max(rank["off"]) < 1e-9, "from one step to the next, validations between"
        torch.testing.assert_close(rank["validated"], mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("start", "end"), PAIRS[:2])
def test_what_was_validated_is_what_a_checkpoint_saves_and_it_is_built_once(
    tmp_path: Path, start: str, end: str
) -> None:
    class Counts(Replicas):
        def on_train_end(self) -> None:
            assert isinstance(self.trainer.strategy, ReplicaStrategy)
            self.seen()["built"] = self.trainer.strategy.consensus_built

    checkpoint = ModelCheckpoint(tmp_path / "saved", "last", save_on_train_epoch_end=False, save_last=True)
    callbacks = [AverageCallback(start, end), checkpoint]
    ranks = train(tmp_path, Counts, val=loader(), callbacks=callbacks, enable_checkpointing=True)
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    state = torch.cat([value.view(-1) for value in saved["state_dict"].values()])
    for rank in ranks:
        torch.testing.assert_close(state, rank["validated"], rtol=0, atol=0)
        assert rank["built"] == 1 + 3, "the sanity check and three validations"


def test_without_anybody_else_what_is_saved_is_the_consensus_that_was_validated(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "saved", "last", save_on_train_epoch_end=False)
    ranks = train(tmp_path, Replicas, val=loader(), callbacks=[checkpoint], enable_checkpointing=True)
    state = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["state_dict"]
    for rank in ranks:
        assert torch.equal(torch.cat([value.view(-1) for value in state.values()]), rank["validated"])


def test_hooks_see_the_consensus_from_epoch_start_to_epoch_end_and_the_replica_around(tmp_path: Path) -> None:
    class Looks(Replicas):
        def look(self, hook: str) -> None:
            self.seen()[hook] = weights(self)

    hooks = ["train_epoch_end", *(f"validation_{when}" for when in ("start", "epoch_start", "epoch_end", "end"))]
    for hook in hooks:
        setattr(Looks, f"on_{hook}", lambda self, hook=hook: self.look(hook))
    ranks = train(tmp_path, Looks, val=loader(), num_sanity_val_steps=0)
    mean = torch.stack([rank["train_epoch_end"] for rank in ranks]).mean(0)
    for rank in ranks:
        for hook in ("validation_epoch_start", "validation_epoch_end"):
            torch.testing.assert_close(rank[hook], mean, rtol=1e-12, atol=1e-12)
        for hook in ("validation_start", "validation_end"):
            assert torch.equal(rank[hook], rank["train_epoch_end"])


def test_what_is_set_in_an_end_hook_or_in_the_window_stays(tmp_path: Path) -> None:
    """A rollback, as callbacks do it that go back to the best weights so far."""
    for hook in ("on_validation_epoch_end", "on_validation_end"):

        class GoesBack(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx == 0:
                    pl_module.seen().setdefault("epochs", []).append(weights(pl_module))

        setattr(
            GoesBack, hook, lambda self, trainer, module: put(module, torch.arange(4.0).double() + trainer.global_rank)
        )
        ranks = train(tmp_path, Replicas, val=loader(), callbacks=[GoesBack()])
        for number, rank in enumerate(ranks):
            assert rank["epochs"][-1].tolist() == [number, number + 1, number + 2, number + 3], hook


@pytest.fixture
def hooks_of_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have forked ranks call the hooks of an exception, as ranks of other launchers do."""
    fit_rank = pl.Trainer._fit_impl

    def fit_calling_hooks(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            fit_rank(self, *args, **kwargs)
        except BaseException as error:
            call._interrupt(self, error)
            raise

    monkeypatch.setattr(pl.Trainer, "_fit_impl", fit_calling_hooks)


class Fails(Replicas):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step:
            raise ValueError("no such batch")


class AtTheEnd(Callback):
    """Writes what the module holds after an exception, behind everybody's hooks but the strategy's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.replica = weights(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if hasattr(self, "replica"):  # not in the launching process
            torch.save((self.replica, weights(pl_module)), self.folder / f"after_{trainer.global_rank}.pt")


class Late(Callback):
    """Its hooks come last of all callbacks', those of ``of`` first."""

    def __init__(self, of: AtTheEnd) -> None:
        self.of = of

    def on_exception(self, *args: Any) -> None:
        self.of.on_exception(*args)


@pytest.mark.faults
@pytest.mark.usefixtures("hooks_of_exceptions")
@pytest.mark.parametrize("pair", [None, PAIRS[0], PAIRS[2]])
def test_an_exception_in_validation_leaves_the_replica(tmp_path: Path, pair: tuple[str, str] | None) -> None:
    swapper = [] if pair is None else [AverageCallback(*pair)]
    first = AtTheEnd(tmp_path)
    with pytest.raises(Exception, match="no such batch"):
        train(tmp_path, Fails, val=loader(), callbacks=[first, *swapper, Late(first)])
    for rank in range(2):
        replica, after = torch.load(tmp_path / f"after_{rank}.pt")
        assert torch.equal(replica, after)


class InRanks(OnExceptionCheckpoint):
    def on_exception(self, *args: Any) -> None:
        if dist.is_initialized():  # not in the launching process
            super().on_exception(*args)


@pytest.mark.usefixtures("hooks_of_exceptions")
@pytest.mark.faults
def test_a_save_on_an_exception_in_validation_holds_the_replica(tmp_path: Path) -> None:
    checkpoint = InRanks(tmp_path, "failed")
    with pytest.raises(Exception, match="no such batch"):
        train(tmp_path, Fails, val=loader(), callbacks=[AtTheEnd(tmp_path), checkpoint], enable_checkpointing=True)
    replica, _ = torch.load(tmp_path / "after_0.pt")
    state = torch.load(tmp_path / "failed.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([value.view(-1) for value in state.values()]), replica)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("evaluate", ["consensus", "replica"])
@pytest.mark.parametrize("fn", ["validate", "test"])
def test_validate_and_test_by_themselves_give_back_what_callbacks_find(tmp_path: Path, fn: str, evaluate: Any) -> None:
    hook = "validation" if fn == "validate" else "test"

    class Finds(Callback):
        before: Tensor
        found: Tensor

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.average = torch.arange(4.0, dtype=torch.float64)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            torch.save((self.before, self.found, weights(pl_module)), tmp_path / f"{trainer.global_rank}.pt")

    def swap_in(self: Any, trainer: Any, module: Any) -> None:
        self.before = weights(module)
        put(module, self.average)

    def swap_out(self: Any, trainer: Any, module: Any) -> None:
        self.found = weights(module)
        put(module, self.before)

    setattr(Finds, f"on_{hook}_start", swap_in)
    setattr(Finds, f"on_{hook}_end", swap_out)
    strategy = ElasticGossipStrategy(start_method="fork", evaluate=evaluate)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[Finds()],
    )  # fmt: skip
    getattr(trainer, fn)(Linear(), loader(), verbose=False)
    for rank in range(2):
        before, found, after = torch.load(tmp_path / f"{rank}.pt")
        assert found.tolist() == [0, 1, 2, 3]
        assert torch.equal(before, after)


def test_copies_of_a_callback_in_mid_training_are_callbacks_of_their_own(tmp_path: Path) -> None:
    class Copies(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            checkpoint = trainer.checkpoint_callback
            twin = copy.deepcopy(checkpoint)
            assert twin._monitor_candidates.__self__ is twin
            assert twin.state_dict() == checkpoint.state_dict()

    callbacks = [Copies(), ModelCheckpoint(tmp_path / "saved")]
    train(tmp_path, Replicas, callbacks=callbacks, enable_checkpointing=True, recorder=Recorder(tmp_path))
