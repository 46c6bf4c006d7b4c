"""Finds the HTTP address of a cluster through Ray, for `connect()` inside Ray jobs, tasks and actors.

Imported only when it is needed, because it imports Ray. A process that was not connected to Ray is not afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import ray

from penstock.cluster.discovery import cluster_address, running_clusters
from penstock.workers.errors import ConfigError, RefusedError
from penstock.workers.protocol import FailureCode

REACH_TIMEOUT_S = 2.0


def find_url(cluster: str, api_key: str) -> str | None:
    """URL of the cluster with this name; without one, of the only cluster, None when Ray or a cluster is not there.

    Raises ConfigError for a name that does not run, for several clusters without a name, and when the cluster asks for
    a key that we do not have; RefusedError while it runs without an HTTP server.
    """
    with _connected(required=bool(cluster)) as connected:
        if not connected or (not cluster and not running_clusters()):
            return None
        address = cluster_address(cluster)
    if address.needs_key and not api_key:
        raise ConfigError(
            f"cluster {address.cluster_id!r} asks for an API key: pass api_key or set PENSTOCK_API_KEY", "api_key"
        )
    if not address.urls:
        raise RefusedError(FailureCode.NO_WORKER, f"cluster {address.cluster_id!r} has no HTTP server at the moment")
    return reachable(address.urls)


def reachable(urls: Sequence[str]) -> str:
    """The first URL that accepts a connection from here; where none does, the first, whose error will tell."""
    for url in urls:
        parts = urlsplit(url)
        place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        with contextlib.suppress(OSError):
            socket.create_connection(place, timeout=REACH_TIMEOUT_S).close()
            return url
    return urls[0]


@contextlib.contextmanager
def _connected(required: bool) -> Iterator[bool]:
    """Whether this process is connected to Ray inside the block; it joins for its length where it is not."""
    if ray.is_initialized():
        yield True
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if required:
            raise ConfigError(f"no Ray cluster to look for a cluster on: {error}", "cluster") from error
        yield False
        return
    try:
        yield True
    finally:
        ray.shutdown()
