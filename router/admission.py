"""Who may come in, who waits, and in which order: the gate before placement.

Used by `request_path.py` through tickets. The gate keeps the queues at the workers short, because a place in a
worker's queue cannot be taken back for a fairer one, and because a grant's lease runs while its prefill waits: it
lets in as many sequences as the fleet has places for (and some more), and as much prefill work as the prefilling
workers do in a few seconds. Requests that were inside before (migrating) go first; then tenants by their counters
(`tenants.py`), and within a tenant by priority (lower first) and arrival. The head of the line is never overtaken.

Pure: the caller brings the time. Knows no workers but through `Fleet`.

Invariants: a ticket is waiting, inside, or gone; the sums of tokens inside are those of the tickets inside.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from penstock.router.emission import Emission
from penstock.router.fleet import Fleet
from penstock.router.settings import AdmissionSettings
from penstock.router.tenants import TenantCounters
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode, Role

_RETRY_AFTER_S = 1.0
_GROWTH_TOKENS = 256  # of the output, counted against the KV pools at the gate


@dataclass(slots=True, eq=False)
class Ticket:
    """One request at the gate. `wake` is called when it is let in, or when its prospects may have changed."""

    tenant: str
    priority: int
    emission: Emission
    growth: int  # output tokens that need KV at first
    prefill_tokens: int  # not expected to be cached anywhere
    wake: Callable[[], None]
    arrival: int = 0
    admitted: bool = False  # may go on to placement
    inside: bool = False  # its sequence and KV tokens count
    computing: bool = False  # its prefill tokens count
    kv_tokens: int = 0  # counted while inside
    charged: int = 0  # generated tokens charged so far

    def rank(self) -> tuple[int, int]:
        """Place within its tenant's line."""
        return (self.priority, self.arrival)


class Admission:
    """The gate of one router."""

    def __init__(self, settings: AdmissionSettings, fleet: Fleet) -> None:
        self.tenants = TenantCounters(settings.tenant_weights)
        self._settings = settings
        self._fleet = fleet
        self._lines: dict[str, list[Ticket]] = {}  # waiting newcomers by tenant, each in rank order
        self._urgent: list[Ticket] = []  # waiting again after a migration, oldest first
        self._inside: dict[Ticket, None] = {}
        self._prefill_tokens = 0
        self._kv_tokens = 0
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Tickets at the gate."""
        return len(self._urgent) + sum(map(len, self._lines.values()))

    @property
    def inside(self) -> int:
        """Tickets let in and not gone."""
        return len(self._inside)

    def arrive(self, ticket: Ticket) -> None:
        """A new request. Raises RefusedError when the line, or the tenant's part of it, is full."""
        line = self._lines.get(ticket.tenant, [])
        if len(line) >= self._settings.max_waiting_per_tenant:
            raise RefusedError(FailureCode.TENANT_LIMIT, "too many requests of this tenant are waiting", _RETRY_AFTER_S)
        if self.waiting >= self._settings.max_waiting:
            raise RefusedError(FailureCode.OVERLOADED, "too many requests are waiting", _RETRY_AFTER_S)
        self._arrivals += 1
        ticket.arrival = self._arrivals
        ticket.charged = ticket.emission.count
        if not line:
            self.tenants.joined_line(ticket.tenant, self._lines)
            self._lines[ticket.tenant] = line
        bisect.insort(line, ticket, key=Ticket.rank)
        self.pump()

    def reenter(self, ticket: Ticket, prefill_tokens: int) -> None:
        """A request that lost its worker: it keeps its place inside and only waits for room to prefill again."""
        self._settle_prefill(ticket)
        ticket.prefill_tokens = prefill_tokens
        ticket.admitted = False
        bisect.insort(self._urgent, ticket, key=lambda each: each.arrival)
        self.pump()

    def computed(self, ticket: Ticket) -> None:
        """The first token is there: the prefill is done."""
        if ticket.computing:
            self._settle_prefill(ticket)
            self.pump()

    def leave(self, ticket: Ticket) -> None:
        """The request is over, or gives up waiting. Idempotent."""
        line = self._lines.get(ticket.tenant, [])
        if ticket in self._urgent:
            self._urgent.remove(ticket)
        if ticket in line:
            self._drop_from_line(ticket)
        if ticket.inside:
            self._charge_output(ticket)
            self._settle_prefill(ticket)
            del self._inside[ticket]
            self._kv_tokens -= ticket.kv_tokens
            ticket.inside = False
        self.pump()

    def wake_all(self) -> None:
        """The fleet changed: let in who fits now, and have all others look again."""
        self.pump()
        for ticket in [*self._urgent, *(ticket for line in self._lines.values() for ticket in line)]:
            ticket.wake()

    def pump(self) -> None:
        """Let in whoever may come, in order; stop at the first that does not fit."""
        while self._urgent and self._prefill_fits(self._urgent[0]):
            self._let_in(self._urgent.pop(0))
        if self._urgent or not self._lines:
            return
        for ticket in self._inside:
            self._charge_output(ticket)
        while self._lines:
            tenant = self.tenants.next_tenant(self._lines)
            ticket = self._lines[tenant][0]
            if not (self._sequence_fits(ticket) and self._prefill_fits(ticket)):
                return
            self._drop_from_line(ticket)
            self.tenants.charge(tenant, self._settings.input_weight * ticket.prefill_tokens)
            self._let_in(ticket)

    def check_integrity(self) -> None:
        """Raises ValueError unless the sums are those of the tickets inside and no empty line is kept."""
        if self._prefill_tokens != sum(ticket.prefill_tokens for ticket in self._inside if ticket.computing):
            raise ValueError("prefill tokens inside are off")
        if self._kv_tokens != sum(ticket.kv_tokens for ticket in self._inside):
            raise ValueError("KV tokens inside are off")
        if not all(self._lines.values()):
            raise ValueError("an empty line is kept")

    def _let_in(self, ticket: Ticket) -> None:
        if not ticket.inside:
            ticket.inside = True
            ticket.kv_tokens = ticket.prefill_tokens + ticket.growth
            self._inside[ticket] = None
            self._kv_tokens += ticket.kv_tokens
        ticket.computing = True
        ticket.admitted = True
        self._prefill_tokens += ticket.prefill_tokens
        ticket.wake()

    def _drop_from_line(self, ticket: Ticket) -> None:
        line = self._lines[ticket.tenant]
        line.remove(ticket)
        if not line:
            del self._lines[ticket.tenant]
            if not self._lines:
                self.tenants.left_line(ticket.tenant)

    def _settle_prefill(self, ticket: Ticket) -> None:
        if ticket.computing:
            ticket.computing = False
            self._prefill_tokens -= ticket.prefill_tokens

    def _charge_output(self, ticket: Ticket) -> None:
        fresh = ticket.emission.count - ticket.charged
        if fresh:
            ticket.charged += fresh
            self.tenants.charge(ticket.tenant, self._settings.output_weight * fresh)

    def _sequence_fits(self, ticket: Ticket) -> bool:
        """Nobody comes in while no worker decodes; the first one always does where one does."""
        views = self._fleet.alive((Role.DECODE, Role.MIXED))
        if not views:
            return False
        if not self._inside:
            return True
        places = sum(max(0, view.welcome.max_num_seqs - view.others_sequences) for view in views)
        tokens = sum(max(0, view.welcome.num_blocks - view.others_blocks) * view.welcome.block_size for view in views)
        ratio = self._settings.admit_ratio
        needed = self._kv_tokens + ticket.prefill_tokens + ticket.growth
        return len(self._inside) < ratio * places and needed <= ratio * tokens

    def _prefill_fits(self, ticket: Ticket) -> bool:
        if not self._prefill_tokens:
            return True
        views = self._fleet.alive((Role.PREFILL, Role.MIXED)) or self._fleet.alive((Role.DECODE,))
        limit = sum(view.prefill_limit(self._settings.prefill_backlog_s) for view in views)
        return self._prefill_tokens + ticket.prefill_tokens <= limit


def growth_of(remaining: int) -> int:
    """Output tokens whose KV counts at the gate: the start of a long answer, all of a short one."""
    return min(remaining, _GROWTH_TOKENS)
