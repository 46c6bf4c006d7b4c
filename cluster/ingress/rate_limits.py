"""How much one key may ask for: open requests, requests per minute, tokens per minute.

`keys.py` gives every key one `Account`; all fronts of a process share it. Clocks are passed in. State is three
numbers per key, so it is bounded by the number of keys.

Rates are token buckets that hold one minute's worth. A request is let in when the bucket holds its prompt (or is
full, for a prompt larger than the bucket); the tokens it generates are taken when they are there, so a bucket may
owe. While it owes, nobody is let in.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.key_file import KeyEntry

BUSY_RETRY_S = 1.0
Clock = Callable[[], float]


class TokenBucket:
    """`capacity` fills up again within a minute. Invariant: the level is never above the capacity."""

    __slots__ = ("_at", "_capacity", "_level")

    def __init__(self, capacity: float, now: float) -> None:
        self._capacity = self._level = capacity
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` could be taken; 0 when it can be now. Never more than it takes to be full."""
        self._refill(now)
        missing = min(amount, self._capacity) - self._level
        return max(0.0, missing * 60.0 / self._capacity)

    def take(self, amount: float, now: float) -> None:
        """Take without asking; the bucket may owe afterwards."""
        self._refill(now)
        self._level -= amount

    def _refill(self, now: float) -> None:
        self._level = min(self._capacity, self._level + max(0.0, now - self._at) * self._capacity / 60.0)
        self._at = max(self._at, now)


class Account:
    """The use one key makes of this process. `share`: this process's part of the limits, 1 / number of ingresses;
    `most_open`: open requests that the process grants one key, whatever the key's own limit."""

    __slots__ = ("_clock", "_max_open", "_open", "_requests", "_tokens")

    def __init__(self, entry: KeyEntry, clock: Clock, share: float = 1.0, most_open: int | None = None) -> None:
        now = clock()
        self._clock = clock
        self._open = 0
        stated = entry.max_open_requests
        own = None if stated is None else max(1, round(stated * share))
        self._max_open = min((each for each in (own, most_open) if each is not None), default=None)
        self._requests = _bucket(entry.requests_per_minute, share, now)
        self._tokens = _bucket(entry.tokens_per_minute, share, now)

    @property
    def open_requests(self) -> int:
        """Leases that have not ended."""
        return self._open

    def lease(self) -> Lease:
        """Begin one request. Raises HttpProblem 429 with Retry-After; leave the lease's `with` block to end it."""
        if self._max_open is not None and self._open >= self._max_open:
            raise _over(f"this key has {self._open} requests open, its limit", "concurrency_limit", BUSY_RETRY_S)
        now = self._clock()
        if self._requests is not None:
            wait = self._requests.wait_s(1, now)
            if wait:
                raise _over("this key is over its requests per minute", "requests_per_minute", wait)
            self._requests.take(1, now)
        self._open += 1
        return Lease(self)

    def charge_prompt(self, tokens: int) -> None:
        """Before any work is done for a prompt. Raises HttpProblem 429."""
        if self._tokens is None:
            return
        now = self._clock()
        wait = self._tokens.wait_s(max(1, tokens), now)
        if wait:
            raise _over("this key is over its tokens per minute", "tokens_per_minute", wait)
        self._tokens.take(tokens, now)

    def charge_generated(self, tokens: int) -> None:
        """What was generated; never refused any more."""
        if self._tokens is not None:
            self._tokens.take(tokens, self._clock())

    def end(self) -> None:
        """One lease has ended; called by the lease."""
        self._open -= 1


class Lease:
    """One request of a key while it is open. A context manager."""

    __slots__ = ("_account", "_ended")

    def __init__(self, account: Account) -> None:
        self._account = account
        self._ended = False

    def charge_prompt(self, tokens: int) -> None:
        """See `Account.charge_prompt`."""
        self._account.charge_prompt(tokens)

    def charge_generated(self, tokens: int) -> None:
        """See `Account.charge_generated`."""
        self._account.charge_generated(tokens)

    def end(self) -> None:
        """Give the place back; again is harmless."""
        if not self._ended:
            self._ended = True
            self._account.end()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()


def _bucket(per_minute: int | None, share: float, now: float) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(max(1.0, per_minute * share), now)


def _over(message: str, code: str, wait_s: float) -> HttpProblem:
    return HttpProblem(429, "rate_limit_exceeded", message, code=code, retry_after_s=wait_s)
