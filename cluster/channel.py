"""One request's conversation with its workers over the links: `router/port.py`'s `Channel` on asyncio.

The request path (through `links.py`) opens one per request; `worker_link.py` delivers into it. Token rows go straight
into the emission, without an event or a wake-up of the request path; only what a decision hangs on becomes an event.
Must be used on one asyncio loop. Knows neither gRPC nor how workers are found.

Invariants: events come in the order in which the process learned of them; after `cancel(worker)` no event of that
worker comes; after `close` nothing of this request runs anywhere and no slot points here; `Ended` comes at most once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from penstock.router.emission import Emission, TokenLogprob
from penstock.router.port import Ended, Event, FirstToken, Lost, TimedOut
from penstock.workers.protocol import (
    Embedding,
    Failed,
    Generate,
    GenerateRequest,
    Grant,
    Granted,
    Move,
    Prefill,
    PromptLogprobs,
    Queued,
    Reserve,
    Started,
    Stays,
)

Finding = PromptLogprobs | Embedding
Answer = Queued | Granted | Started | Failed | Stays
Order = Reserve | Prefill | Generate | Move


class Phase(Enum):
    """What a slot stands for."""

    RESERVE = "reserve"
    PREFILL = "prefill"
    GENERATE = "generate"


class Post(Protocol):
    """What a channel needs of a link to one worker."""

    def occupy(self, seat: Seat) -> int:
        """A free slot, pointing to the seat from now on."""
        ...

    def post(self, order: Order) -> None: ...

    def vacate(self, seat: Seat, cancel: bool) -> None:
        """Free the slot; `cancel`: tell the worker to end what runs there."""
        ...


class Seat:
    """One slot on one link: which channel and attempt its messages belong to."""

    __slots__ = ("attempt", "channel", "emission", "phase", "post", "saw_token", "slot", "worker_id")

    def __init__(self, channel: RequestChannel, post: Post, worker_id: str, attempt: int, phase: Phase) -> None:
        self.channel = channel
        self.emission = channel.emission
        self.post = post
        self.worker_id = worker_id
        self.attempt = attempt
        self.phase = phase
        self.saw_token = False
        self.slot = post.occupy(self)

    def apply(
        self, start: int, tokens: Sequence[int], end: int, logprobs: Sequence[TokenLogprob] | None = None
    ) -> None:
        """One row of a token frame. Called per row of every step: as little as possible happens here."""
        completed = self.emission.apply(self.attempt, start, tokens, end, logprobs)
        if not self.saw_token:
            self.saw_token = True
            self.channel.first_row(self)
        if end:
            self.post.vacate(self, cancel=False)
        if completed:
            self.channel.push(self, Ended())

    def learn(self, finding: Finding) -> None:
        """What the worker found out about the prompt; it comes before the first token row."""
        if isinstance(finding, Embedding):
            self.emission.apply_embedding(self.attempt, finding.values)
        else:
            self.emission.apply_scores(finding)

    def answer(self, message: Answer) -> None:
        """Anything else that the worker says about the slot."""
        if isinstance(message, Failed):
            self.post.vacate(self, cancel=False)
            self.channel.leave(self)
        self.channel.push(self, message)

    def lost(self, reason: str) -> None:
        """The worker or its stream is gone; the link has dropped the slot already."""
        self.channel.leave(self)
        self.channel.push(self, Lost(reason))


class Posts(Protocol):
    """Who knows the way to a worker."""

    def post_to(self, worker_id: str) -> Post | None:
        """The link to an attached worker; None when there is none."""
        ...


class RequestChannel:
    """See `router/port.py:Channel`."""

    def __init__(self, posts: Posts, emission: Emission) -> None:
        self.emission = emission
        self._posts = posts
        self._seats: list[Seat] = []
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def reserve(self, worker_id: str, attempt: int, request: GenerateRequest) -> None:
        """Ask a decode worker for blocks."""
        if seat := self._sit(worker_id, attempt, Phase.RESERVE):
            seat.post.post(Reserve(seat.slot, attempt, request))

    def prefill(self, worker_id: str, attempt: int, request: GenerateRequest, grant: Grant | None) -> None:
        """Have the context computed and sent to the granter."""
        if seat := self._sit(worker_id, attempt, Phase.PREFILL):
            seat.post.post(Prefill(seat.slot, attempt, request, grant))

    def generate(self, worker_id: str, attempt: int, request: GenerateRequest) -> None:
        """Have everything done by one worker."""
        if seat := self._sit(worker_id, attempt, Phase.GENERATE):
            seat.post.post(Generate(seat.slot, attempt, request))

    def take_over(self, worker_id: str, attempt: int, request: GenerateRequest) -> None:
        """Ask a decode worker for blocks for a sequence that runs elsewhere."""
        if seat := self._sit(worker_id, attempt, Phase.RESERVE):
            seat.post.post(Reserve(seat.slot, attempt, request, takes_over=True))

    def move(self, worker_id: str, attempt: int, grant: Grant, emitted: int) -> None:
        """Have the worker hand the sequence over that decodes there."""
        for seat in self._seats:
            if seat.worker_id == worker_id and seat.attempt == attempt and seat.phase is not Phase.PREFILL:
                seat.post.post(Move(seat.slot, attempt, grant, emitted))

    def nudge(self) -> None:
        """Make a pending `next_event` return."""
        self._wake()

    def cancel(self, worker_id: str) -> None:
        """End what this request holds at the worker."""
        for seat in [seat for seat in self._seats if seat.worker_id == worker_id]:
            self._seats.remove(seat)
            seat.post.vacate(seat, cancel=True)
        if any(event.worker_id == worker_id for event in self._events):
            self._events = deque(event for event in self._events if event.worker_id != worker_id)

    async def next_event(self, timeout_s: float | None) -> Event:
        """The next event, or `TimedOut`."""
        if self._events:
            return self._events.popleft()
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(max(0.0, timeout_s), self._wake) if timeout_s is not None else None
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
        return self._events.popleft() if self._events else Event("", self.emission.attempt, TimedOut())

    def close(self) -> None:
        """Cancel at every worker that has not reported the end."""
        self._closed = True
        seats, self._seats = self._seats, []
        for seat in seats:
            seat.post.vacate(seat, cancel=True)
        self._events.clear()

    # --- called by seats ------------------------------------------------------------------------------------------

    def push(self, seat: Seat, body: Answer | FirstToken | Ended | Lost) -> None:
        """Queue an event and wake the request path."""
        self._queue(Event(seat.worker_id, seat.attempt, body))

    def first_row(self, seat: Seat) -> None:
        """The seat's first token row: prefill is done with its part, or decode has everything it waited for."""
        if seat.phase is Phase.PREFILL:
            self.push(seat, FirstToken())
        elif seat.phase is Phase.RESERVE:
            # Decode only starts when the transfer is complete, so nothing is left to cancel at the prefill worker.
            for done in [s for s in self._seats if s.phase is Phase.PREFILL and s.attempt == seat.attempt]:
                if done.saw_token:
                    self._seats.remove(done)
                    done.post.vacate(done, cancel=False)

    def leave(self, seat: Seat) -> None:
        """The seat's worker holds nothing for this request any more."""
        if seat in self._seats:
            self._seats.remove(seat)

    # --------------------------------------------------------------------------------------------------------------

    def _sit(self, worker_id: str, attempt: int, phase: Phase) -> Seat | None:
        post = None if self._closed else self._posts.post_to(worker_id)
        if post is None:
            self._queue(Event(worker_id, attempt, Lost("no stream to the worker")))
            return None
        seat = Seat(self, post, worker_id, attempt, phase)
        self._seats.append(seat)
        return seat

    def _queue(self, event: Event) -> None:
        if not self._closed:
            self._events.append(event)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
