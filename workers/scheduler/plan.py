"""What the scheduler decides for one step, and what the runner answers: `StepPlan` out, `StepResult` in.

Plain numpy, no torch: the scheduling half of a worker runs without it, and a plan can cross to other ranks as is.
A plan is self-contained: a runner needs nothing but the plan, its weights and its KV storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.workers.kv.layout import KVLayout

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class LogitEdits:
    """What is done to the logits of S rows before sampling: penalties first, then biases, bans, and grammars' masks.

    Everything a row needs is here, derived from its prompt and generated tokens, so that any worker can go on with it.
    Flat arrays are cut by offsets [S + 1]; a row that asks for nothing has empty ranges and neutral penalties.
    """

    presence: F32  # [S]
    frequency: F32  # [S]
    repetition: F32  # [S], 1 = neutral
    generated: I32  # generated tokens of rows with penalties, in order
    generated_offsets: I32
    prompt: I32  # prompt tokens of rows with a repetition penalty
    prompt_offsets: I32
    bias_ids: I32
    bias_values: F32
    bias_offsets: I32
    banned: I32  # token ids that may not be sampled in this step: bad words completed here, stop ids before min_tokens
    banned_offsets: I32
    allowed: I32  # where a row's range is not empty, only these may be sampled
    allowed_offsets: I32
    masked_rows: I32 = field(default_factory=lambda: np.zeros(0, np.int32))  # [M] rows under a grammar, ascending
    masks: I32 = field(default_factory=lambda: np.zeros((0, 0), np.int32))  # [M, ceil(V / 32)]: a bit per allowed token


@dataclass(frozen=True, slots=True, eq=False)
class ScoredPrompt:
    """Prompt tokens whose logprobs are wanted: M entries, in order of `token_rows`."""

    token_rows: I32  # [M] indices into StepPlan.token_ids; the logits after that token score the target
    targets: I32  # [M] token ids that are scored
    alternatives: I32  # [M] how many of the most likely tokens are wanted beside it


@dataclass(slots=True, eq=False)  # not frozen: that would triple what every step pays for making one
class SamplingBatch:
    """Sampling parameters of the S rows that end this step with a new token, in row order. Nobody changes it."""

    temperature: F32  # 0 = greedy
    top_k: I32  # 0 = all
    top_p: F32
    min_p: F32
    seed: U64
    choice: I32
    position: I32  # absolute position of the token being sampled = context length
    logprobs: I32  # -1 = off, else the number of alternatives wanted
    edits: LogitEdits | None = None  # None: no row changes its logits before sampling

    def __len__(self) -> int:
        return len(self.temperature)


@dataclass(slots=True, eq=False)  # not frozen, as above; nobody changes it
class StepPlan:
    """N rows, one per scheduled sequence; rows `[0, num_decode)` compute one token each, then come prefill chunks.

    Row i feeds tokens `token_ids[offsets[i]:offsets[i+1]]` at positions `starts[i]...`; their KV goes to slots
    `block_tables[i, pos // block_size]`, and they attend to positions `[0, starts[i] + count)`.
    """

    step: int
    slots: I32  # [N] rows of the sequence table, for the commit
    starts: I32  # [N] tokens whose KV is already there
    offsets: I32  # [N + 1] into token_ids
    token_ids: I32  # [total]; -1 - i: what the i-th sampled row of the step before gets, where the plan `follows` it
    block_tables: I32  # [N, widest]; unused entries are 0; a view of kept rows, valid until the next plan is made
    sample_rows: I32  # [S] indices of rows whose last token's logits are sampled
    sampling: SamplingBatch
    num_decode: int
    copies: I32 = field(default_factory=lambda: np.zeros((0, 2), np.int32))  # [(src, dst)] block copies before the run
    scored: ScoredPrompt | None = None
    embed_rows: I32 = field(default_factory=lambda: np.zeros(0, np.int32))  # of `sample_rows`: whose state is wanted
    num_continued: int = 0  # sequences of the rows behind these got their slot for this step
    follows: bool = False  # planned before the tokens of the step before were known
    # [N] place of each row's adapter, -1 = none; empty where no row has one
    adapters: I32 = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return int(self.offsets[-1])

    @property
    def brings_more(self) -> bool:
        """Somebody wants logprobs or states of this step, not only tokens."""
        return self.scored is not None or len(self.embed_rows) > 0 or bool((self.sampling.logprobs >= 0).any())


@dataclass(frozen=True, slots=True, eq=False)
class SampledLogprobs:
    """Logprobs of the S sampled tokens; rows that did not ask hold NaN and no alternatives."""

    chosen: F32  # [S]
    top_counts: I32  # [S]
    top_ids: I32  # [S, K], K the widest ask; entries past top_counts are 0
    top_logprobs: F32  # [S, K]


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """One sampled token per entry of `StepPlan.sample_rows`."""

    token_ids: I32  # [S]
    logprobs: SampledLogprobs | None = None
    scored: SampledLogprobs | None = None  # of the M entries of `StepPlan.scored`
    embeddings: F32 | None = None  # [len(embed_rows), hidden size]


class Runner(Protocol):
    """The half of a worker that owns weights and writes KV blocks."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this; the engine refuses others before they reach a step."""
        ...

    def run(self, plan: StepPlan) -> StepResult:
        """Copy blocks, compute every row, write its KV and sample. Returns when the KV bytes are in the storage.

        Raises BanksLostError where ranks are gone with their blocks; the step is void then.
        """
        ...


# Begins a step and returns while it is computed; what it returns waits for the result. What the plan points to is read
# before it returns. Steps are waited for in the order in which they were begun, and at most two are under way.
StartStep = Callable[[StepPlan], Callable[[], StepResult]]
