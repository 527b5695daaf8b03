"""``examples/mnist.py``, of which some ranks die, and may come back.

``MORTAL=2,3:3`` in the environment kills ranks 2 and 3 at the start of epoch 3; with ``MORTAL=2,3:3:5`` and a restart
they come back at the start of epoch 5. ``MORTAL_FOLDER`` is where ranks leave word of that for one another.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import mnist
from classifier import Classifier
from command_line import add_image_options, make_parser, parse
from image_data import ImageData
from models import mlp
from training import train_and_test

import benchmarks  # noqa: F401  # the examples' modules

PATIENCE = 3600.0
"""Seconds up to the epoch at which ranks come back."""


@dataclass(frozen=True)
class Fate:
    """What happens to some ranks.

    Attributes:
        ranks: to whom.
        dies, returns: at the start of which epochs; -1 for never.
        folder: where ranks leave word.
    """

    ranks: tuple[str, ...]
    dies: int
    returns: int
    folder: Path

    @classmethod
    def from_environment(cls) -> Fate:
        ranks, dies, *returns = os.environ.get("MORTAL", ":-1").split(":")
        return cls(tuple(ranks.split(",")), int(dies), int(*returns or (-1,)), Path(os.environ["MORTAL_FOLDER"]))

    def await_return(self, rank: str) -> None:
        """Wait, in a process that was started again for ``rank``, until it is time to come back."""
        deadline = time.monotonic() + PATIENCE
        while (self.folder / f"died_{rank}").exists() and not (self.folder / "time_to_return").exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"epoch {self.returns} has not begun within {PATIENCE:g} s")
            time.sleep(0.2)


class Mortal(Classifier):
    def on_train_epoch_start(self) -> None:
        fate, rank = Fate.from_environment(), str(self.global_rank)
        if self.current_epoch == fate.dies and rank in fate.ranks and not (fate.folder / f"died_{rank}").exists():
            (fate.folder / f"died_{rank}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.current_epoch == fate.returns:
            (fate.folder / "time_to_return").touch()
        super().on_train_epoch_start()


def main() -> None:
    parser = make_parser(__doc__, epochs=10, batch_size=128, lr=None, momentum=None)
    add_image_options(parser, validation=8800, models=("mlp",))
    args = parse(parser, mnist.default_to_strategy)
    Fate.from_environment().await_return(os.environ.get("LOCAL_RANK", "0"))
    pl.seed_everything(args.seed, verbose=False)
    train_and_test(args, "mnist", Mortal(mlp(), args.lr, args.momentum, args.seed), ImageData(args, "mnist"))


if __name__ == "__main__":
    main()
