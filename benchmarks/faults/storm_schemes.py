"""How the processes of ``python -m benchmarks.faults.storm`` are started, by scheme."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.shared.namespaces import INTERFACE
from lightning_gossip.control.store import VARIABLE

SCHEMES = ("asynchronous", "gossip", "ddp", "torchft")
DEFAULT = ("asynchronous", "gossip", "ddp")
WATCHED = ("asynchronous", "gossip")
"""Those with a store of this package's."""

LOST_AFTER = 5.0
"""Seconds without a sign of life after which a rank is lost."""

PORT = 29500


@dataclass(frozen=True)
class Launch:
    """What a run consists of.

    Attributes:
        command: of a rank: the module, and its arguments.
        environment: of a rank, besides its number.
        started: the ranks that are started one by one; the others come by them.
        server: what runs beside the ranks, in a namespace of its own.
        are_apart: whether each rank has links of its own, and is started again alone.
    """

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    started: tuple[int, ...] = ()
    server: tuple[str, ...] | None = None
    are_apart: bool = True


def launch_of(scheme: str, ranks: int, pace: float, folder: Path, server: str) -> Launch:
    """Return how a scheme's run is started.

    Args:
        scheme: one of :data:`SCHEMES`.
        ranks: their number.
        pace: of a step, in seconds.
        folder: in which ranks write.
        server: the address of what runs beside the ranks.
    """
    options = (str(folder), "--ranks", f"{ranks}", "--pace", f"{pace}")
    each = tuple(range(ranks))
    if scheme == "torchft":
        lighthouse = {"TORCHFT_LIGHTHOUSE": f"http://{server}:{PORT}", "MASTER_ADDR": server}
        torchft = "benchmarks.faults.storm_torchft"
        return Launch((torchft, *options), lighthouse, each, (torchft, *options, "--lighthouse", f"{PORT}"))
    rank = ("benchmarks.faults.storm_rank", *options, "--scheme", scheme, "--lost-after", f"{LOST_AFTER}")
    if scheme == "ddp":
        torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1000")
        command = (*torchrun, "--monitor-interval=0.1", "-m", *rank)
        # or workers that are started again find in the agent's store where those before them listened
        fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return Launch(command, {"GLOO_SOCKET_IFNAME": "lo"} | fresh, (0,), are_apart=False)
    at_store = {"MASTER_ADDR": server, "MASTER_PORT": f"{PORT}", VARIABLE: "True", "GLOO_SOCKET_IFNAME": INTERFACE}
    return Launch(rank, at_store, each, ("lightning_gossip", "store", "--port", f"{PORT}"))
