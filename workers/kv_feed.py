"""Tells every router what the prefix cache stores and evicts, numbered so that a reader notices a gap.

Used by `engine.py`, on its thread only. Events are collected for a few milliseconds, so that a busy step loop sends
tens of messages a second and not hundreds; the cache's own buffer holds a digest at most once, so it stays bounded.
"""

from __future__ import annotations

from typing import Protocol

from penstock.workers import fault_points
from penstock.workers.fault_points import Point
from penstock.workers.protocol import KVEvents, KVSnapshot, ToRouter

_COLLECT_S = 0.02


class Reporter(Protocol):
    """Takes messages for routers, from any thread; never waits. Unknown routers are ignored."""

    def send(self, router_id: str, message: ToRouter) -> None: ...

    def broadcast(self, message: ToRouter) -> None: ...

    def cut(self, router_id: str) -> None:
        """End the router's stream: its lease is over."""
        ...


class CacheEvents(Protocol):
    """What is asked of a prefix cache, or of several as one."""

    @property
    def many_events(self) -> bool: ...

    def take_events(self) -> tuple[bytes, bytes]: ...

    def snapshot(self) -> bytes: ...


class KVEventFeed:
    """The sequence of `KVEvents` of one worker. Without a cache it says that nothing is cached."""

    def __init__(self, cache: CacheEvents | None, reporter: Reporter) -> None:
        self._cache = cache
        self._reporter = reporter
        self._sequence = 0
        self._next_flush = 0.0

    def flush(self, now: float, *, idle: bool) -> None:
        """Send what has gathered: now if the step loop is idle or it is much, else once per collecting interval."""
        if not idle and now < self._next_flush and not (self._cache is not None and self._cache.many_events):
            return
        self._next_flush = now + _COLLECT_S
        self._send_events()

    def snapshot(self, router_id: str) -> None:
        """Answer a router that lost count: the gathered events first, then the whole cache."""
        if self._cache is not None:
            self._send_events()
        digests = b"" if self._cache is None else self._cache.snapshot()
        self._reporter.send(router_id, KVSnapshot(self._sequence, digests))

    def _send_events(self) -> None:
        stored, evicted = self._cache.take_events() if self._cache is not None else (b"", b"")
        if stored or evicted:
            self._sequence += 1
            for _ in range(fault_points.times(Point.KV_PUBLISH, "")):
                self._reporter.broadcast(KVEvents(self._sequence, stored, evicted))
