"""Which prefill worker cannot hand over to which decode worker at the moment, and who of the two is to blame.

Held by `fleet.py`; `attempts.py` tells it how hand-overs end, `placement.py` asks it. A failed transfer says nothing of
who is at fault: the way between the two may be cut while both serve well with others. So it counts against the pair,
and against a worker only once it fails with more than one partner. Pure: the caller brings the time.

Invariant: only pairs are held whose last hand-over failed, of workers that are there.
"""

from __future__ import annotations

from penstock.router.breaker import Breaker
from penstock.router.settings import HealthSettings


class Pairs:
    """A breaker for every pair that fails."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._breakers: dict[tuple[str, str], Breaker] = {}

    def __len__(self) -> int:
        return len(self._breakers)

    def closed(self, prefill: str, decode: str, now: float) -> bool:
        """True when a hand-over may be tried."""
        breaker = self._breakers.get((prefill, decode))
        return breaker is None or breaker.closed(now)

    def tried(self, prefill: str, decode: str, now: float) -> None:
        """A hand-over is tried; after a pause it is the trial."""
        breaker = self._breakers.get((prefill, decode))
        if breaker is not None:
            breaker.tried(now)

    def succeeded(self, prefill: str, decode: str) -> None:
        """The KV went over."""
        self._breakers.pop((prefill, decode), None)

    def failed(self, prefill: str, decode: str, now: float) -> list[str]:
        """It did not. Returns those of the two that fail with others, too."""
        breaker = self._breakers.get((prefill, decode))
        if breaker is None:
            settings = self._settings
            breaker = Breaker(settings.breaker_failures, settings.breaker_open_s, settings.breaker_max_s)
            self._breakers[prefill, decode] = breaker
        breaker.failed(now)
        others = [pair for pair in self._breakers if pair != (prefill, decode)]
        return [worker for worker in (prefill, decode) if any(worker in pair for pair in others)]

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        self._breakers = {pair: breaker for pair, breaker in self._breakers.items() if worker_id not in pair}
