"""Keeps a controller's plan and the cluster's key in Ray's own key-value store, where they outlive the controller.

Only `controller.py` uses it. With a fault-tolerant Ray (an external or embedded store) they outlive the head node too.
Every function waits for as long as the store is away, up to Ray's own limit: call them beside the loop.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from penstock.cluster.discovery import NAMESPACE


def _key(cluster_id: str) -> str:
    return f"penstock/plan/{cluster_id}"


class StoreWatch:
    """Whether Ray's control store answers, for one asyncio loop. At most one question is under way."""

    def __init__(self, cluster_id: str, patience_s: float) -> None:
        self._cluster_id = cluster_id
        self._patience_s = patience_s
        self._asked: asyncio.Future[dict[str, Any] | None] | None = None

    async def answers(self) -> bool:
        """False when it has not answered in time, or says that it cannot."""
        if self._asked is None:
            self._asked = asyncio.ensure_future(asyncio.to_thread(load_plan, self._cluster_id))
        asked = self._asked
        try:
            await asyncio.wait_for(asyncio.shield(asked), self._patience_s)
        except (RayError, TimeoutError):
            return False
        finally:
            if asked.done():
                self._asked = None
        return True


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
