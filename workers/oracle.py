"""The oracle: a runner whose next token is a keyed hash of the whole sequence as its KV blocks hold it.

Used in place of a model by tests, fault drills and benchmarks: a lost, doubled, stale, swapped or foreign block
changes every later token, so a text is its own checksum, and `expected_tokens` says what it must be without any
worker. The process that reads no blocks but its own copy of the tokens would prove nothing; so every step hashes the
full context anew out of the block storage.

The KV of one token is its id (in the k plane) and its position (in the v plane), int64, repeated over `head_dim`. Each
of H KV heads holds every token, its ids shifted by a number of the head's own, and answers for the positions p with
p mod H equal to its number: the heads of a group's ranks are all needed, each its own, for the text to be right.
The hash is a sum over positions of `mix(token, stored position, true position)` (the finaliser of SplitMix64; Steele,
Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014), finalised once more with the seed for sampled
requests. A sum of mixed terms can be taken block by block in any order and still depends on every position.

It has no logits, so penalties, biases, bad words and allowed tokens change nothing here; `min_tokens` holds as far as
the scheduler ends no choice before. Logprobs are well-formed and mean nothing; embeddings hash the context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import ConfigError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.parallel.shards import WHOLE, TensorShard
from penstock.workers.protocol import SamplingParams, Tokens
from penstock.workers.scheduler.plan import I32, U64, SampledLogprobs, SamplingBatch, StepPlan, StepResult
from penstock.workers.settings import KVSettings, RunnerSettings

_TOKEN_BYTES = 2 * 8  # an id and a position
_STEP = 0x9E3779B97F4A7C15
_MUL_A = 0xBF58476D1CE4E5B9
_MUL_B = 0x94D049BB133111EB
_POSITION = 0xD6E8FEB86659FD93
_STORED = 0xA0761D6478BD642F
_HEAD = 0xE7037ED1A0B428DB
_MASK = (1 << 64) - 1
EMBEDDING_SIZE = 16


def oracle_heads(runner: RunnerSettings, width: int) -> int:
    """KV heads of the whole oracle, over all ranks of a group of this width. Raises ConfigError."""
    heads = runner.oracle_kv_heads or width
    if heads % width and width % heads:
        raise ConfigError(
            f"{width} ranks neither divide the oracle's {heads} KV heads nor are a multiple of them",
            "tensor_parallel_size",
        )
    return heads


def oracle_layout(runner: RunnerSettings, kv: KVSettings, shard: TensorShard = WHOLE) -> KVLayout:
    """One layer; a rank's part of the heads, each wide enough for `oracle_block_bytes` per block of one of them."""
    held = shard.kv_heads(oracle_heads(runner, shard.width))
    least = _TOKEN_BYTES * kv.block_size
    head_dim = max(1, -(-runner.oracle_block_bytes // least))
    revision = f"oracle-{runner.oracle_vocab}"
    return KVLayout(
        1,
        len(held),
        head_dim,
        kv.block_size,
        "int64",
        revision,
        tensor_width=shard.width,
        tensor_rank=shard.rank,
        total_kv_heads=oracle_heads(runner, shard.width),
    )


class OracleGroup(Protocol):
    """How the oracles of a group come to one answer."""

    def add_up(self, sums: U64) -> U64:
        """Of rank 0: these sums plus all other ranks'. Of the others: hands them over; what it returns is void."""
        ...


class OracleRunner:
    """Runner over `storage_data`, uint8 [num_blocks, block_bytes]; holds no state but its pace.

    On a rank of a group, `shard` says which heads are its own, and `group` joins the ranks' sums.
    """

    def __init__(
        self,
        settings: RunnerSettings,
        layout: KVLayout,
        storage_data: NDArray[np.uint8],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        *,
        shard: TensorShard = WHOLE,
        group: OracleGroup | None = None,
    ) -> None:
        self._settings = settings
        self._layout = layout
        held = layout.num_kv_heads
        self._kv = storage_data.view(np.int64).reshape(-1, 2, held, layout.block_size, layout.head_dim)
        self._clock = clock
        self._sleep = sleep
        self._group = group
        self._heads = oracle_heads(settings, shard.width)
        self._first = layout.share.heads.first
        self._salts = np.arange(self._first, self._first + held, dtype=np.uint64) * np.uint64(_HEAD)
        # Of ranks that hold the same head, the first answers for it.
        self._answers = shard.rank % max(1, shard.width // self._heads) == 0

    @property
    def layout(self) -> KVLayout:
        """Shape of the blocks this runner reads and writes."""
        return self._layout

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self._settings.oracle_vocab

    def run(self, plan: StepPlan) -> StepResult:
        """Write the fed tokens' KV, then hash the whole context of every sampled row out of the blocks."""
        began = self._clock()
        for source, target in plan.copies:
            self._kv[target] = self._kv[source]
        self._write(plan)
        rows = plan.sample_rows
        lengths = plan.starts[rows] + np.diff(plan.offsets)[rows]
        sums = self._context_sums(plan.block_tables[rows], lengths)
        if self._group is not None:
            self._pace(began, plan.num_tokens)  # before others wait for this rank's sums
            sums = self._group.add_up(sums) if len(sums) else sums
        vocab, scored = self._settings.oracle_vocab, plan.scored
        result = replace(
            _sample(sums, plan.sampling, vocab),
            scored=None if scored is None else _synthetic_logprobs(scored.targets, scored.alternatives, vocab),
            embeddings=_embeddings(sums[plan.embed_rows]) if len(plan.embed_rows) else None,
        )
        self._pace(began, plan.num_tokens)
        return result

    def _write(self, plan: StepPlan) -> None:
        counts = np.diff(plan.offsets)
        row = np.repeat(np.arange(len(counts)), counts)
        position = np.arange(plan.num_tokens) - plan.offsets[:-1][row] + plan.starts[row]
        block = plan.block_tables[row, position // self._layout.block_size]
        slot = position % self._layout.block_size
        for head, salt in enumerate(self._salts):
            self._kv[block, 0, head, slot] = (plan.token_ids.astype(np.uint64) + salt).view(np.int64)[:, None]
            self._kv[block, 1, head, slot] = position[:, None]

    def _context_sums(self, block_tables: I32, lengths: I32) -> U64:
        """[S] wrapped sums over each row's context, read from its blocks."""
        size = self._layout.block_size
        used = -(-lengths // size)
        held = np.arange(block_tables.shape[1]) < used[:, None]
        blocks = block_tables[held]  # [B] in row order
        row_start = np.cumsum(used, dtype=np.int32) - used
        index_in_row = np.arange(len(blocks)) - np.repeat(row_start, used)
        true_position = index_in_row[:, None] * size + np.arange(size)
        stored, positions = self._stored(blocks, true_position)
        terms = _mix_terms(stored, positions, true_position.astype(np.uint64))
        if self._heads > 1:
            head = true_position % self._heads - self._first
            terms[(head < 0) | (head >= len(self._salts)) | (not self._answers)] = 0
        terms[true_position >= np.repeat(lengths, used)[:, None]] = 0
        per_block = terms.sum(axis=1, dtype=np.uint64)
        return np.add.reduceat(per_block, row_start) if len(blocks) else per_block

    def _stored(self, blocks: I32, true_position: NDArray[np.integer]) -> tuple[U64, U64]:
        """[B, slots] ids and positions, each out of the head that answers for it; void where this rank has it not."""
        if self._heads == 1:
            return self._kv[blocks, 0, 0, :, 0].view(np.uint64), self._kv[blocks, 1, 0, :, 0].view(np.uint64)
        head = np.clip(true_position % self._heads - self._first, 0, len(self._salts) - 1)
        slots = np.arange(self._layout.block_size)
        ids = self._kv[blocks[:, None], 0, head, slots, 0].view(np.uint64) - self._salts[head]
        return ids, self._kv[blocks[:, None], 1, head, slots, 0].view(np.uint64)

    def _pace(self, began: float, num_tokens: int) -> None:
        least = self._settings.oracle_step_s + self._settings.oracle_token_s * num_tokens
        rest = least - (self._clock() - began)
        if rest > 0:
            self._sleep(rest)


def expected_tokens(
    prompt: Sequence[int], sampling: SamplingParams, vocab: int, *, emitted: Sequence[int] = ()
) -> Tokens:
    """What an oracle worker must answer to `prompt` (+ `emitted`), up to max_tokens or a stop token, that included."""
    context = [*prompt, *emitted]
    total = sum(_mix(token + position * _POSITION + position * _STORED) for position, token in enumerate(context))
    answer = list(emitted)
    seed, choice = (sampling.seed, sampling.choice) if sampling.temperature > 0 else (0, 0)
    while len(answer) < sampling.max_tokens:
        position = len(context)
        token = (_mix(total + seed * _STEP + choice * _MUL_A) >> 1) % vocab
        context.append(token)
        answer.append(token)
        if token in sampling.stop_token_ids and len(answer) > sampling.min_tokens:
            break
        total += _mix(token + position * (_POSITION + _STORED))
    return tuple(answer[len(emitted) :])


def expected_embedding(prompt: Sequence[int]) -> NDArray[np.float32]:
    """What an oracle worker must give as the embedding of `prompt`."""
    total = sum(_mix(token + position * (_POSITION + _STORED)) for position, token in enumerate(prompt))
    vector: NDArray[np.float32] = _embeddings(np.array([total & _MASK], np.uint64))[0]
    return vector


def _mix(value: int) -> int:
    """SplitMix64's finaliser over Python integers."""
    value = (value + _STEP) & _MASK
    value = ((value ^ (value >> 30)) * _MUL_A) & _MASK
    value = ((value ^ (value >> 27)) * _MUL_B) & _MASK
    return value ^ (value >> 31)


def _mix_array(value: U64) -> U64:
    """The same, elementwise."""
    value = value + np.uint64(_STEP)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MUL_A)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MUL_B)
    return value ^ (value >> np.uint64(31))


def _mix_terms(tokens: U64, stored_positions: U64, true_positions: U64) -> U64:
    return _mix_array(tokens + stored_positions * np.uint64(_STORED) + true_positions * np.uint64(_POSITION))


def _sample(sums: U64, sampling: SamplingBatch, vocab: int) -> StepResult:
    drawn = sampling.temperature > 0  # greedy requests ignore the seed, as with a model
    seed = np.where(drawn, sampling.seed, np.uint64(0))
    choice = np.where(drawn, sampling.choice, 0).astype(np.uint64)
    hashes = _mix_array(sums + seed * np.uint64(_STEP) + choice * np.uint64(_MUL_A))
    tokens = ((hashes >> np.uint64(1)) % np.uint64(vocab)).astype(np.int32)
    logprobs = _synthetic_logprobs(tokens, sampling.logprobs, vocab) if bool((sampling.logprobs >= 0).any()) else None
    return StepResult(tokens, logprobs)


def _embeddings(sums: U64) -> NDArray[np.float32]:
    """[S, EMBEDDING_SIZE] values in [-1, 1), hashed from the context sums [S]."""
    hashes = _mix_array(sums[:, None] + np.arange(1, EMBEDDING_SIZE + 1, dtype=np.uint64) * np.uint64(_MUL_B))
    return ((hashes >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23)) - np.float32(1)


def _synthetic_logprobs(tokens: I32, wanted: I32, vocab: int) -> SampledLogprobs:
    """Well-formed and falling: rank j has probability about 2^-(j+1); the chosen token is rank 0."""
    counts = np.clip(wanted, 0, vocab).astype(np.int32)
    rank = np.arange(int(counts.max(initial=0)))
    asked = rank < counts[:, None]
    step = np.float32(-0.7)
    return SampledLogprobs(
        np.where(wanted >= 0, step, np.float32(np.nan)),
        counts,
        np.where(asked, (tokens[:, None] + rank) % vocab, 0).astype(np.int32),
        np.where(asked, step * (rank + 1), 0).astype(np.float32),
    )
