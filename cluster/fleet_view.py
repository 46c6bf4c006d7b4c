"""The `FleetView` of one ingress process: roster and heartbeats of its links as `WorkerStatus` values.

The HTTP front asks it for `/status`, `/ready` and the metrics page. Reads the links only; decides nothing.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.links import Links, LinkView
from penstock.cluster.status import REFUSED, WorkerStatus
from penstock.workers.protocol import Role

MOST_BEHIND_S = 2.0  # of this process's loop, for which it still counts as ready


class LinkedFleet:
    """See `status.py:FleetView`."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self.closing = False  # this process is about to end and takes no more

    def workers(self) -> list[WorkerStatus]:
        """Every worker of the cluster, ready or not."""
        return [worker_status(view) for view in self._links.views()]

    def unready(self) -> str:
        """Why no request can be served now; empty when one can."""
        if self.closing:
            return "this server is shutting down"
        views = self._links.views()
        if not views:
            return "no worker is known yet"
        if self._links.behind_s > MOST_BEHIND_S:
            return f"this process is {self._links.behind_s:.1f} s behind"
        # Streams of workers that are silent, or whose step does not move, are cut (`links.py`).
        serving = [view for view in views if view.attached and view.trusted and not view.refused]
        roles = {view.entry.role for view in serving if not (view.load and view.load.draining)}
        if Role.MIXED in roles or roles >= {Role.PREFILL, Role.DECODE}:
            return ""
        missing = [role for role in (Role.PREFILL, Role.DECODE) if role not in roles]
        refused = [view for view in views if view.refused and view.entry.role in missing]
        said = f"no {' and no '.join(role.value for role in missing)} worker is up"
        return "; ".join([said, *(f"{view.entry.worker_id} is refused: {view.refused}" for view in refused)])


def worker_status(view: LinkView) -> WorkerStatus:
    """One worker's line."""
    entry, welcome, load = view.entry, view.welcome, view.load
    figures: dict[str, Any] = {}
    if load is not None:
        figures = {
            "running": load.running,
            "waiting": load.waiting,
            "transfers": load.transfers,
            "preemptions": load.preemptions,
            "step": load.step,
            "kv_free_blocks": load.free_blocks,
            "kv_cached_blocks": load.cached_blocks,
            "kv_quarantined_blocks": load.quarantined_blocks,
            "ranks_lost": load.totals.ranks_lost,
            "totals": load.totals,
        }
    lost = load.totals.blocks_lost if load is not None else 0
    state = "draining" if load is not None and load.draining else entry.state.value
    return WorkerStatus(
        id=entry.worker_id,
        role=entry.role,
        width=entry.width,
        pids=entry.pids,
        state=REFUSED if view.refused else state,
        incarnation=entry.incarnation,
        restarts=entry.restarts,
        reason=view.refused or entry.reason,
        placement=entry.placement,
        quarantined=view.quarantined,
        age_s=round(view.load_age_s, 3) if load is not None else None,
        kv_blocks=welcome.num_blocks - lost if welcome is not None else 0,
        kv_block_size=welcome.block_size if welcome is not None else 0,
        **figures,
    )
