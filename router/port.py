"""What the life of a request needs from the outside: a clock, channels to workers, and one thing to await.

`request_path.py` awaits only these. `cluster/` implements them over asyncio and gRPC, the simulator over a virtual
clock. Nothing here is called per token: token rows go from the worker's link straight into the channel's `Emission`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from penstock.router.emission import Emission
from penstock.workers.protocol import Failed, GenerateRequest, Grant, Granted, Queued, Started, Stays


@dataclass(frozen=True, slots=True)
class Ended:
    """The emission saw its end row; nothing more will come."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The prefill worker's token row arrived (once per attempt, split requests only)."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker died, its stream broke, or it stopped making progress."""

    reason: str


@dataclass(frozen=True, slots=True)
class TimedOut:
    """Nothing arrived within the time the caller was ready to wait."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that concerns the request, said by `worker_id` (empty for `TimedOut`) about `attempt`."""

    worker_id: str
    attempt: int
    body: Queued | Granted | Started | Failed | Stays | FirstToken | Ended | Lost | TimedOut


class Channel(Protocol):
    """One request's conversation with however many workers it takes. Events come in order, from all of them."""

    def reserve(self, worker_id: str, attempt: int, request: GenerateRequest) -> None: ...

    def prefill(self, worker_id: str, attempt: int, request: GenerateRequest, grant: Grant | None) -> None: ...

    def generate(self, worker_id: str, attempt: int, request: GenerateRequest) -> None: ...

    def take_over(self, worker_id: str, attempt: int, request: GenerateRequest) -> None:
        """As `reserve`, for a sequence that runs elsewhere."""
        ...

    def move(self, worker_id: str, attempt: int, grant: Grant, emitted: int) -> None:
        """Have the sequence that decodes there go on at the granter, whose request has `emitted` generated tokens."""
        ...

    def nudge(self) -> None:
        """Make a pending `next_event` return `TimedOut`."""
        ...

    def cancel(self, worker_id: str) -> None:
        """End what this request holds at the worker and free the slot; later events from it are dropped."""
        ...

    async def next_event(self, timeout_s: float | None) -> Event:
        """The next event, or `TimedOut`. Sending to a lost worker is not an error: `Lost` is the next event."""
        ...

    def close(self) -> None:
        """Cancel at every worker that has not reported the end."""
        ...


class Signal(Protocol):
    """One waiting request's alarm: something it waits for may have changed. Set from the same thread that waits."""

    def set(self) -> None:
        """Wake the waiter; remembered until the next `wait` returns, so that none is lost."""
        ...

    async def wait(self, timeout_s: float) -> bool:
        """True when set (and cleared again by that), False after `timeout_s`."""
        ...


class Port(Protocol):
    """The world as one request path sees it."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def signal(self) -> Signal: ...

    def open_channel(self, emission: Emission) -> Channel: ...
