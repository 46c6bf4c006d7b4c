"""Whether a request kills the workers that compute it: their deaths in a row, and which of them were none.

Kept by `journey.py` for each request, asked by `attempts.py`: some deaths make a suspect, which then runs alone, and
one more condemns it. Losing sight of a worker is first taken for its death; it was none where the same incarnation is
back. Pure: knows neither workers nor clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MOST_FORGIVEN = 4  # losses of workers that came back: what silences one after another is to be stopped, too


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that was lost while it computed the request."""

    worker_id: str
    incarnation: int
    at: float


class Suspicion:
    """Of one request."""

    def __init__(self, suspect_after: int) -> None:
        """`suspect_after`: deaths in a row, without progress between them."""
        self.deaths: list[Death] = []
        self._suspect_after = suspect_after
        self._forgiven = 0

    @property
    def suspect(self) -> bool:
        """True when the next attempt must run alone."""
        return len(self.deaths) >= self._suspect_after

    @property
    def condemned(self) -> bool:
        """True when a worker died of it though it ran alone."""
        return len(self.deaths) > self._suspect_after

    def note(self, death: Death) -> None:
        """A worker was lost that may have been computing it."""
        self.deaths.append(death)

    def acquit(self) -> None:
        """It got past the point where workers died."""
        self.deaths.clear()
        self._forgiven = 0

    def forgive(self, lives: Callable[[str, int], bool]) -> None:
        """Strike out deaths of workers that live, by id, in the same incarnation."""
        for death in list(self.deaths):
            if self._forgiven < _MOST_FORGIVEN and lives(death.worker_id, death.incarnation):
                self.deaths.remove(death)
                self._forgiven += 1
