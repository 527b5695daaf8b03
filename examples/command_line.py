"""The command line that all examples share: options, their checks, and the strategy that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.strategies import DDPStrategy
from numpy.typing import NDArray
from shares import DATA_SHARES

from lightning_gossip import (
    DiLoCoStrategy,
    DownpourStrategy,
    ElasticGossipStrategy,
    GossipStrategy,
    LocalSGDStrategy,
)
from lightning_gossip.rules.schedule import SELECTORS
from lightning_gossip.strategies.base import TIMEOUT

STRATEGIES = ("local", "none", "all-reduce", "gossip", "elastic-gossip", "local-sgd", "diloco", "downpour")
NO_REPLICAS = ("local", "all-reduce")


class Nobody:
    """Peers that never choose: replicas that never talk."""

    def choices(self, step: int, world_size: int) -> NDArray[np.int64]:
        return np.full(world_size, -1)


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser of the options that all examples have; ``defaults`` override theirs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Formatter, allow_abbrev=False)
    add = parser.add_argument_group("scheme").add_argument
    add("--strategy", choices=STRATEGIES, default="elastic-gossip", help="local: one process; none: never talk")
    add("--devices", type=int, default=4, help="replicas on each machine")
    add("--num-nodes", type=int, default=1, help="machines; start all by torchrun or SLURM")
    add("--alpha", type=float, default=0.5, help="of elastic gossip")
    add("--variant", choices=("pull", "push"), default="pull", help="of gossip")
    add("--probability", type=float, default=1.0, help="to take part in a round, per rank or pair")
    add("--period", type=int, default=1, help="steps between rounds")
    add("--peers", choices=tuple(SELECTORS), default="matching", help="who exchanges with whom")
    add("--delay", type=int, default=0, help="steps from posting an exchange to applying it")
    add("--asynchronous", action="store_true", help="gossip at each rank's own pace: nobody waits for a slow one")
    add("--outer-lr", type=float, help="of diloco (0.7) and elastic gossip (1: none) once a round")
    add("--outer-momentum", type=float, help="likewise: of diloco (0.9) and elastic gossip (0: none)")
    add("--fragments", type=int, default=1, help="parts of the model with rounds of their own: local-sgd, diloco")
    add("--n-push", type=int, default=5, help="steps between pushes of downpour")
    add("--n-pull", type=int, default=5, help="steps between pulls of downpour")
    add("--shards", type=int, default=1, help="processes of downpour's parameter server")
    add("--timeout", type=float, default=TIMEOUT.total_seconds(), help="seconds to wait for a rank that is silent")
    add(
        "--min-replicas",
        type=int,
        metavar="N",
        help="go on without ranks that are lost, as long as so many are left; not of local, all-reduce and none. None:"
        " the run ends with the first",
    )
    add("--restarts", type=int, default=0, metavar="N", help="of each rank that is lost, with --min-replicas: it joins")
    add("--accelerator", default="cpu", help="cpu or cuda")
    add("--process-group-backend", choices=("gloo", "nccl"), help="by default gloo on the CPU, and NCCL on CUDA")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=20)
    add("--batch-size", type=int, default=128, help="over all devices")
    add("--lr", type=float, default=0.01, help="learning rate")
    add("--momentum", type=float, default=0.9, help="Nesterov's; 0 for plain SGD")
    add("--seed", type=int, default=1234, help="of data, initial weights, dropout and the schedule")
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-shares",
        choices=DATA_SHARES,
        default="fixed",
        help="fixed: each worker keeps one disjoint, even share; reshuffled: a new one in each epoch"
        " (DistributedSampler); whole: each walks through all samples in each epoch, in an order of its own;"
        " contiguous: as fixed, of samples that stand beside each other; dealt: each takes the next batch of the epoch"
        " whenever it has need of one, so that faster ones take more",
    )
    add(
        "--non-iid",
        type=float,
        metavar="ALPHA",
        help="deal the classes unevenly over fixed shares of equal size, by a Dirichlet draw for each worker:"
        " 0.1 gives a worker few classes, 100 all of them alike",
    )
    add = parser.add_argument_group("results").add_argument
    add("--log-dir", default="logs", help="folder of the TensorBoard event files and checkpoints")
    add("--run-id", default=None, help="name of the run's folder, a new one without --resume; None: version_<n>")
    add("--log-every", type=int, default=50, help="steps from one logged loss, and measured exchange, to the next")
    add("--resume", action="store_true", help="continue the run named by --run-id from its last epoch, if it has one")
    add("--summary", type=Path, metavar="FILE.json", help="write accuracies, seconds and bytes to this file")
    parser.set_defaults(**defaults)
    return parser


def add_image_options(parser: argparse.ArgumentParser, validation: int, models: tuple[str, ...]) -> None:
    """Add the options of examples on images; the first of ``models`` is the default."""
    add = parser.add_argument_group("images").add_argument
    add("--model", choices=models, default=models[0])
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="of torchvision's files, or of image folders DIR/train/<class>/* and DIR/test/<class>/*; by default"
        " torchvision downloads to ~/.cache/lightning-gossip",
    )
    add("--validation", type=int, default=validation, help="training images held out, drawn at random")
    add(
        "--validate-on",
        choices=("held-out", "test"),
        default="held-out",
        help="test: hold nothing out, and validate on the test set, as the DistBelief project did: its plateau schedule"
        " then sees the test set, and what it reports is not a clean test accuracy",
    )


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def parse(
    parser: argparse.ArgumentParser, fill_in: Callable[[argparse.Namespace], None] | None = None
) -> argparse.Namespace:
    """Return the options given, or end with a message and status 2 where they do not fit together.

    ``fill_in`` sets the options left out that depend on others; what it raises is such a message.
    """
    args = parser.parse_args()
    if args.strategy == "local":
        args.devices = args.num_nodes = 1
    try:
        if fill_in is not None:
            fill_in(args)
        check(args)
        args.strategy_object = make_strategy(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def downpour_lr(lr: float, n_push: int) -> float:
    """Return a worker's learning rate under downpour: the single process' over the steps that a push sums up.

    Raises:
        ValueError: for ``n_push`` below 1.
    """
    if n_push < 1:
        raise ValueError(f"--n-push must be at least 1, got {n_push}")
    return lr / n_push


def sgd_by_strategy(usual: tuple[float, float], downpour: tuple[float, float]) -> Callable[[argparse.Namespace], None]:
    """Return what fills in ``--lr`` and ``--momentum`` where they are left out; it raises as :func:`downpour_lr`.

    Args:
        usual: both, under any other strategy.
        downpour: both, of the single process; see :func:`downpour_lr`.
    """

    def fill_in(args: argparse.Namespace) -> None:
        lr, momentum = (downpour_lr(downpour[0], args.n_push), downpour[1]) if args.strategy == "downpour" else usual
        args.lr = lr if args.lr is None else args.lr
        args.momentum = momentum if args.momentum is None else args.momentum

    return fill_in


def check(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` for options that are out of range, or do not fit together."""
    for name in ("devices", "num-nodes", "epochs", "batch-size", "log-every"):
        value = getattr(args, name.replace("-", "_"))
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if args.batch_size % (args.devices * args.num_nodes):
        raise ValueError(
            "--batch-size is over all devices and must be a multiple of their number:"
            f" {args.batch_size} is not divisible by {args.devices * args.num_nodes}"
        )
    for name, value in (("lr", args.lr), ("timeout", args.timeout), ("non-iid", args.non_iid)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} must be a finite number above 0, got {value}")
    if not 0 <= args.momentum < 1:
        raise ValueError(f"--momentum must be at least 0 and below 1, got {args.momentum}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")
    if args.non_iid is not None and args.data_shares != "fixed":
        raise ValueError(f"--non-iid deals out fixed shares, and --data-shares is {args.data_shares}")
    if args.data_shares == "dealt" and args.strategy == "all-reduce":
        raise ValueError(
            f"--data-shares dealt is of replicas with steps of their own, not of --strategy {args.strategy}"
        )
    if args.min_replicas is not None and args.strategy in ("local", "all-reduce", "none"):
        raise ValueError(f"--min-replicas is of replicas that exchange, and --strategy is {args.strategy}")
    if args.restarts and args.min_replicas is None:
        raise ValueError(f"--restarts needs --min-replicas, got {args.restarts}: else the first loss ends the run")
    if args.asynchronous and args.strategy not in ("gossip", "elastic-gossip"):
        raise ValueError(f"--asynchronous is of gossip and elastic-gossip, and --strategy is {args.strategy}")
    if args.resume and not args.run_id:
        raise ValueError("--resume needs --run-id, the name of the run to continue")


def make_strategy(args: argparse.Namespace) -> Any:
    """Return what ``Trainer(strategy=…)`` takes; replicas are evaluated as they are, on the whole data.

    Raises:
        ValueError: for an argument that the strategy does not allow.
    """
    timeout = timedelta(seconds=args.timeout)
    if args.strategy == "local":
        return "auto"
    if args.strategy == "all-reduce":
        return DDPStrategy(timeout=timeout, process_group_backend=args.process_group_backend)
    common: dict[str, Any] = {"evaluate": "replica", "timeout": timeout}
    common |= {"process_group_backend": args.process_group_backend, "dealt": args.data_shares == "dealt"}
    if args.strategy == "none":
        return ElasticGossipStrategy(peers=Nobody(), **common)
    common |= {"min_replicas": args.min_replicas, "restarts": args.restarts}
    if args.strategy == "downpour":
        return DownpourStrategy(n_push=args.n_push, n_pull=args.n_pull, shards=args.shards, **common)
    common |= {"period": args.period, "delay": args.delay}
    given = {"outer_lr": args.outer_lr, "outer_momentum": args.outer_momentum}
    outer = {name: value for name, value in given.items() if value is not None}
    if args.strategy == "local-sgd":
        return LocalSGDStrategy(fragments=args.fragments, **common)
    if args.strategy == "diloco":
        return DiLoCoStrategy(fragments=args.fragments, **common, **outer)
    common |= {"probability": args.probability, "peers": args.peers, "seed": args.seed}
    common |= {"asynchronous": args.asynchronous}
    if args.strategy == "gossip":
        return GossipStrategy(variant=args.variant, **common)
    return ElasticGossipStrategy(alpha=args.alpha, **common, **outer)
