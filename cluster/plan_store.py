"""Keeps a controller's plan and the cluster's key in Ray's own key-value store, where they outlive the controller.

Only `controller.py` uses it. With a fault-tolerant Ray (an external or embedded store) they outlive the head node too.
"""

from __future__ import annotations

import json
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from penstock.cluster.discovery import NAMESPACE


def _key(cluster_id: str) -> str:
    return f"penstock/plan/{cluster_id}"


def load_plan(cluster_id: str) -> dict[str, Any] | None:
    """What was saved last; None when nothing is."""
    data: bytes | None = _internal_kv_get(_key(cluster_id), namespace=NAMESPACE)
    if not data:
        return None
    plan: dict[str, Any] = json.loads(data)
    return plan


def save_plan(cluster_id: str, plan: dict[str, Any]) -> None:
    """Replace what was saved."""
    _internal_kv_put(_key(cluster_id), json.dumps(plan), overwrite=True, namespace=NAMESPACE)


def delete_plan(cluster_id: str) -> None:
    """The cluster has ended."""
    _internal_kv_del(_key(cluster_id), namespace=NAMESPACE)
