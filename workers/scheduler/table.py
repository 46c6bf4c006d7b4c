"""The state of all admitted sequences as numpy columns: row s of every column belongs to the sequence in slot s.

Shared by the scheduler's parts (admission, chunking, commit); nobody outside `scheduler/` sees it. Steps work on
whole columns, and what they read of their rows is one matrix, so that one gather serves plan and commit. The
per-request object (`sequences[s]`) is touched only when a sequence starts, ends, is preempted, or fills a block. Knows
neither queues nor the block pool.

Invariants: `computed <= length`; a row decodes if and only if one known token is left to compute; an empty row is
all zeros in `state`, `num_blocks` and `block_tables`.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_pool import Blocks
from penstock.workers.protocol import Tokens
from penstock.workers.scheduler.adapters import AdapterRows
from penstock.workers.scheduler.edits import EditColumns
from penstock.workers.scheduler.plan import I32, U64, SamplingBatch
from penstock.workers.scheduler.sequence import Sequence

NO_TOKEN = -1  # pads the stop-id matrix; no token has this id
_FIRST_STOP_WIDTH = 1
_SEED_MASK = (1 << 64) - 1


class State(IntEnum):
    """What a row of the table is doing."""

    EMPTY = 0
    PREFILL = 1  # more than one known token has no KV yet
    DECODE = 2  # exactly one known token has no KV yet
    RESERVED = 3  # blocks wait for KV from a peer
    LAST = 4  # nothing more is computed for it once the steps under way are done


# Looking up an enum's member costs more than a numpy operation on a small column: plain ints for the hot path.
EMPTY, PREFILL, DECODE, RESERVED, LAST = (int(state) for state in State)

Slots = NDArray[np.intp]  # rows of the table; numpy gathers by native integers fastest


# Rows of the matrix that holds what a step reads; `SequenceTable` says what each is.
COMPUTED, LENGTH, LAST_TOKEN, PROMPT_LENGTH, LAST_POSITION, ROUTER_INDEX, ROUTER_SLOT, ATTEMPT = range(8)
TEMPERATURE, TOP_P, MIN_P, TOP_K, CHOICE, LOGPROBS = range(8, 14)
_PACKED_FIELDS = struct.Struct("=6iI i 3f 3i")  # the same, one row's
_NUM_FIELDS = 14


class SequenceTable:
    """`max_seqs` rows, sequences of at most `max_length` tokens in blocks of `block_size`."""

    def __init__(self, max_seqs: int, max_length: int, block_size: int) -> None:
        self.max_seqs = max_seqs
        self.block_size = block_size
        self.sequences: list[Sequence | None] = [None] * max_seqs
        self.state = np.zeros(max_seqs, np.uint8)
        self.tokens: I32 = np.zeros((max_seqs, max_length), np.int32)
        self._flat_tokens = self.tokens.reshape(-1)
        self._row_starts = np.arange(max_seqs) * max_length
        self.block_tables: I32 = np.zeros((max_seqs, -(-max_length // block_size)), np.int32)
        self.num_blocks = np.zeros(max_seqs, np.int32)
        self.capacity = np.zeros(max_seqs, np.int32)  # tokens that its blocks hold
        self.bank = np.zeros(max_seqs, np.uint16)  # whose blocks the row holds
        self.fields: I32 = np.zeros((_NUM_FIELDS, max_seqs), np.int32)
        self.computed = self.fields[COMPUTED]  # known tokens with KV in the blocks
        self.length = self.fields[LENGTH]  # known tokens
        self.last_token = self.fields[LAST_TOKEN]
        self.prompt_length = self.fields[PROMPT_LENGTH]
        self.last_position = self.fields[LAST_POSITION]  # of the token with which the choice ends by LENGTH
        self.stop_ids: I32 = np.full((_FIRST_STOP_WIDTH, max_seqs), NO_TOKEN, np.int32)
        self.seed: U64 = np.zeros(max_seqs, np.uint64)
        self.edits = EditColumns(self.tokens, self.length, self.prompt_length)
        self.adapters = AdapterRows(max_seqs)
        self.asking = 0  # rows whose prompt is to be scored or embedded
        self.version = np.zeros(max_seqs, np.int64)  # of a row's block table; no two tables ever have the same
        self._versions = 0
        self._empty = list(range(max_seqs - 1, -1, -1))

    @property
    def num_sequences(self) -> int:
        """Rows in use."""
        return self.max_seqs - len(self._empty)

    @property
    def is_full(self) -> bool:
        """No row is left."""
        return not self._empty

    def rows_in(self, state: int) -> Slots:
        """Slots of all rows in this state, ascending."""
        slots: Slots = (self.state == state).nonzero()[0]
        return slots

    def sequence_in(self, slot: int) -> Sequence:
        """The sequence of a row in use. Raises IntegrityError for an empty row."""
        sequence = self.sequences[slot]
        if sequence is None:
            raise IntegrityError(f"slot {slot} is empty")
        return sequence

    def blocks_of(self, slot: int) -> Blocks:
        """Blocks of the sequence in `slot`, in order; a copy."""
        return self.block_tables[slot, : self.num_blocks[slot]].astype(np.intp)

    def insert(self, sequence: Sequence, blocks: Blocks, computed: int, state: int) -> int:
        """Give the sequence a row; `computed` leading tokens have their KV in `blocks`. Returns the slot."""
        slot = self._empty.pop()
        sequence.slot = slot
        sequence.published = computed // self.block_size
        self.sequences[slot] = sequence
        self._versions += 1
        self.version[slot] = self._versions
        context, count = sequence.context, len(blocks)
        length = len(context)
        self.state[slot] = state
        self.tokens[slot, :length] = context
        self.block_tables[slot, :count] = blocks
        self.num_blocks[slot] = count
        self.capacity[slot] = count * self.block_size
        self.bank[slot] = sequence.bank
        key, sampling, prompt_length = sequence.key, sequence.request.sampling, sequence.prompt_length
        packed = _PACKED_FIELDS.pack(
            computed,
            length,
            context[-1],
            prompt_length,
            prompt_length + sampling.max_tokens - 1,
            sequence.router_index,
            key.slot,
            key.attempt,
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.top_k,
            sampling.choice,
            -1 if sampling.logprobs is None else sampling.logprobs,
        )
        self.fields[:, slot] = np.frombuffer(packed, np.int32)
        self.seed[slot] = sampling.seed & _SEED_MASK
        self._set_stop_ids(slot, sampling.stop_token_ids)
        self.asking += sequence.asks_of_prompt
        self.edits.fill(slot, sampling, context[:prompt_length], sequence.guide)
        self.adapters.fill(slot, sequence.adapter)
        return slot

    def remove(self, slot: int) -> None:
        """Empty the row; its blocks are the caller's business."""
        sequence = self.sequence_in(slot)
        sequence.slot = None
        self.asking -= sequence.asks_of_prompt
        self.sequences[slot] = None
        self.edits.empty(slot)
        self.adapters.empty(slot)
        self.state[slot] = EMPTY
        self.block_tables[slot, : self.num_blocks[slot]] = 0
        self.num_blocks[slot] = 0
        self._empty.append(slot)

    def append_blocks(self, slots: Slots, blocks: Blocks) -> None:
        """One more block for each of these rows."""
        self.block_tables[slots, self.num_blocks[slots]] = blocks
        self.num_blocks[slots] += 1
        self.capacity[slots] += self.block_size
        self.version[slots] = np.arange(self._versions + 1, self._versions + 1 + len(slots))
        self._versions += len(slots)

    def lengthen(self, slots: Slots, fields: I32) -> None:
        """One more token for each of these rows, to be known soon; `fields` are theirs. They decode or end."""
        positions = fields[LENGTH]
        self.length[slots] = positions + 1
        self.state[slots] = DECODE
        full = (positions >= fields[LAST_POSITION]).nonzero()[0]
        if len(full):
            self.state[slots[full]] = LAST

    def store_tokens(self, slots: Slots, positions: I32, tokens: I32) -> None:
        """The tokens by which these rows were lengthened, at `positions`."""
        self._flat_tokens[self._row_starts[slots] + positions] = tokens
        self.last_token[slots] = tokens

    def sampling(self, slots: Slots, fields: I32, seeds: U64) -> SamplingBatch:
        """Columns for rows that sample their next token; `fields` and `seeds` are theirs."""
        floats = fields[TEMPERATURE : MIN_P + 1].view(np.float32)
        return SamplingBatch(
            temperature=floats[0],
            top_k=fields[TOP_K],
            top_p=floats[1],
            min_p=floats[2],
            seed=seeds,
            choice=fields[CHOICE],
            position=fields[LENGTH],
            logprobs=fields[LOGPROBS],
            edits=self.edits.batch(slots) if self.edits.active else None,
        )

    def _set_stop_ids(self, slot: int, stops: Tokens) -> None:
        count, width = len(stops), len(self.stop_ids)
        if count > width:
            padding = np.full((count - width, self.max_seqs), NO_TOKEN, np.int32)
            self.stop_ids = np.concatenate((self.stop_ids, padding))
            width = count
        if width > 1:
            self.stop_ids[:, slot] = (*stops, *(NO_TOKEN,) * (width - count))
        else:
            self.stop_ids[0, slot] = stops[0] if stops else NO_TOKEN
