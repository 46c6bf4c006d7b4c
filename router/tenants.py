"""Fairness counters between tenants: Virtual Token Counter (Sheng et al., OSDI 2024), for the waiting line.

Used by `admission.py` only. Each tenant's counter holds the service it has received, in weighted tokens over its
weight; the waiting tenant with the smallest counter goes next. A tenant that comes back after a pause is lifted to
the smallest counter among those waiting, so that idling earns no credit. Pure; bounded by `max_tenants`.

Invariant: the counters of tenants that wait all the time stay within max(input_weight * longest prompt,
output_weight * tokens in flight) of each other (times one over the smaller weight).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

_MAX_TENANTS = 100_000


class TenantCounters:
    """Service received per tenant."""

    def __init__(self, weights: Mapping[str, float], max_tenants: int = _MAX_TENANTS) -> None:
        self._weights = dict(weights)
        self._max_tenants = max_tenants
        self._service: dict[str, float] = {}
        self._last_left: float | None = None  # counter of the tenant that last left an emptied line

    def __len__(self) -> int:
        return len(self._service)

    def service(self, tenant: str) -> float:
        """Weighted tokens over weight; 0 for a stranger."""
        return self._service.get(tenant, 0.0)

    def joining(self, tenant: str, waiting: Collection[str]) -> float:
        """Its counter as it is, or, where it has nothing waiting, as it would be if it had."""
        return self.service(tenant) if tenant in waiting else max(self.floor(waiting), self.service(tenant))

    def floor(self, waiting: Collection[str]) -> float:
        """The least counter of whoever comes to these."""
        return min(map(self.service, waiting), default=self._last_left or 0.0)

    def joined_line(self, tenant: str, waiting: Collection[str]) -> None:
        """`tenant` had nothing waiting and now has; `waiting` are the others that do."""
        counter = self.joining(tenant, waiting)
        if counter > self.service(tenant):
            self._service[tenant] = counter
        self._bound()

    def left_line(self, tenant: str) -> None:
        """The line is empty now; `tenant` was the last in it."""
        self._last_left = self.service(tenant)

    def charge(self, tenant: str, tokens: float) -> None:
        """Weighted tokens of service, negative to give some back."""
        if tokens:
            self._service[tenant] = max(0.0, self.service(tenant) + self.price(tenant, tokens))
            self._bound()

    def price(self, tenant: str, tokens: float) -> float:
        """By how much so many weighted tokens move its counter."""
        return tokens / self.weight(tenant)

    def weight(self, tenant: str) -> float:
        """Its share of the service, against the others'."""
        return self._weights.get(tenant, 1.0)

    def next_tenant(self, waiting: Iterable[str]) -> str:
        """Who of `waiting` (not empty) goes next; ties go to the one named first."""
        return min(waiting, key=self.service)

    def _bound(self) -> None:
        """Forget the half that has received least: on return they are lifted anyway."""
        if len(self._service) > self._max_tenants:
            kept = sorted(self._service, key=self._service.__getitem__)[len(self._service) // 2 :]
            self._service = {tenant: self._service[tenant] for tenant in kept}
