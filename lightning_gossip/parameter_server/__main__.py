"""Serve one shard of a parameter server: ``python -m lightning_gossip.parameter_server --host HOST --port PORT``.

For trusted networks only: whoever reaches the port can change the parameters, or end the process.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from datetime import timedelta

import torch

from lightning_gossip.arguments import check_integer, check_number
from lightning_gossip.parameter_server.process import serve_shard


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_gossip.parameter_server",
        description="Serve one shard until every worker has left. Prints its address. For trusted networks only.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="name or address of this host for workers; listens only there"
    )
    parser.add_argument("--port", type=int, default=0, help="0 for any free one")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for which a worker may be silent")
    parser.add_argument(
        "--parent", type=int, help="process whose end, or whose closing of standard input, ends this one"
    )
    parser.add_argument(
        "--run-store", help="HOST:PORT of the store of a run that goes on without the parent: serve it until it is gone"
    )
    arguments = parser.parse_args()
    log, handler = logging.getLogger("lightning_gossip.parameter_server"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if arguments.parent is None else logging.WARNING)
    torch.set_num_threads(1)  # a link has a thread each; more of them would only take the workers' cores
    try:
        check_integer("port", arguments.port, low=0, high=(1 << 16) - 1)
        seconds = check_number("timeout", arguments.timeout, low=0, open_low=True)
        timeout = timedelta(seconds=seconds)
        serve_shard(arguments.host, arguments.port, timeout, arguments.parent, arguments.run_store)
    except (OSError, ValueError) as error:
        print(f"no shard at {arguments.host}:{arguments.port}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)  # threads that wait inside gloo for a worker that is gone must not hold the process
