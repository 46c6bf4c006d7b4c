"""What one worker is doing, as `GET /status` says it and `penstock status` prints it.

The ingress process fills it from the roster and the workers' heartbeats behind the `FleetView` protocol; the metrics
page shows the same figures. Knows nothing of how they got here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.workers.protocol import Role
from penstock.workers.totals import WorkerTotals

REFUSED = "refused"  # it runs, and the router gives it no work


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker. Load figures are of its last heartbeat, `age_s` seconds ago (None: it never sent one)."""

    id: str
    role: Role
    width: int  # ranks
    pids: tuple[int, ...]  # of all ranks, in order
    state: str  # a `roster.WorkerState`, "draining" or REFUSED
    incarnation: int = 1
    restarts: int = 0
    reason: str = ""
    placement: str = ""  # why its ranks are not together on one node; empty: they are
    age_s: float | None = None
    running: int = 0
    waiting: int = 0
    transfers: int = 0
    preemptions: int = 0
    step: int = 0
    ranks_lost: int = 0  # without which the worker goes on, until it is started again
    quarantined: bool = False  # its KV came damaged: this ingress sends it no prompts for a while
    kv_blocks: int = 0
    kv_free_blocks: int = 0
    kv_cached_blocks: int = 0
    kv_quarantined_blocks: int = 0
    kv_block_size: int = 0
    totals: WorkerTotals = field(default_factory=WorkerTotals)  # for the metrics page only

    @property
    def kv_use(self) -> float:
        """Share of KV blocks that sequences hold, 0..1; cached but unowned blocks count as free."""
        return 1 - self.kv_free_blocks / self.kv_blocks if self.kv_blocks else 0.0

    def as_json(self) -> dict[str, Any]:
        """The object `GET /status` lists."""
        figures = {**dataclasses.asdict(self), "role": self.role.value, "kv_use": round(self.kv_use, 4)}
        del figures["totals"]
        return figures

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> WorkerStatus:
        """Inverse of `as_json`; unknown keys of a newer server are dropped."""
        known = {f.name: raw[f.name] for f in dataclasses.fields(WorkerStatus) if f.name in raw}
        return WorkerStatus(**{**known, "role": Role(known["role"]), "pids": tuple(known["pids"])})


class FleetView(Protocol):
    """The workers as this ingress process believes them to be."""

    def workers(self) -> Sequence[WorkerStatus]:
        """Every worker of the cluster, ready or not."""
        ...

    def unready(self) -> str:
        """Why no request can be served now; empty when one can."""
        ...
