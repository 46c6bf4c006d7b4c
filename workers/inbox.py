"""What reaches the engine from other threads: routers' messages and news about their streams, in order.

`service.py` puts in, `engine.py` takes out on its own thread. Bounded for requests, so that a stuck step does not
gather work without end; what ends or renews work always gets in.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from penstock.workers.audit import EngineAccount
from penstock.workers.protocol import Generate, Prefill, Reserve, ToWorker

MAX_INBOX = 1 << 16


@dataclass(frozen=True, slots=True)
class Attached:
    """A router's stream is open; its lease begins."""

    lease_s: float


@dataclass(frozen=True, slots=True)
class Detached:
    """A router's stream is over: whatever it asked for ends."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new work."""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Answer with what the engine has and holds."""

    answer: Future[EngineAccount]
    ended_after: int  # see `AuditLog.page`


Post = ToWorker | Attached | Detached | Drain | Inspect


class Inbox:
    """Thread-safe; `awake` is set whenever something comes."""

    def __init__(self, awake: threading.Event) -> None:
        self._awake = awake
        self._posts: deque[tuple[str, Post, float]] = deque()

    def put(self, router_id: str, message: Post, now: float) -> bool:
        """Hand in a message; False when the inbox is full, which holds for requests only."""
        if len(self._posts) >= MAX_INBOX and isinstance(message, Reserve | Prefill | Generate):
            return False
        self._posts.append((router_id, message, now))
        if not self._awake.is_set():  # asking is cheap; whoever clears it looks here afterwards
            self._awake.set()
        return True

    def take(self) -> tuple[str, Post, float] | None:
        """The oldest message and when it came, None when there is none. One reader only."""
        return self._posts.popleft() if self._posts else None
