"""The messages that cross a process boundary between a router and a worker: frozen, typed, plain data.

Used by `router/` (decides with them), `workers/` (obeys and answers) and `cluster/` (carries them).
Knows neither torch nor Ray nor how a message becomes bytes (`wire.py` does).

One bidirectional stream joins each (router, worker) pair. A *slot* is the router's small integer for one
request on that stream; `attempt` counts the times the router has issued the request anywhere. Answers to an
attempt that is no longer current are dropped by the reader, so every message may arrive late or twice.

The life of a request, split over prefill worker P and decode worker D:

    router -> D  Reserve            D -> router  Queued* then Granted | Failed
    router -> P  Prefill(grant)     P -> router  Queued* Started, TokenFrame(first token) | Failed
    P == KV blocks ==> D            D -> router  TokenFrame ... TokenFrame(end) | Failed

A running sequence moves while it decodes on; it ends at S without a word once D has it, or goes on there (Stays):

    router -> D  Reserve(takes_over), then to S  Move(grant);  S == KV blocks, last tokens ==> D

and on one worker (a `mixed` one, or D itself where little is left to prefill):

    router -> W  Generate           W -> router  Queued* Started, TokenFrame ... TokenFrame(end) | Failed
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.grammar_spec import GrammarSpec
from penstock.workers.grant import Grant as Grant
from penstock.workers.totals import WorkerTotals

WIRE_VERSION = 5  # `wire.py` says what each version added
OLDEST_WIRE_VERSION = 4  # that this code still speaks
ADAPTER_WIRE_VERSION = 5  # from which on workers know adapters

Tokens = tuple[int, ...]
DIGEST_BYTES = 32


class PackedTokens(tuple[int, ...]):
    """Token ids that came off the wire and still have their array: a long prompt need not be converted again."""

    packed: NDArray[np.int32]
    largest: int  # of the ids, 0 where there are none


def token_array(tokens: Tokens) -> NDArray[np.int32]:
    """The ids as int32, read-only. Raises OverflowError for ids outside 32 bits."""
    if isinstance(tokens, PackedTokens):
        return tokens.packed
    try:
        # Three times as fast as numpy's own conversion of a tuple.
        return np.frombuffer(struct.pack(f"{len(tokens)}i", *tokens), np.int32)
    except struct.error as error:
        raise OverflowError("a token id lies outside 32 bits") from error


class Role(StrEnum):
    """What a worker is for. A role is a policy: every worker runs the same engine."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class EndReason(IntEnum):
    """Why a choice ended well. `NONE`: it has not ended."""

    NONE = 0
    STOP = 1
    LENGTH = 2


class FailureCode(StrEnum):
    """Why a request was refused or failed; a closed set, safe as a metric label."""

    BAD_REQUEST = "bad_request"  # fields that no worker of this model can serve
    TOO_LARGE = "too_large"  # could never fit this worker's KV pool or context
    QUEUE_FULL = "queue_full"  # the worker's waiting queue is at its bound
    DRAINING = "draining"  # the worker takes no new work
    GRAMMAR = "grammar"  # its grammar cannot be followed any further
    ADAPTER = "adapter"  # its adapter cannot be loaded here
    DEADLINE = "deadline"  # the request's own deadline passed
    LEASE_EXPIRED = "lease_expired"  # the peer stopped renewing
    TRANSFER_FAILED = "transfer_failed"  # KV blocks did not arrive whole
    KV_DAMAGED = "kv_damaged"  # they came, again and again, with a wrong digest
    WORKER_LOST = "worker_lost"  # the worker died or its stream broke
    INCOMPATIBLE = "incompatible"  # layouts, wire versions or revisions differ
    NO_WORKER = "no_worker"  # the fleet has nobody for this phase
    OVERLOADED = "overloaded"  # admission said no
    TENANT_LIMIT = "tenant_limit"  # the tenant is over its share
    POISONED = "poisoned"  # in flight at too many worker deaths
    CANCELLED = "cancelled"  # the caller went away
    INTERNAL = "internal"  # a defect; the log has the details


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one choice is sampled. The ingress resolves every default; workers never guess.

    `stop_token_ids` already holds the model's end-of-sequence ids unless the caller ignores them; a stop token is
    emitted as the last token of the choice, with `EndReason.STOP`. Stop strings live in the ingress.
    """

    max_tokens: int
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 64-bit Philox key; the ingress draws one when the caller gives none
    choice: int = 0  # index among the request's `n` choices
    stop_token_ids: Tokens = ()
    logprobs: int | None = None  # None = off; 0..20 alternatives beside the chosen token
    presence_penalty: float = 0.0  # subtracted once from the logit of every generated token
    frequency_penalty: float = 0.0  # subtracted as often as the token was generated
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of prompt and generated tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit); ids are distinct
    bad_words: tuple[Tokens, ...] = ()  # token sequences whose last token is banned after the ones before it
    allowed_token_ids: Tokens | None = None  # None = all; others are banned
    min_tokens: int = 0  # stop tokens are banned until so many have been generated
    prompt_logprobs: int | None = None  # None = off; 0..20 alternatives beside every prompt token
    grammar: GrammarSpec | None = None  # what the generated text must look like


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Everything any worker needs to start, or to go on with, one choice.

    The context is `prompt + emitted`; the next token's position is its length. `prefix_digests` holds the
    SHA-256 chain (32 bytes each) of the full blocks of `prompt`, seeded with `prefix_root`.
    """

    request_id: str
    prompt: Tokens
    sampling: SamplingParams
    emitted: Tokens = ()
    tenant: str = "default"
    prefix_root: bytes = b"\0" * DIGEST_BYTES
    prefix_digests: bytes = b""
    cache_prefix: bool = True
    priority: int = 0
    queue_timeout_s: float = 60.0  # longest wait for admission at the worker, on the worker's clock
    embed: bool = False  # answer with the last prompt token's hidden state; `max_tokens` is 1 and its token unused
    traceparent: str = ""  # W3C trace context of the span that asks; empty = not traced
    adapter: AdapterRef | None = None  # None: the model alone; `prefix_root` says the adapter's revision too

    @property
    def context_length(self) -> int:
        """Tokens whose KV must exist before the next one can be sampled."""
        return len(self.prompt) + len(self.emitted)

    @property
    def remaining(self) -> int:
        """Tokens still to be generated at most."""
        return self.sampling.max_tokens - len(self.emitted)


# --- router -> worker ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """First message on a stream. A router that restarts comes back with a higher epoch; the old one's work ends."""

    wire_version: int
    router_id: str
    router_epoch: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Renews the router's lease on everything it asked of this worker."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask a decode worker for KV blocks and a place in its batch; the KV will come from a prefill worker."""

    slot: int
    attempt: int
    request: GenerateRequest
    takes_over: bool = False  # it runs elsewhere, and grows until it is here: grant room for that too


@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute the context's KV, sample one token, send KV and token to the granter (none: the request ends here)."""

    slot: int
    attempt: int
    request: GenerateRequest
    grant: Grant | None


@dataclass(frozen=True, slots=True)
class Generate:
    """Prefill and decode on this one worker."""

    slot: int
    attempt: int
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """End whatever runs under this slot and attempt; unknown ones are ignored. Not answered."""

    slot: int
    attempt: int


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """Ask for a `KVSnapshot`; sent at attach and after a gap in `KVEvents.sequence`."""


@dataclass(frozen=True, slots=True)
class Move:
    """Have a sequence that decodes here go on at the granter, whose request holds `emitted` generated tokens."""

    slot: int
    attempt: int
    grant: Grant
    emitted: int


# --- worker -> router ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to `Hello`: who the worker is and what it can hold."""

    wire_version: int
    worker_id: str
    incarnation: int
    role: Role
    pid: int
    width: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    transfer_address: str
    host_id: str
    compatibility: str


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits at the worker; `position` requests stand before it."""

    slot: int
    attempt: int
    position: int


@dataclass(frozen=True, slots=True)
class Granted:
    """Answer to `Reserve`."""

    slot: int
    attempt: int
    grant: Grant


@dataclass(frozen=True, slots=True)
class Started:
    """The context's computation begins; `cached_tokens` of it came from the prefix cache."""

    slot: int
    attempt: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt is over on this worker and holds nothing there any more."""

    slot: int
    attempt: int
    code: FailureCode
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stays:
    """Answer to a `Move` that came to nothing: the sequence goes on here."""

    slot: int
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class TokenFrame:
    """What one engine step produced for one router: `R` rows as columns, `T` tokens in row order.

    Row r belongs to (`slots[r]`, `attempts[r]`) and carries `counts[r]` tokens, the first of which is the
    `starts[r]`-th generated token of its choice (0-based, `emitted` included). Readers apply rows by that index.
    Logprob columns are empty unless some row asked: `logprobs` [T] float32 (NaN where a row did not ask),
    `top_counts` [T] uint8, and `top_ids`/`top_logprobs` flat in token order.
    """

    step: int
    slots: NDArray[np.uint32]
    attempts: NDArray[np.uint16]
    starts: NDArray[np.uint32]
    counts: NDArray[np.uint16]
    ends: NDArray[np.uint8]  # EndReason
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    top_counts: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    top_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    top_logprobs: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Logprobs of prompt tokens `start ... start + T - 1` given the tokens before them; readers apply them by index.

    Sent chunk by chunk, before the frame with the first generated token. Token 0 has nothing before it: NaN, no
    alternatives. Columns as in `TokenFrame`.
    """

    slot: int
    attempt: int
    start: int
    logprobs: NDArray[np.float32]  # [T]
    top_counts: NDArray[np.uint8]  # [T]
    top_ids: NDArray[np.int32]  # flat, in token order
    top_logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The last prompt token's hidden state after the final norm; sent before the frame that ends the request."""

    slot: int
    attempt: int
    values: NDArray[np.float32]  # [hidden size]


@dataclass(frozen=True, slots=True)
class Load:
    """Heartbeat from the worker's own thread, every half second, also while a step is stuck."""

    step: int
    step_age_s: float  # of the step under way: a worker with work whose step does not move is stuck
    predicted_step_s: float
    running: int
    waiting: int
    queued_prefill_tokens: int
    free_blocks: int
    cached_blocks: int
    quarantined_blocks: int
    transfers: int
    preemptions: int
    draining: bool
    totals: WorkerTotals = field(default_factory=WorkerTotals)
    step_base_s: float = 0.0  # of the line fitted to its steps; 0 while unknown
    step_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class KVEvents:
    """Change of the worker's prefix cache since event `sequence - 1`; digests cut to their first 8 bytes each."""

    sequence: int
    stored: bytes
    evicted: bytes


@dataclass(frozen=True, slots=True)
class KVSnapshot:
    """The whole prefix cache after event `sequence`."""

    sequence: int
    digests: bytes


ToWorker = Hello | KeepAlive | Reserve | Prefill | Generate | Cancel | RequestSnapshot | Move
ToRouter = (
    Welcome | Queued | Granted | Started | Failed | TokenFrame | PromptLogprobs | Embedding | Load | KVEvents
    | KVSnapshot | Stays
)  # fmt: skip
