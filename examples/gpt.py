"""Train a byte-level GPT on text with replicas that exchange rarely.

python examples/gpt.py --devices 4 --strategy diloco
python examples/gpt.py --devices 4 --strategy elastic-gossip --outer-lr 0.7 --outer-momentum 0.9
python examples/gpt.py --devices 4 --strategy local-sgd --data-dir ~/books --model micro

The text is that of the files in --data-dir, by default the sources of Python's standard library. Losses are in nats a
byte. AdamW, whose first beta is --momentum, with a warm-up and a cosine over the whole training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
from command_line import make_parser, parse
from language_model import SIZES, LanguageModel
from text_data import TextData
from training import train_and_test


def fill_in(args: argparse.Namespace) -> None:
    """Set the learning rate by the model where it is left out; raise ``ValueError`` for what text does not have."""
    args.lr = SIZES[args.model].lr if args.lr is None else args.lr
    if args.non_iid is not None:
        raise ValueError("--non-iid deals classes, and text has none; --data-shares contiguous is uneven")
    if args.text_bytes is not None and args.text_bytes < 1:
        raise ValueError(f"--text-bytes must be at least 1, got {args.text_bytes}")


def main() -> None:
    parser = make_parser(__doc__, epochs=1, batch_size=64, lr=None, period=25)
    add = parser.add_argument_group("of this example").add_argument
    add("--model", choices=tuple(SIZES), default="nano", help="0.17, 0.84 and 4.9 million parameters")
    add("--data-dir", type=Path, metavar="DIR", help="of text files; None: Python's standard library")
    add("--text-bytes", type=int, default=4 * 2**20, help="of text at most, what is held out included")
    args = parse(parser, fill_in)
    pl.seed_everything(args.seed, verbose=False)
    size = SIZES[args.model]
    model = LanguageModel(size, args.lr, args.momentum)
    train_and_test(args, "gpt", model, TextData(args, size.context), metric="test_loss")


if __name__ == "__main__":
    main()
