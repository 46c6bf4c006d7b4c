"""Which routers are still alive, by the last sign each gave, on this worker's own clock.

Used by the engine: a router whose lease ends has its work cancelled. Knows neither streams nor sequences.
"""

from __future__ import annotations

import math


class RouterLeases:
    """Leases by router; each lasts as many seconds after a sign of life as its router said at the start."""

    def __init__(self) -> None:
        self._lease_s: dict[str, float] = {}
        self._ends: dict[str, float] = {}
        self._next_look = math.inf  # no lease ends before

    def __contains__(self, router_id: str) -> bool:
        return router_id in self._ends

    def begin(self, router_id: str, lease_s: float, now: float) -> None:
        """The router attached."""
        self._lease_s[router_id] = lease_s
        self._ends[router_id] = now + lease_s
        self._next_look = min(self._next_look, now + lease_s)

    def renew(self, router_id: str, now: float) -> None:
        """The router gave a sign of life; an unknown one is ignored."""
        lease_s = self._lease_s.get(router_id)
        if lease_s is not None:
            self._ends[router_id] = now + lease_s

    def end(self, router_id: str) -> None:
        """The router is gone."""
        self._lease_s.pop(router_id, None)
        self._ends.pop(router_id, None)

    def expired(self, now: float) -> list[str]:
        """Routers whose lease has ended, in the order they attached; they are forgotten by this call."""
        if now < self._next_look:
            return []
        over = [router_id for router_id, end in self._ends.items() if end <= now]
        for router_id in over:
            self.end(router_id)
        self._next_look = min(self._ends.values(), default=math.inf)
        return over
