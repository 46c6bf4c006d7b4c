"""Finds running clusters from anywhere inside their Ray cluster, without an HTTP address or a key file.

Every cluster has one controller: a Ray actor named `controller/<cluster id>` in the namespace `penstock`. The cluster
id is `ray.cluster_name` where that is stated, else the Serve application's name under `serve run` and `serve deploy`,
else random (`penstock serve`). The calling process must be connected to Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from penstock.workers.errors import ConfigError

NAMESPACE = "penstock"
CONTROLLER_PREFIX = "controller/"
ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ClusterAddress:
    """How to reach one cluster. `urls` may be empty while no ingress is up."""

    cluster_id: str
    app_name: str  # the Serve application; its deployment is called "ingress"
    urls: tuple[str, ...]  # direct listeners of ingress replicas first, then Serve's proxies
    models: tuple[str, ...]
    needs_key: bool  # callers must bring the API key


def controller_name(cluster_id: str) -> str:
    """The controller's name in Ray, in `NAMESPACE`."""
    return f"{CONTROLLER_PREFIX}{cluster_id}"


def find_controller(cluster_id: str) -> Any:
    """The handle of a cluster's controller. ValueError when there is none."""
    return ray.get_actor(controller_name(cluster_id), namespace=NAMESPACE)


def running_clusters() -> list[str]:
    """Ids of all clusters on this Ray, sorted."""
    found = [
        str(actor["name"]).removeprefix(CONTROLLER_PREFIX)
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and str(actor["name"]).startswith(CONTROLLER_PREFIX)
    ]
    return sorted(found)


def only_cluster(cluster_id: str = "") -> str:
    """`cluster_id` if such a cluster runs; without one, the only cluster. Raises ConfigError naming what there is."""
    running = running_clusters()
    if cluster_id in running or (not cluster_id and len(running) == 1):
        return cluster_id or running[0]
    known = f"running: {', '.join(running)}" if running else "none runs"
    raise ConfigError(f"no cluster {cluster_id!r}; {known}" if cluster_id else f"which cluster? {known}", "cluster")


def cluster_address(cluster_id: str = "") -> ClusterAddress:
    """Where a cluster can be reached; without an id the only one. Raises ConfigError when it cannot be told."""
    name = only_cluster(cluster_id)
    try:
        address: ClusterAddress = ray.get(find_controller(name).address.remote(), timeout=ANSWER_TIMEOUT_S)
    except (RayError, ValueError) as error:
        raise ConfigError(f"the controller of cluster {name!r} does not answer: {error}", "cluster") from error
    return address


def node_address() -> str:
    """The address under which other nodes reach this one."""
    return str(get_node_ip_address())  # type: ignore[no-untyped-call]
