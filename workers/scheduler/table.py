"""The state of all admitted sequences as numpy columns: row s of every column belongs to the sequence in slot s.

Shared by the scheduler's parts (admission, chunking, commit); nobody outside `scheduler/` sees it. Steps work on
whole columns; the per-request object (`sequences[s]`) is touched only when a sequence starts, ends, is preempted, or
fills a block. Knows neither queues nor the block pool.

Invariants: `computed <= length`; a row decodes if and only if one known token is left to compute; an empty row is
all zeros in `state`, `num_blocks` and `block_tables`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError
from penstock.workers.protocol import SamplingParams
from penstock.workers.scheduler.edits import EditColumns
from penstock.workers.scheduler.plan import F32, I32, U64, SamplingBatch
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


# Looking up an enum's member costs more than a numpy operation on a small column: plain ints for the hot path.
EMPTY, PREFILL, DECODE, RESERVED = (int(state) for state in State)

Slots = NDArray[np.intp]  # rows of the table; numpy gathers by native integers fastest


class SequenceTable:
    """`max_seqs` rows, sequences of at most `max_length` tokens in blocks of `block_size`."""

    def __init__(self, max_seqs: int, max_length: int, block_size: int) -> None:
        self.max_seqs = max_seqs
        self.block_size = block_size
        self.sequences: list[Sequence | None] = [None] * max_seqs
        self.state = np.zeros(max_seqs, np.uint8)
        self.tokens: I32 = np.zeros((max_seqs, max_length), np.int32)
        self.last_token: I32 = np.zeros(max_seqs, np.int32)
        self._flat_tokens = self.tokens.reshape(-1)
        self._row_starts = np.arange(max_seqs) * max_length
        self.block_tables: I32 = np.zeros((max_seqs, -(-max_length // block_size)), np.int32)
        self.num_blocks = np.zeros(max_seqs, np.int32)
        self.capacity = np.zeros(max_seqs, np.int32)  # tokens that its blocks hold
        self.length = np.zeros(max_seqs, np.int32)  # known tokens
        self.computed = np.zeros(max_seqs, np.int32)  # of these, with KV in the blocks
        self.prompt_length = np.zeros(max_seqs, np.int32)
        self.last_position = np.zeros(max_seqs, np.int32)  # of the token with which the choice ends by LENGTH
        self.published = np.zeros(max_seqs, np.int32)  # leading blocks already offered to the prefix cache
        self.arrival = np.zeros(max_seqs, np.int64)  # order of submission
        self.router_index = np.zeros(max_seqs, np.int32)
        self.router_slot = np.zeros(max_seqs, np.uint32)
        self.attempt = np.zeros(max_seqs, np.uint16)
        self.stop_ids: I32 = np.full((_FIRST_STOP_WIDTH, max_seqs), NO_TOKEN, np.int32)
        # Rows of these are columns of SamplingBatch: one gather serves three of them.
        self.sampling_floats: F32 = np.zeros((3, max_seqs), np.float32)  # temperature, top_p, min_p
        self.sampling_ints: I32 = np.zeros((3, max_seqs), np.int32)  # top_k, choice, logprobs
        self.seed: U64 = np.zeros(max_seqs, np.uint64)
        self.edits = EditColumns(self.tokens, self.length, self.prompt_length)
        self.asking = 0  # rows whose prompt is to be scored or embedded
        self.removals = 0  # rows emptied so far
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

    def blocks_of(self, slot: int) -> list[int]:
        """Blocks of the sequence in `slot`, in order."""
        blocks: list[int] = self.block_tables[slot, : self.num_blocks[slot]].tolist()
        return blocks

    def insert(self, sequence: Sequence, blocks: list[int], computed: int, state: int) -> int:
        """Give the sequence a row; `computed` leading tokens have their KV in `blocks`. Returns the slot."""
        slot = self._empty.pop()
        sequence.slot = slot
        self.sequences[slot] = sequence
        context = sequence.context
        length = len(context)
        self.state[slot] = state
        self.tokens[slot, :length] = context
        self.last_token[slot] = context[-1]
        self.block_tables[slot, : len(blocks)] = blocks
        self.num_blocks[slot] = len(blocks)
        self.capacity[slot] = len(blocks) * self.block_size
        self.length[slot] = length
        self.computed[slot] = computed
        self.prompt_length[slot] = sequence.prompt_length
        self.last_position[slot] = sequence.max_length - 1
        self.published[slot] = computed // self.block_size
        self.arrival[slot] = sequence.arrival
        self.router_index[slot] = sequence.router_index
        self.router_slot[slot] = sequence.key.slot
        self.attempt[slot] = sequence.key.attempt
        self._set_sampling(slot, sequence.request.sampling)
        self.asking += sequence.asks_of_prompt
        self.edits.fill(slot, sequence.request.sampling, context[: sequence.prompt_length])
        return slot

    def remove(self, slot: int) -> None:
        """Empty the row; its blocks are the caller's business."""
        sequence = self.sequence_in(slot)
        sequence.slot = None
        self.asking -= sequence.asks_of_prompt
        self.sequences[slot] = None
        self.removals += 1
        self.edits.empty(slot)
        self.state[slot] = EMPTY
        self.block_tables[slot, : self.num_blocks[slot]] = 0
        self.num_blocks[slot] = 0
        self._empty.append(slot)

    def append_blocks(self, slots: Slots, blocks: list[int]) -> None:
        """One more block for each of these rows."""
        self.block_tables[slots, self.num_blocks[slots]] = blocks
        self.num_blocks[slots] += 1
        self.capacity[slots] += self.block_size

    def append_tokens(self, slots: Slots, tokens: I32) -> I32:
        """One more known token for each of these rows; returns their lengths before, int32 [S]."""
        position: I32 = self.length[slots]
        self._flat_tokens[self._row_starts[slots] + position] = tokens
        self.last_token[slots] = tokens
        self.length[slots] = position + 1
        return position

    def sampling(self, slots: Slots) -> SamplingBatch:
        """Columns for rows that sample their next token."""
        floats = self.sampling_floats.take(slots, axis=1)
        ints = self.sampling_ints.take(slots, axis=1)
        return SamplingBatch(
            temperature=floats[0],
            top_k=ints[0],
            top_p=floats[1],
            min_p=floats[2],
            seed=self.seed[slots],
            choice=ints[1],
            position=self.length[slots],
            logprobs=ints[2],
            edits=self.edits.batch(slots),
        )

    def _set_sampling(self, slot: int, sampling: SamplingParams) -> None:
        self.sampling_floats[:, slot] = (sampling.temperature, sampling.top_p, sampling.min_p)
        logprobs = -1 if sampling.logprobs is None else sampling.logprobs
        self.sampling_ints[:, slot] = (sampling.top_k, sampling.choice, logprobs)
        self.seed[slot] = sampling.seed & _SEED_MASK
        count = len(sampling.stop_token_ids)
        width = len(self.stop_ids)
        if count > width:
            padding = np.full((count - width, self.max_seqs), NO_TOKEN, np.int32)
            self.stop_ids = np.concatenate((self.stop_ids, padding))
        self.stop_ids[:, slot] = NO_TOKEN
        self.stop_ids[:count, slot] = sampling.stop_token_ids
