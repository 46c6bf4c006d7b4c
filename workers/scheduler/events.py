"""What the scheduler is told and what it answers, apart from plans: keys, kinds of work, events, outcomes, figures.

Plain values. The engine (`workers/engine.py`) turns events and outcomes into protocol messages and transfer calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.workers.protocol import EndReason, FailureCode, Tokens
from penstock.workers.scheduler.plan import SampledLogprobs

I32 = NDArray[np.int32]


class SequenceKey(NamedTuple):
    """One attempt of one request, as its router names it."""

    router_id: str
    slot: int
    attempt: int


class Work(Enum):
    """What a router asks for. The names are the protocol's messages."""

    RESERVE = auto()  # hold blocks and a place; the KV comes from a peer, then decode
    PREFILL = auto()  # compute the context's KV and one token
    GENERATE = auto()  # both phases here


# Looking up an enum's member takes longer than most of what is asked by it: plain names for what every request meets.
RESERVE_WORK, PREFILL_WORK, GENERATE_WORK = Work


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """Sent once for a request that could not be admitted at once; `position` requests stand before it."""

    key: SequenceKey
    position: int


@dataclass(frozen=True, slots=True)
class GrantedEvent:
    """A RESERVE holds its blocks: context block i will land in `blocks[i - first_block]`, those before are here."""

    key: SequenceKey
    first_block: int
    blocks: Tokens
    generations: tuple[int, ...]
    cached_tokens: int
    bank: int = 0  # in which the blocks lie


@dataclass(frozen=True, slots=True)
class StartedEvent:
    """The context's computation begins; sent at the first admission only, not after a preemption."""

    key: SequenceKey
    cached_tokens: int
    context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RefusedEvent:
    """The key is over without an end: never admitted, or its transfer failed. Nothing is running for it any more."""

    key: SequenceKey
    code: FailureCode
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class PreemptedEvent:
    """The sequence gave its blocks back and waits at the queue's front; it goes on by itself."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class EndedEvent:
    """The tokens that arrived with the KV already ended the choice; the first is its `start`-th generated token."""

    key: SequenceKey
    start: int
    tokens: Tokens
    end: EndReason


@dataclass(frozen=True, slots=True)
class TakenOverEvent:
    """A sequence that ran elsewhere goes on here; these are its tokens that the request did not have."""

    key: SequenceKey
    start: int
    tokens: Tokens
    end: EndReason = EndReason.NONE


@dataclass(frozen=True, slots=True)
class StaysEvent:
    """The move of a running sequence came to nothing: it goes on here."""

    key: SequenceKey
    reason: str


SchedulerEvent = (
    QueuedEvent | GrantedEvent | StartedEvent | RefusedEvent | PreemptedEvent | EndedEvent | TakenOverEvent | StaysEvent
)


class SentTail(NamedTuple):
    """A sending prefill is done: `first_token` goes with its KV, unless `end` says that the choice is over."""

    key: SequenceKey
    first_token: int
    end: EndReason


class Offer(NamedTuple):
    """Newly complete blocks of a sending prefill, as (fragment index, block) pairs."""

    key: SequenceKey
    fragments: list[tuple[int, int]]


class ScoredChunk(NamedTuple):
    """Logprobs of prompt tokens from `start` on, one entry each."""

    key: SequenceKey
    start: int
    scores: SampledLogprobs


class EmbeddedPrompt(NamedTuple):
    """The hidden state of a prompt's last token, float32 [hidden size]."""

    key: SequenceKey
    values: NDArray[np.float32]


@dataclass(slots=True, eq=False)  # not frozen: that would triple what every step pays for making one
class StepOutcome:
    """What a committed step means for the routers, as columns over its S sampled rows, and for the transfers.

    Row r gives `tokens[r]` as the `starts[r]`-th generated token (0-based, earlier attempts' tokens included) of the
    request that router `router_ids[router_index[r]]` calls (`slots[r]`, `attempts[r]`).
    """

    router_ids: tuple[str, ...]
    router_index: I32  # [S]
    slots: NDArray[np.uint32]  # [S] the routers' slots
    attempts: NDArray[np.uint16]  # [S]
    starts: NDArray[np.uint32]  # [S]
    tokens: I32  # [S]
    ends: NDArray[np.uint8]  # [S] EndReason
    logprobs: SampledLogprobs | None = None
    offers: list[Offer] = field(default_factory=list)
    sent_tails: list[SentTail] = field(default_factory=list)
    scored: list[ScoredChunk] = field(default_factory=list)
    embedded: list[EmbeddedPrompt] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Figures for the heartbeat."""

    running: int  # sequences with a place in the batch, reserved ones included
    reserved: int  # of these, waiting for their KV
    sending: int  # prefilled, their blocks still being read by a peer
    waiting: int
    queued_prefill_tokens: int  # context tokens still to be computed, running and waiting
    free_blocks: int
    cached_blocks: int
    quarantined_blocks: int
    lost_blocks: int  # of banks that are gone; none of the other figures of blocks counts them
    preemptions: int
    draining: bool
