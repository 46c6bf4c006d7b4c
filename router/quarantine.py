"""Workers whose KV comes damaged again and again: for a while they compute no prompts for others.

Held by `fleet.py`; `attempts.py` tells it of mismatches that are not the receiver's fault, `placement.py` asks it.
Memory, a card or the program is at fault then, and what is not sampled may be wrong as well. Successes between count
for nothing, and a stream that breaks does not end it. Pure: the caller brings the time.

Invariant: of a worker fewer moments are held than put it there, and none for longer than the window.
"""

from __future__ import annotations

from penstock.router.settings import HealthSettings


class Quarantine:
    """Who is in it, and who may come to be."""

    def __init__(self, settings: HealthSettings) -> None:
        self._limit = settings.quarantine_mismatches
        self._window_s = settings.quarantine_window_s
        self._for_s = settings.breaker_max_s
        self._seen: dict[str, list[float]] = {}
        self._until: dict[str, float] = {}

    def holds(self, worker_id: str, now: float) -> bool:
        """True while it is to compute no prompts of others."""
        return now < self._until.get(worker_id, now)

    def mismatched(self, worker_id: str, now: float) -> bool:
        """Blocks it sent were damaged. True when that puts it into quarantine."""
        self._until = {name: until for name, until in self._until.items() if until > now}
        recent = {name: [at for at in times if now - at < self._window_s] for name, times in self._seen.items()}
        self._seen = {name: times for name, times in recent.items() if times}
        if worker_id in self._until:  # of an attempt that was under way
            return False
        times = self._seen.setdefault(worker_id, [])
        times.append(now)
        if len(times) < self._limit:
            return False
        del self._seen[worker_id]
        self._until[worker_id] = now + self._for_s
        return True
