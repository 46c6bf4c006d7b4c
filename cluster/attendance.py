"""Who keeps a cluster alive: the launcher, or the ingress replicas of a Serve application, each under a lease.

The controller notes every sign of life here and asks who is left. Pure; the caller brings the time. Under `penstock
serve` only the launcher counts; under `serve run` and `serve deploy` any living ingress replica does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attendant:
    """One ingress replica as it introduces itself with every call."""

    attendant_id: str
    edition: str  # of the workers it links to
    url: str = ""  # its own listener; empty = reached through Serve's proxies only
    models: tuple[str, ...] = ()
    needs_key: bool = False


class Attendance:
    """Signs of life of the attendants of one cluster."""

    def __init__(self, lease_s: float, now: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, tuple[Attendant, float]] = {}
        self._last = now  # somebody is about to come when a controller starts
        self._released: set[str] = set()  # editions whose last attendant said goodbye

    @property
    def present(self) -> list[Attendant]:
        """Everybody whose lease runs, oldest first."""
        return [attendant for attendant, _ in self._seen.values()]

    def enter(self, attendant: Attendant, now: float) -> None:
        """A sign of life."""
        self._seen[attendant.attendant_id] = (attendant, now)
        self._released.discard(attendant.edition)
        self._last = now

    def leave(self, attendant_id: str) -> None:
        """An orderly goodbye."""
        found = self._seen.pop(attendant_id, None)
        if found is not None and found[0].edition not in self.editions():
            self._released.add(found[0].edition)

    def expire(self, now: float) -> None:
        """Forget those whose lease is over."""
        for attendant_id, (attendant, seen) in list(self._seen.items()):
            if now - seen > self._lease_s:
                del self._seen[attendant_id]
                if attendant.edition not in self.editions():
                    self._released.add(attendant.edition)

    def overdue(self, now: float) -> bool:
        """Somebody, or everybody, has been silent for longer than the lease."""
        seen = [last for _, last in self._seen.values()] or [self._last]
        return now - min(seen) > self._lease_s

    def excuse(self, now: float) -> None:
        """Nobody could have given a sign of life: all leases begin anew."""
        self._seen = {each: (attendant, now) for each, (attendant, _) in self._seen.items()}
        self._last = now

    def editions(self) -> set[str]:
        """Editions that somebody attends."""
        return {attendant.edition for attendant, _ in self._seen.values()}

    def abandoned(self) -> set[str]:
        """Editions that were attended and are no longer, while another one is."""
        return set(self._released) if self._seen else set()

    def forget(self, edition: str) -> None:
        """The edition has been dropped."""
        self._released.discard(edition)

    def silent_s(self, now: float) -> float:
        """Seconds since anybody gave a sign of life; 0 while somebody is present."""
        return 0.0 if self._seen else now - self._last
