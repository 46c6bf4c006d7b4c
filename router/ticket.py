"""One request at the gate, and what it needs of the fleet: plain state that the gate changes and the forecast reads.

Made by `router.py`, kept by `admission.py`. Knows neither workers nor other requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from penstock.router.emission import Emission
from penstock.workers.errors import RefusedError

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
    target_s: float | None = math.inf  # longest time to the first token that the caller asks for; None = any
    arrival: int = 0
    arrived_at: float = 0.0
    admitted: bool = False  # may go on to placement
    inside: bool = False  # its sequence and KV tokens count
    computing: bool = False  # its prefill tokens count
    kv_tokens: int = 0  # counted while inside
    charged: int = 0  # generated tokens charged so far
    promised: bool = False  # has waited so long that it is served, if it can be
    shed: RefusedError | None = None  # why it waits no longer

    def rank(self) -> tuple[int, int]:
        """Place within its tenant's line."""
        return (self.priority, self.arrival)

    @property
    def needs(self) -> Work:
        """What the fleet must have free for it."""
        return Work(1, self.prefill_tokens + self.growth, self.prefill_tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """What some requests hold, or will hold: places in batches, KV, prompt tokens still to be computed."""

    sequences: int = 0
    kv_tokens: int = 0
    prefill_tokens: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.sequences + other.sequences,
            self.kv_tokens + other.kv_tokens,
            self.prefill_tokens + other.prefill_tokens,
        )


def growth_of(remaining: int) -> int:
    """Output tokens whose KV counts at the gate: the start of a long answer, all of a short one."""
    return min(remaining, _GROWTH_TOKENS)
