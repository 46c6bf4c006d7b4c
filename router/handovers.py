"""Prompts whose KV is on its way from prefill to decode at this moment, so that requests with the same prompt wait
the few milliseconds until they can use it (the further choices of `n` > 1 come exactly then).

Used by `attempts.py` only. Keyed by the digest of a prompt's last full block, which stands for the whole chain.
Pure: the caller brings the time. Bounded by the requests in flight; an entry no one finishes expires.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class _Handover:
    until: float
    wakes: list[Callable[[], None]] = field(default_factory=list)


class Handovers:
    """Prompts in transit."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._on_way: dict[int, _Handover] = {}

    def __len__(self) -> int:
        return len(self._on_way)

    def begin(self, digests: NDArray[np.uint64], now: float) -> None:
        """The prompt's KV leaves the prefill worker."""
        if len(digests):
            self._on_way.setdefault(int(digests[-1]), _Handover(now + self._wait_s))

    def done(self, digests: NDArray[np.uint64]) -> None:
        """The decode worker has it (or never will): wake who waits."""
        if len(digests):
            handover = self._on_way.pop(int(digests[-1]), None)
            for wake in handover.wakes if handover is not None else ():
                wake()

    def wait(self, digests: NDArray[np.uint64], wake: Callable[[], None], now: float) -> float:
        """Seconds a request with this prompt should wait at most, mostly 0; `wake` is called when it is there."""
        handover = self._on_way.get(int(digests[-1])) if len(digests) else None
        if handover is None:
            return 0.0
        if now >= handover.until:
            self.done(digests)
            return 0.0
        if wake not in handover.wakes:
            handover.wakes.append(wake)
        return handover.until - now
