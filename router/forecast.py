"""How long a request would wait for its turn: what stands before it in the fair order, over the fleet's pace.

Used by `admission.py` only, which refuses at once what could not begin in time. Two things are waited for, whichever
takes longer: a place (and KV room), which comes free as others end, and the prompts to be computed before.

The pace of places is measured while the house is full, as the share of the house that others give back per second;
before much was measured, answers are expected to take as many steps as the gate counts tokens of them, and before a
single step was measured nobody is refused for what nobody knows: who turns out to be late is shed later. Prompts are
computed at the rate that `capacity.py` derives. The order is the one of Virtual Token Counters (`tenants.py`), with
every waiting request's output expected as long as the gate counts it; that others will come who go before it is
reckoned with, too. Pure: the caller brings the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.router.capacity import Capacity
from penstock.router.settings import AdmissionSettings
from penstock.router.tenants import TenantCounters
from penstock.router.ticket import Ticket, Work

Lines = Mapping[str, Sequence[Ticket]]
_HALF_LIFE_S = 10.0  # of full time: how long what was measured counts
_PRIOR_S = 1.0  # of full time: weight of what is assumed before anything was measured


@dataclass(frozen=True, slots=True)
class House:
    """What is inside: what the fleet can hold, what it holds, and how fast that changes."""

    capacity: Capacity
    held: Work
    turns_per_s: float  # houses
    inside_of: Mapping[str, int]  # the sequences held, by tenant; none of them zero


class Turnover:
    """Share of the house that is given back per second while it is full."""

    def __init__(self) -> None:
        self._released = self._seconds = 0.0
        self._since: float | None = None  # full since, as far as not counted yet

    def note(self, full: bool, now: float) -> None:
        """The house is full, or not, from now on."""
        if self._since is not None:
            elapsed = max(0.0, now - self._since)
            keep = 0.5 ** (elapsed / _HALF_LIFE_S)
            self._released *= keep
            self._seconds = self._seconds * keep + elapsed
        self._since = now if full else None

    def released(self, share: float) -> None:
        """So much of the house became free."""
        if self._since is not None:
            self._released += share

    def per_s(self, assumed_s: float) -> float:
        """Houses per second; `assumed_s`: seconds for a whole turn, as far as it was not measured."""
        return (self._released + _PRIOR_S / assumed_s) / (self._seconds + _PRIOR_S)


class Forecast:
    """Waits of one router's gate."""

    def __init__(self, settings: AdmissionSettings, tenants: TenantCounters) -> None:
        self.turnover = Turnover()
        self._settings = settings
        self._tenants = tenants

    def turns_per_s(self, capacity: Capacity, inside: int, growth: int) -> float:
        """Houses per second; `growth`: output tokens that the gate counts of those inside."""
        step_s = capacity.base_s + capacity.row_s * inside / max(1, capacity.workers)
        assumed_s = growth / max(1, inside) * step_s
        return self.turnover.per_s(assumed_s) if assumed_s > 0 else math.inf

    def wait_s(self, capacity: Capacity, standing: Work, turns_per_s: float) -> float:
        """Seconds until somebody can begin behind all of `standing`, who is counted in it but for its prompt."""
        if capacity.places <= 0 or capacity.kv_tokens <= 0:
            return 0.0  # nobody can tell; how long that lasts is bounded elsewhere
        shortage = _shortage(capacity, standing)
        place_s = shortage / turns_per_s if shortage > 0 else 0.0
        return max(place_s, self.compute_s(capacity, standing.prefill_tokens))

    def compute_s(self, capacity: Capacity, tokens: int) -> float:
        """Seconds that the fleet takes for so many prompt tokens; 0 while unknown."""
        return tokens / capacity.prefill_per_s if capacity.prefill_per_s else 0.0

    def newcomer_wait_s(self, lines: Lines, house: House, tenant: str, rank: tuple[int, float], needs: Work) -> float:
        """Seconds until a request could begin that its tenant's line would have at this rank."""
        ahead, begins = self.ahead(lines, tenant, rank)
        standing = house.held + ahead + Work(needs.sequences, needs.kv_tokens, 0)
        turns_per_s = house.turns_per_s
        if _shortage(house.capacity, standing) > 0:
            nexts = ((each, count) for each, count in self._nexts(lines, house) if each < begins)
            turns_per_s *= self._share_left(house, tenant, sum(count for _, count in nexts), self._weight(house))
        return self.wait_s(house.capacity, standing, turns_per_s)

    def waits_s(self, lines: Lines, house: House) -> list[tuple[Ticket, float]]:
        """Everybody who waits, in the order in which they would come in, and the seconds until then."""
        standing, overtaking, waits, weight = house.held, 0, [], self._weight(house)
        nexts = sorted(self._nexts(lines, house), reverse=True)
        for begins, ticket in self.order(lines):
            standing += ticket.needs
            without_own = Work(standing.sequences, standing.kv_tokens, standing.prefill_tokens - ticket.prefill_tokens)
            while nexts and nexts[-1][0] < begins:
                overtaking += nexts.pop()[1]
            turns_per_s = house.turns_per_s * self._share_left(house, ticket.tenant, overtaking, weight)
            waits.append((ticket, self.wait_s(house.capacity, without_own, turns_per_s)))
        return waits

    def ahead(self, lines: Lines, tenant: str, rank: tuple[int, float]) -> tuple[Work, float]:
        """What of all lines goes before a request that its tenant's line would have at this rank.

        And the counter at which its turn comes.
        """
        ahead, start = Work(), self._tenants.joining(tenant, lines)
        for ticket in lines.get(tenant, ()):
            if ticket.rank() >= rank:
                break
            ahead += ticket.needs
            start += self._price(ticket)
        for other, line in lines.items():
            begins = self._tenants.service(other)
            for ticket in line if other != tenant else ():
                if begins > start:
                    break
                ahead += ticket.needs
                begins += self._price(ticket)
        return ahead, start

    def order(self, lines: Lines) -> list[tuple[float, Ticket]]:
        """Everybody who waits, as they would come in if nobody else came, each behind the counter of its turn."""
        keyed: list[tuple[float, int, Ticket]] = []
        for tenant, line in lines.items():
            begins = self._tenants.service(tenant)
            for ticket in line:
                keyed.append((begins, ticket.arrival, ticket))
                begins += self._price(ticket)
        return [(begins, ticket) for begins, _, ticket in sorted(keyed, key=lambda entry: entry[:2])]

    def _nexts(self, lines: Lines, house: House) -> list[tuple[float, int]]:
        """For each tenant inside the counter at which its next request would have its turn, and the places it holds."""
        floor = self._tenants.floor(lines)
        nexts = []
        for tenant, held in house.inside_of.items():
            line = lines.get(tenant, ())
            begins = self._tenants.service(tenant) + sum(map(self._price, line))
            nexts.append((begins if line else max(floor, begins), held))
        return nexts

    def _share_left(self, house: House, tenant: str, overtaking: int, weight: float) -> float:
        """Of the places that come free, what requests to come leave to a tenant's request that waits.

        Tenants whose next requests come before it go on to take as many places as they hold now (`overtaking`); but at
        least the tenant's fair share is left. `weight`: of all tenants inside.
        """
        own = self._tenants.weight(tenant)
        everybody = weight if tenant in house.inside_of else weight + own
        return max(1.0 - overtaking / max(1, house.held.sequences), own / everybody)

    def _weight(self, house: House) -> float:
        return sum(map(self._tenants.weight, house.inside_of))

    def _price(self, ticket: Ticket) -> float:
        settings = self._settings
        tokens = settings.input_weight * ticket.prefill_tokens + settings.output_weight * ticket.growth
        return self._tenants.price(ticket.tenant, tokens)


def _shortage(capacity: Capacity, standing: Work) -> float:
    """Houses that `standing` needs more than there are; 0 where nobody can tell."""
    if capacity.places <= 0 or capacity.kv_tokens <= 0:
        return 0.0
    return max(standing.sequences / capacity.places, standing.kv_tokens / capacity.kv_tokens) - 1.0
