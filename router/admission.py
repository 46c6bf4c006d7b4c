"""Who may come in, who waits, and in which order: the gate before placement.

Used by `request_path.py` through tickets. The gate keeps the queues at the workers short, because a place in a
worker's queue cannot be taken back for a fairer one, and because a grant's lease runs while its prefill waits: it
lets in as many sequences as the fleet has places for (and some more), and as much prefill work as the prefilling
workers do in a few seconds. Requests that were inside before (migrating) go first; then tenants by their counters
(`tenants.py`), and within a tenant by priority (lower first) and arrival. The head of the line is never overtaken.

Nobody waits in vain: a newcomer that would not begin within its target (`forecast.py`) is refused on arrival, as the
tenant's own fault where the tenant has more than its share, and those whose target has become impossible since are
shed, the last in the fair order first. Who is still here after most of a second has been promised to be served: from
then on it is shed only where it would begin after twice its target, as when workers die. What was let in is never
shed.

Pure: the caller brings the time. Knows no workers but through `Fleet`.

Invariants: a ticket is waiting, inside, or gone; the sums of tokens inside are those of the tickets inside.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable

from penstock.router.capacity import Capacity, capacity_of, prefill_limit, prefilling
from penstock.router.fleet import Fleet
from penstock.router.forecast import Forecast, House
from penstock.router.settings import AdmissionSettings
from penstock.router.tenants import TenantCounters
from penstock.router.ticket import Ticket, Work
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode

_RETRY_AFTER_S = 1.0
_LAST = (0, float("inf"))  # rank of a request without a ticket
_CERTAIN = 0.65  # of the target: who is let wait should also make it when the forecast is somewhat off
_LAST_CALL = 0.95  # of the target, after which nobody begins: some of it is for the way to the first token
_DECIDE_S = 0.6  # after which the next look is the last one that sheds: with its interval, within a second
_PROMISE = 0.7  # of the target: the forecast that this last look asks for
_HOPELESS = 2.0  # times the target, where a promise is broken
_LEAST_SHARE = 0.5  # of the target that may be spent waiting, however long the prompt itself takes
_AHEAD_S = 0.25  # workers get this much turnover to queue, in whole requests, so that no place stays empty
_BACKLOG_SHARE = 0.25  # of the target that prompts let in may take to compute
_CAPACITY_AGE_S = 0.05


class Admission:
    """The gate of one router."""

    def __init__(self, settings: AdmissionSettings, fleet: Fleet, draw: Callable[[], float]) -> None:
        """`draw`: uniform in [0, 1), so that those who are refused together do not come back together."""
        self.tenants = TenantCounters(settings.tenant_weights)
        self._settings = settings
        self._fleet = fleet
        self._draw = draw
        self._forecast = Forecast(settings, self.tenants)
        self._now = 0.0
        self._capacity: tuple[int, float, Capacity] | None = None  # of a version of the fleet, at a time
        self._lines: dict[str, list[Ticket]] = {}  # waiting newcomers by tenant, each in rank order
        self._urgent: list[Ticket] = []  # waiting again after a migration, oldest first
        self._inside: dict[Ticket, None] = {}
        self._inside_of: Counter[str] = Counter()  # tickets inside by tenant, none of them zero
        self._prefill_tokens = 0
        self._kv_tokens = 0
        self._growth = 0
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Tickets at the gate."""
        return len(self._urgent) + sum(map(len, self._lines.values()))

    @property
    def inside(self) -> int:
        """Tickets let in and not gone."""
        return len(self._inside)

    def check(self, tenant: str, now: float) -> None:
        """Raises RefusedError where even the smallest request of the tenant would be refused now."""
        self._note(now)
        self._check_in_time(tenant, _LAST, Work(1, 1, 0), self._settings.ttft_target_s)

    def arrive(self, ticket: Ticket, now: float) -> None:
        """A new request. Raises RefusedError: it could not begin in time, or its line is full."""
        self._note(now)
        line = self._lines.get(ticket.tenant, [])
        if len(line) >= self._settings.max_waiting_per_tenant:
            raise RefusedError(FailureCode.TENANT_LIMIT, "too many requests of this tenant are waiting", _RETRY_AFTER_S)
        if self.waiting >= self._settings.max_waiting:
            raise RefusedError(FailureCode.OVERLOADED, "too many requests are waiting", _RETRY_AFTER_S)
        self._arrivals += 1
        ticket.arrival, ticket.arrived_at = self._arrivals, now
        ticket.charged = ticket.emission.count
        if ticket.target_s is not None:
            ticket.target_s = min(ticket.target_s, self._settings.ttft_target_s)
            self._check_in_time(ticket.tenant, ticket.rank(), ticket.needs, ticket.target_s)
        if not line:
            self.tenants.joined_line(ticket.tenant, self._lines)
            self._lines[ticket.tenant] = line
        bisect.insort(line, ticket, key=Ticket.rank)
        self.pump()

    def shed_late(self, now: float) -> None:
        """Send those away who cannot begin in time any more; called a few times a second."""
        self._note(now)
        if not self._room().workers:
            return  # how long nobody may be there is another rule's matter
        for ticket, wait_s in reversed(self._forecast.waits_s(self._lines, self._house)):
            if ticket.target_s is None:
                continue
            age_s = now - ticket.arrived_at
            decides = age_s >= _DECIDE_S
            share = _HOPELESS if ticket.promised else _PROMISE if decides else _LAST_CALL
            late_s = age_s + wait_s - share * self._patience_s(ticket.prefill_tokens, ticket.target_s)
            ticket.promised = ticket.promised or decides
            if late_s > 0:
                ticket.shed = self._refusal(ticket.tenant, late_s)
                self._drop_from_line(ticket)
                ticket.wake()
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

    def leave(self, ticket: Ticket, now: float) -> None:
        """The request is over, or gives up waiting. Idempotent."""
        self._note(now)
        line = self._lines.get(ticket.tenant, [])
        if ticket in self._urgent:
            self._urgent.remove(ticket)
        if ticket in line:
            self._drop_from_line(ticket)
        if ticket.inside:
            self._charge_output(ticket)
            self._settle_prefill(ticket)
            capacity = self._room()
            if capacity.places and capacity.kv_tokens:
                self._forecast.turnover.released(max(1.0 / capacity.places, ticket.kv_tokens / capacity.kv_tokens))
            del self._inside[ticket]
            self._inside_of -= Counter({ticket.tenant: 1})
            self._kv_tokens -= ticket.kv_tokens
            self._growth -= ticket.growth
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
            self._inside_of[ticket.tenant] += 1
            self._kv_tokens += ticket.kv_tokens
            self._growth += ticket.growth
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
        capacity = self._room()
        if not capacity.workers:
            return False
        if not self._inside:
            return True
        more = min(self._settings.admit_ratio - 1.0, self._turns_per_s * _AHEAD_S)
        needs = max(1, ticket.prefill_tokens + ticket.growth)
        # Less than one for each worker would wait for that one worker's next end; here, for the first end anywhere.
        sequences = capacity.workers * int(more * capacity.spare / capacity.workers)
        tokens = capacity.workers * needs * int(more * capacity.kv_tokens / (capacity.workers * needs))
        fits = len(self._inside) < capacity.places + sequences
        return fits and self._kv_tokens + needs <= capacity.kv_tokens + tokens

    def _prefill_fits(self, ticket: Ticket) -> bool:
        if not self._prefill_tokens:
            return True
        backlog_s = min(self._settings.prefill_backlog_s, _BACKLOG_SHARE * self._settings.ttft_target_s)
        limit = sum(prefill_limit(view, backlog_s) for view in prefilling(self._fleet))
        return self._prefill_tokens + ticket.prefill_tokens <= limit

    # --- what would come too late ---------------------------------------------------------------------------------

    @property
    def _house(self) -> House:
        held = Work(len(self._inside), self._kv_tokens, self._prefill_tokens)
        return House(self._room(), held, self._turns_per_s, self._inside_of)

    @property
    def _turns_per_s(self) -> float:
        return self._forecast.turns_per_s(self._room(), len(self._inside), self._growth)

    def _note(self, now: float) -> None:
        """Take note of the time, and of whether the house is full from now on."""
        self._now = now
        capacity = self._room()
        full = len(self._inside) >= capacity.places or self._kv_tokens >= capacity.kv_tokens
        self._forecast.turnover.note(full and capacity.workers > 0, now)

    def _room(self) -> Capacity:
        """The fleet's capacity, at most a moment old."""
        kept, version = self._capacity, self._fleet.version
        if kept is None or kept[0] != version or not 0 <= self._now - kept[1] < _CAPACITY_AGE_S:
            kept = self._capacity = (version, self._now, capacity_of(self._fleet, self._settings.tpot_target_s))
        return kept[2]

    def _patience_s(self, prefill_tokens: int, target_s: float) -> float:
        """How long a request may wait for its turn, given that its prompt takes its time too."""
        return max(target_s - self._forecast.compute_s(self._room(), prefill_tokens), _LEAST_SHARE * target_s)

    def _check_in_time(self, tenant: str, rank: tuple[int, float], needs: Work, target_s: float) -> None:
        """Raises RefusedError for a newcomer that would begin too late. An empty house takes anybody."""
        if not self._inside:
            return
        wait_s = self._forecast.newcomer_wait_s(self._lines, self._house, tenant, rank, needs)
        late_s = wait_s - _CERTAIN * self._patience_s(needs.prefill_tokens, target_s)
        if late_s > 0:
            raise self._refusal(tenant, late_s)

    def _refusal(self, tenant: str, late_s: float) -> RefusedError:
        """The tenant's own fault where others are here too and it has more than its share of the house and the line."""
        retry_after_s = max(_RETRY_AFTER_S, late_s) * (0.75 + 0.5 * self._draw())
        present = self._inside_of.keys() | self._lines.keys() | {tenant}
        held = {each: self._inside_of[each] + len(self._lines.get(each, ())) for each in present}
        weights = sum(map(self.tenants.weight, present))
        share = sum(held.values()) * self.tenants.weight(tenant) / weights
        if len(present) > 1 and held[tenant] > share:
            message = "this tenant has more than its share under way; its next request would begin too late"
            return RefusedError(FailureCode.TENANT_LIMIT, message, retry_after_s)
        return RefusedError(FailureCode.OVERLOADED, "the request would begin too late", retry_after_s)
