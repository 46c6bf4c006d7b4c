"""What running sequences want done to their logits, kept by table row, and one step's `LogitEdits` made from it.

Owned by `table.py`, which tells it when a row is filled or emptied; `SequenceTable.sampling` asks it for the batch.
Everything is derived from the request and the row's tokens (prompt and generated), never from earlier steps: a
sequence that was preempted, resumed elsewhere or handed over goes on with the same edits.

Invariants: a row without wishes is neutral in every column; a step in which no sampled row has a wish costs one look
at a counter; no step loops over rows in Python.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers.protocol import SamplingParams, Tokens
from penstock.workers.scheduler.grammars import Guide
from penstock.workers.scheduler.plan import F32, I32, LogitEdits
from penstock.workers.scheduler.row_arena import RowArena, gather_ranges, offsets_of

Slots = NDArray[np.intp]

_PENALTIES, _BAD_WORDS, _MIN_TOKENS, _LISTS, _GRAMMAR = 1, 2, 4, 8, 16  # bits of `_wishes`
_READING = _PENALTIES | _BAD_WORDS | _GRAMMAR

_NO_ROWS: Slots = np.zeros(0, np.intp)
_NO_MASKS: I32 = np.zeros((0, 0), np.int32)


class EditColumns:
    """Edits of `max_seqs` rows over the table's own columns, which it reads and never writes."""

    def __init__(self, tokens: I32, length: I32, prompt_length: I32) -> None:
        """`tokens` [max_seqs, max_length]; `length` and `prompt_length` [max_seqs]."""
        max_seqs, max_length = tokens.shape
        self.active = 0  # rows with any wish
        self.reading = 0  # rows whose wishes depend on which tokens were generated
        self.min_tokens: I32 = np.zeros(max_seqs, np.int32)  # stop tokens do not end a choice before so many
        self._early: I32 = np.zeros(max_seqs, np.int32)  # they are banned before so many
        self._guides: dict[int, Guide] = {}
        self._tokens = tokens.reshape(-1)
        self._row_starts = np.arange(max_seqs) * max_length
        self._length = length
        self._prompt_length = prompt_length
        self._wishes = np.zeros(max_seqs, np.uint8)
        self._penalties: F32 = np.zeros((3, max_seqs), np.float32)  # presence, frequency, repetition
        self._penalties[2] = 1.0
        self._prompts = RowArena(max_seqs, np.int32)  # distinct prompt tokens, where repetition counts
        self._bias_ids = RowArena(max_seqs, np.int32)
        self._bias_values = RowArena(max_seqs, np.float32)
        self._allowed = RowArena(max_seqs, np.int32)
        self._stops = RowArena(max_seqs, np.int32)  # stop ids, where min_tokens counts
        self._word_prefixes = RowArena(max_seqs, np.int32)  # bad words without their last tokens, end to end
        self._word_lengths = RowArena(max_seqs, np.int32)  # of these prefixes
        self._word_lasts = RowArena(max_seqs, np.int32)

    def fill(self, slot: int, sampling: SamplingParams, prompt: I32, guide: Guide | None = None) -> None:
        """The row now belongs to a request with this prompt, whose text `guide` keeps to a grammar."""
        wishes = _wishes_of(sampling) | (_GRAMMAR if guide is not None else 0)
        if not wishes:
            return
        self.active += 1
        self.reading += wishes & _READING != 0
        self._wishes[slot] = wishes
        if wishes & _PENALTIES:
            penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
            self._penalties[:, slot] = penalties
            if sampling.repetition_penalty != 1:
                self._prompts.put(slot, np.unique(prompt))
        if wishes & _LISTS:
            self._bias_ids.put(slot, np.array([token for token, _ in sampling.logit_bias], np.int32))
            self._bias_values.put(slot, np.array([value for _, value in sampling.logit_bias], np.float32))
            self._allowed.put(slot, _distinct(sampling.allowed_token_ids or ()))
        if wishes & _MIN_TOKENS:
            self._early[slot] = sampling.min_tokens
            # Where a grammar leaves nothing but an end, the end comes however early.
            self.min_tokens[slot] = sampling.min_tokens if guide is None else 0
            self._stops.put(slot, _distinct(sampling.stop_token_ids))
        if wishes & _BAD_WORDS:
            words = sampling.bad_words
            self._word_lengths.put(slot, np.array([len(word) - 1 for word in words], np.int32))
            self._word_lasts.put(slot, np.array([word[-1] for word in words], np.int32))
            self._word_prefixes.put(slot, np.array([token for word in words for token in word[:-1]], np.int32))
        if guide is not None:
            self._guides[slot] = guide

    def guided_rows(self, slots: Slots) -> Slots:
        """Indices into `slots` of the rows under a grammar."""
        if not self._guides:
            return _NO_ROWS
        return np.flatnonzero(self._wishes[slots] & _GRAMMAR)

    def advance(self, slot: int, token: int) -> None:
        """Move the row's grammar on. Raises GrammarError."""
        self._guides[slot].advance(token)

    def empty(self, slot: int) -> None:
        """The row belongs to nobody."""
        if not self._wishes[slot]:
            return
        self.active -= 1
        self.reading -= int(self._wishes[slot]) & _READING != 0
        self._wishes[slot] = 0
        self.min_tokens[slot] = self._early[slot] = 0
        self._guides.pop(slot, None)
        self._penalties[:, slot] = (0.0, 0.0, 1.0)
        rows = (self._prompts, self._bias_ids, self._allowed, self._stops)
        for arena in (*rows, self._word_prefixes, self._word_lengths, self._word_lasts):
            arena.clear(slot)
        self._bias_values.clear(slot)

    def batch(self, slots: Slots) -> LogitEdits | None:
        """The edits of the rows that sample in this step, in their order; None where there is nothing to do."""
        if not self.active:
            return None
        wishes = self._wishes[slots]
        if not wishes.any():
            return None
        presence, frequency, repetition = self._penalties.take(slots, axis=1)
        prompts = self._prompt_length[slots]
        generated_counts = np.where(wishes & _PENALTIES, self._length[slots] - prompts, 0)
        generated, generated_offsets = gather_ranges(self._tokens, self._row_starts[slots] + prompts, generated_counts)
        prompt, prompt_offsets = self._prompts.take(slots)
        bias_ids, bias_offsets = self._bias_ids.take(slots)
        banned, banned_offsets = self._banned(slots, wishes)
        allowed, allowed_offsets = self._allowed.take(slots)
        masked = self.guided_rows(slots)
        if not (len(generated) or len(prompt) or len(bias_ids) or len(banned) or len(allowed) or len(masked)):
            return None
        return LogitEdits(
            presence=presence,
            frequency=frequency,
            repetition=repetition,
            generated=generated,
            generated_offsets=generated_offsets,
            prompt=prompt,
            prompt_offsets=prompt_offsets,
            bias_ids=bias_ids,
            bias_values=self._bias_values.take(slots)[0],
            bias_offsets=bias_offsets,
            banned=banned,
            banned_offsets=banned_offsets,
            allowed=allowed,
            allowed_offsets=allowed_offsets,
            masked_rows=masked.astype(np.int32),
            masks=np.stack([self._guides[slot].mask for slot in slots[masked].tolist()]) if len(masked) else _NO_MASKS,
        )

    def _banned(self, slots: Slots, wishes: NDArray[np.uint8]) -> tuple[I32, I32]:
        """Tokens that may not come next, and where each row's begin."""
        early = (wishes & _MIN_TOKENS).astype(bool)
        early &= self._length[slots] - self._prompt_length[slots] < self._early[slots]
        stop_rows = np.flatnonzero(early)
        stops, offsets = self._stops.take(slots[stop_rows])
        rows = np.repeat(stop_rows, np.diff(offsets))
        word_rows = np.flatnonzero(wishes & _BAD_WORDS)
        if not len(word_rows):
            return stops, offsets_of(np.bincount(rows, minlength=len(slots)))
        words, rows_of_words = self._completed_words(slots, word_rows)
        rows = np.concatenate((rows, rows_of_words))
        banned = np.concatenate((stops, words))[np.argsort(rows, kind="stable")]
        return banned, offsets_of(np.bincount(rows, minlength=len(slots)))

    def _completed_words(self, slots: Slots, rows: Slots) -> tuple[I32, Slots]:
        """Last tokens of the bad words of which `rows` (of `slots`) hold all that comes before; and whose they are."""
        of = slots[rows]
        lengths, offsets = self._word_lengths.take(of)
        lasts, prefixes = self._word_lasts.take(of)[0], self._word_prefixes.take(of)[0]
        row_of = np.repeat(rows, np.diff(offsets))
        slot_of = slots[row_of]
        fits = lengths <= self._length[slot_of]
        prefixes = prefixes[np.repeat(fits, lengths)]
        compared = np.where(fits, lengths, 0)
        context, _ = gather_ranges(self._tokens, self._row_starts[slot_of] + self._length[slot_of] - compared, compared)
        word_of = np.repeat(np.arange(len(lengths)), compared)
        misses = np.bincount(word_of[context != prefixes], minlength=len(lengths))
        complete = fits & (misses == 0)
        return lasts[complete], row_of[complete]


def _wishes_of(sampling: SamplingParams) -> int:
    wishes = 0
    if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1:
        wishes |= _PENALTIES
    if sampling.bad_words:
        wishes |= _BAD_WORDS
    if sampling.min_tokens and sampling.stop_token_ids:
        wishes |= _MIN_TOKENS
    if sampling.logit_bias or sampling.allowed_token_ids is not None:
        wishes |= _LISTS
    return wishes


def _distinct(tokens: Tokens) -> I32:
    return np.unique(np.array(tokens, np.int32))
