"""Faults that tests put into the transfer on purpose; production passes none, and the check for none is all it costs.

Used by `sender.py` and `receiver.py` through `TransferEngine(faults=...)`. Fragments are counted by their index in
their session.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field


def kill_this_process() -> None:
    """Die as `kill -9` does: no clean-up, no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(slots=True)
class TransferFaults:
    """What to break, on the side that holds this object. `fired` proves that it happened."""

    drop: frozenset[int] = frozenset()  # sender: say these were sent, do not send them
    duplicate: frozenset[int] = frozenset()  # sender: send these twice
    corrupt: frozenset[int] = frozenset()  # receiver: flip one byte before the digest is checked
    times: int = 1 << 30  # how often drop, duplicate and corrupt fire in all
    delay_send_s: float = 0.0  # sender: stall before each frame of blocks
    delay_landing_s: float = 0.0  # receiver: stall before each frame's blocks are read
    die_after: int | None = None  # sender: die once so many fragments have left
    die: Callable[[], None] = kill_this_process
    fired: dict[str, int] = field(default_factory=dict)
    _sent: int = 0

    def hits(self, kind: str, fragment: int) -> bool:
        """True when fault `kind` (drop, duplicate, corrupt) is to happen to this fragment now."""
        if fragment not in getattr(self, kind) or sum(self.fired.values()) >= self.times:
            return False
        self.fired[kind] = self.fired.get(kind, 0) + 1
        return True

    def choose(self, batch: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The (fragment, block) pairs that really leave."""
        chosen = [pair for pair in batch if not self.hits("drop", pair[0])]
        return chosen + [pair for pair in chosen if self.hits("duplicate", pair[0])]

    def stall(self, seconds: float) -> None:
        """Stop this side's transfer thread, as a stopped process would."""
        if seconds:
            time.sleep(seconds)

    def room(self, limit: int) -> int:
        """How many of `limit` fragments may leave before the process dies."""
        return limit if self.die_after is None else max(1, min(limit, self.die_after - self._sent))

    def left(self, count: int) -> None:
        """`count` fragments have left for good."""
        self._sent += count
        if self.die_after is not None and self._sent >= self.die_after:
            self.fired["die"] = 1
            self.die()
