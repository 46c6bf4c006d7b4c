"""The bounded queue of sequences that have no place in the batch yet, and the pace at which it moves.

Used by the scheduler. Sorted by `Sequence.order`: preempted sequences first, then by priority (low numbers first),
then first come, first served. Its head blocks those behind it, so that large requests are not passed over for ever.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Container

from penstock.workers.scheduler.events import RESERVE_WORK, SequenceKey
from penstock.workers.scheduler.sequence import Sequence

_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 60.0
_PACE_WEIGHT = 0.2  # of the newest interval in the moving average


class WaitingQueue:
    """Sequences in the order in which they will be admitted."""

    def __init__(self) -> None:
        self._entries: list[Sequence] = []
        self._earliest = math.inf  # no deadline in the queue is earlier
        self.prefill_tokens = 0  # context tokens that admitted sequences would have to compute

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, sequence: Sequence) -> None:
        """Stand in line."""
        if not self._entries or self._entries[-1].order < sequence.order:
            self._entries.append(sequence)
        else:
            bisect.insort(self._entries, sequence, key=_order)
        self.prefill_tokens += _tokens(sequence)
        if not sequence.started:
            self._earliest = min(self._earliest, sequence.deadline)

    def remove(self, sequence: Sequence) -> None:
        """Leave the line, from anywhere in it."""
        del self._entries[0 if self._entries[0] is sequence else self.position(sequence)]
        self.prefill_tokens -= _tokens(sequence)

    def position(self, sequence: Sequence) -> int:
        """How many stand before it."""
        return bisect.bisect_left(self._entries, sequence.order, key=_order)

    def first(self, blocked: Container[SequenceKey], *, plain: bool = False) -> Sequence | None:
        """The next one to admit, with `plain` the next without an adapter. Passed over are keys in `blocked`, an older
        use of which is still closing, and sequences that wait for somebody else."""
        for sequence in self._entries:
            if plain and sequence.adapted is not None:
                continue
            if sequence.key not in blocked and not sequence.awaits_others:
                return sequence
        return None

    def expired(self, now: float) -> list[Sequence]:
        """Those never admitted whose deadline has passed; they stay in line until removed."""
        if now < self._earliest:
            return []
        fresh = [sequence for sequence in self._entries if not sequence.started]
        self._earliest = min((s.deadline for s in fresh if s.deadline > now), default=math.inf)
        return [sequence for sequence in fresh if sequence.deadline <= now]

    @property
    def next_deadline(self) -> float | None:
        """No sequence in line expires before this time; None if none ever does."""
        return None if math.isinf(self._earliest) or not self._entries else self._earliest

    def entries(self) -> tuple[Sequence, ...]:
        """All of them, in order."""
        return tuple(self._entries)


class AdmissionPace:
    """Moving average of the seconds between admissions, for `Retry-After`."""

    def __init__(self) -> None:
        self._interval_s = 0.0
        self._last: float | None = None

    def note(self, now: float) -> None:
        """A sequence was admitted."""
        if self._last is not None:
            self._interval_s += _PACE_WEIGHT * (now - self._last - self._interval_s)
        self._last = now

    def wait_s(self, ahead: int) -> float:
        """Seconds until a queue of `ahead` has moved on, kept between one second and one minute."""
        return min(_MOST_RETRY_S, max(_LEAST_RETRY_S, ahead * self._interval_s))


def _order(sequence: Sequence) -> tuple[bool, int, int]:
    return sequence.order


def _tokens(sequence: Sequence) -> int:
    return 0 if sequence.work is RESERVE_WORK else len(sequence.context)
