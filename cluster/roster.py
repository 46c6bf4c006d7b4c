"""Who belongs to a cluster: one entry per worker, as the supervisor says and the ingresses believe.

`supervision.py` writes it, `links.py` follows it, `status` prints it. Plain frozen data, so that it crosses a process
boundary as it is. Knows nothing of what a worker does at the moment; that comes from the worker's own stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from penstock.workers.protocol import Role


class WorkerState(StrEnum):
    """Where a worker stands between start and end."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it died; the next start waits for its back-off
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One worker. `address` is empty and `pids` too unless the state is READY or STOPPING."""

    worker_id: str
    role: Role
    width: int  # ranks
    incarnation: int
    state: WorkerState
    address: str = ""  # host:port of its RPC server
    pids: tuple[int, ...] = ()  # of all ranks, in order
    restarts: int = 0
    reason: str = ""  # why it is not ready, or why it was last restarted
    placement: str = ""  # why its ranks are not together on one node; empty: they are
    edition: str = ""  # workers of one edition have equal settings; see `editions.py`


@dataclass(frozen=True, slots=True)
class Roster:
    """All workers of one cluster; `version` grows with every change."""

    version: int
    entries: tuple[RosterEntry, ...]

    def entry(self, worker_id: str) -> RosterEntry | None:
        """The worker's entry, if it belongs to the cluster."""
        return next((entry for entry in self.entries if entry.worker_id == worker_id), None)

    def of_edition(self, edition: str) -> Roster:
        """The same moment, without the workers of other editions."""
        return Roster(self.version, tuple(entry for entry in self.entries if entry.edition == edition))
