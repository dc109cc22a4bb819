"""A connection to a Ray cluster: the user's own, or one of this machine for as long as it is used.

Ray is an extra and imported only when a cluster is asked for.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import ClusterError

_PATIENCE = 10.0  # seconds for a cluster to answer


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """Connect to a cluster and give the module `ray`; leave the cluster as it was found.

    address  of a running cluster (`host:6379`, or `auto` on one of its machines); None: the
             environment variable RAY_ADDRESS, else a cluster of this machine that ends with the
             context

    A connection that the caller has already made is used as it is. Raises ClusterError when Ray is
    not installed or nothing answers at `address`.
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError(
            "a cluster needs Ray, which is not installed: pip install 'headwater[ray]'"
        ) from error
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address} is reached through Ray's client, but the index must be seen from here too: "
            "run this on a machine of the cluster, with --ray-address auto"
        )
    if ray.is_initialized():
        yield ray
        return
    # Of a cluster that we start Ray reports nothing to its makers, unless its user wants it to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        if address not in ("auto", "local"):  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **ours)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ClusterError(
            f"no Ray cluster at {address} ({reason}); give --ray-address of one that runs, "
            "or none for a cluster of this machine"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()  # ends a cluster only if `init` started it
