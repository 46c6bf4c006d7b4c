"""What waits to be sent to one router: pushed by the engine and heartbeat threads, taken by the RPC thread.

Knows the order rules: messages leave as they came, but token frames that wait side by side for a slow reader become
one, and of several heartbeats only the newest leaves. No frame is merged over anything else, so what was said of a
prompt stays before its first token. Bounded: a reader too far behind is cut off, never buffered without end.

Invariant: after an overflow or `close` the outbox is empty and stays so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from penstock.workers.frames import merge_frames
from penstock.workers.protocol import (
    WIRE_VERSION,
    Embedding,
    KVEvents,
    KVSnapshot,
    Load,
    PromptLogprobs,
    TokenFrame,
    ToRouter,
)
from penstock.workers.wire import encode

MAX_PENDING_BYTES = 32 << 20
_MAX_FRAME_TOKENS = 1 << 16  # of a merged frame
_SMALL = 256  # bytes counted for a message without a payload


class Outbox:
    """Thread-safe. `notify` is called, from the pushing thread, when something waits after nothing did, and at the
    end, even if what waited was never taken."""

    def __init__(
        self, notify: Callable[[], None], max_bytes: int = MAX_PENDING_BYTES, version: int = WIRE_VERSION
    ) -> None:
        self._notify = notify
        self._version = version  # of the wire, that the router speaks
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pending: list[ToRouter] = []
        self._bytes = 0
        self._notified = False
        self.closed = False
        self.overflowed = False

    def push(self, message: ToRouter) -> None:
        """Append a message; dropped once the outbox is closed."""
        size = _size(message)
        with self._lock:
            if self.closed:
                return
            self._pending.append(message)
            self._bytes += size
            if self._bytes > self._max_bytes:
                self.overflowed = True
                self._close()
            notify, self._notified = self.closed or not self._notified, True
        if notify:
            self._notify()

    def close(self) -> None:
        """Drop what waits and take nothing more."""
        with self._lock:
            self._close()
        self._notify()

    def take(self) -> list[bytes]:
        """Everything that waits, merged and encoded."""
        with self._lock:
            taken, self._pending = self._pending, []
            self._bytes = 0
            self._notified = False
        return [encode(message, self._version) for message in _merged(taken)]

    def _close(self) -> None:
        self.closed = True
        self._pending = []
        self._bytes = 0


_PAYLOADS: dict[type, Callable[[Any], int]] = {
    TokenFrame: lambda frame: 17 * len(frame.slots) + 5 * len(frame.logprobs) + 8 * len(frame.top_ids),
    PromptLogprobs: lambda message: 5 * len(message.logprobs) + 8 * len(message.top_ids),
    Embedding: lambda message: 4 * len(message.values),
    KVEvents: lambda message: len(message.stored) + len(message.evicted),
    KVSnapshot: lambda message: len(message.digests),
}


def _size(message: ToRouter) -> int:
    payload = _PAYLOADS.get(type(message))
    return _SMALL if payload is None else _SMALL + payload(message)


def _merged(messages: list[ToRouter]) -> list[ToRouter]:
    kinds = [type(message) for message in messages]
    if kinds.count(TokenFrame) < 2 and kinds.count(Load) < 2:
        return messages
    newest_load = next((message for message in reversed(messages) if isinstance(message, Load)), None)
    merged: list[ToRouter] = []
    run: list[TokenFrame] = []
    tokens = 0
    for message in messages:
        if isinstance(message, Load) and message is not newest_load:
            continue
        if isinstance(message, TokenFrame) and tokens + len(message.tokens) <= _MAX_FRAME_TOKENS:
            run.append(message)
            tokens += len(message.tokens)
            continue
        if run:
            merged.append(merge_frames(run))
            run, tokens = [], 0
        if isinstance(message, TokenFrame):
            run, tokens = [message], len(message.tokens)
        else:
            merged.append(message)
    if run:
        merged.append(merge_frames(run))
    return merged
