"""One request as its worker keeps it from submission to its end; made and changed by the scheduler only.

Holds what is needed when a sequence starts, waits, is preempted or fills a block. What every step needs lives in the
columns of `table.py` while the sequence has a slot there.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from penstock.workers.kv.block_pool import Blocks
from penstock.workers.kv.prefix_cache import NO_BLOCKS, Run
from penstock.workers.protocol import GenerateRequest, token_array
from penstock.workers.scheduler.adapters import LoadedAdapter
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.grammars import Guide
from penstock.workers.scheduler.plan import I32


@dataclass(slots=True)
class Moving:
    """A running sequence is on its way to a peer, which has room up to `end_block` of its context."""

    end_block: int
    emitted: int  # generated tokens that the peer's request has
    paused: bool = False  # nothing more is computed for it here
    sent: bool = False  # its tail has left


@dataclass(slots=True, eq=False)
class Sequence:
    """`context` int32 [C]: all tokens known when it (last) entered the queue, generated ones included."""

    key: SequenceKey
    work: Work
    request: GenerateRequest
    arrival: int
    router_index: int
    deadline: float  # queue time-out, until first admitted
    context: I32
    sends_kv: bool = False
    first_block: int = 0  # fragments sent to the peer count from this block of the context
    chain: bytes = b""  # digests of its full blocks, as far as computed
    run: Run | None = None  # what it holds of the prefix cache, while it has a row
    known: Blocks = field(default_factory=lambda: NO_BLOCKS)  # blocks it computed though others had them cached
    slot: int | None = None
    published: int = 0  # leading blocks already offered to the prefix cache, while it has a row
    bank: int = 0  # whose blocks it holds, while it has a row
    pinned: int | None = None  # the only bank it may have
    started: bool = False  # was admitted once
    offered: int = 0  # leading blocks of the context that the peer was offered or already has
    granted: int = 0  # first block that a peer writes, while reserved
    takes_over: bool = False  # a reservation for a sequence that runs elsewhere
    moving: Moving | None = None  # a peer is to go on with it
    preemptions: int = 0
    guided: Future[Guide] | None = None  # what keeps its text to a grammar, once it is there
    adapted: Future[LoadedAdapter] | None = None  # the adapter that it is computed with, once it is there
    looked_below: bool = False  # what the pool lacks of its chain was looked for in the tiers, since it last waited
    loading: bool = False  # it waits for what was found there; see `tier_loads.py`
    scored: int = 1  # leading prompt tokens whose logprob is known or cannot be; see `scoring.py`

    @property
    def prompt_length(self) -> int:
        """Tokens before the first generated one."""
        return len(self.request.prompt)

    @property
    def max_length(self) -> int:
        """Tokens, prompt included, at which the choice ends."""
        return self.prompt_length + self.request.sampling.max_tokens

    @property
    def remaining(self) -> int:
        """Tokens still to be generated at most, counted from `context`."""
        return self.max_length - len(self.context)

    @property
    def awaits_others(self) -> bool:
        """It cannot be admitted yet: grammar or adapter are still to come, or its KV comes from a tier."""
        if self.adapted is not None and not self.adapted.done():
            return True
        return self.loading or (self.guided is not None and not self.guided.done())

    @property
    def guide(self) -> Guide | None:
        """What keeps its text to a grammar. Raises what kept the guide from being made."""
        return None if self.guided is None else self.guided.result(0)

    @property
    def adapter(self) -> LoadedAdapter | None:
        """What it is computed with beside the model. Raises what kept it from being loaded."""
        return None if self.adapted is None else self.adapted.result(0)

    @property
    def asks_of_prompt(self) -> bool:
        """The prompt's logprobs or its embedding are wanted (or were: this never changes)."""
        return self.request.embed or self.request.sampling.prompt_logprobs is not None

    @property
    def unscored(self) -> int:
        """Prompt tokens whose logprobs are asked for and not computed yet."""
        asked = self.request.sampling.prompt_logprobs is not None
        return max(0, self.prompt_length - self.scored) if asked else 0

    @property
    def order(self) -> tuple[bool, int, int]:
        """Place in the queue: preempted ones first, then by priority (low first), then by arrival."""
        return (self.preemptions == 0, self.request.priority, self.arrival)


def context_of(request: GenerateRequest) -> I32:
    """`prompt + emitted` as int32, read-only. Raises OverflowError for ids outside int32."""
    prompt = token_array(request.prompt)
    return np.concatenate((prompt, token_array(request.emitted))) if request.emitted else prompt
