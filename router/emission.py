"""The tokens of one choice on their way from workers to the reader: applied by index, handed out once, in order.

A link calls `apply` for every token row that a worker reports, the reader calls `take`, the request path starts
attempts. Rows may arrive late, twice, or a later one before an earlier one; rows of an attempt that is no longer
current are ignored. What is said of the prompt (its logprobs, its embedding) is kept beside the tokens; workers send it
before the first of them. Pure: no clock, no I/O, no knowledge of workers.

Invariants: `tokens` only grows and has no gap; every token is handed out by `take` exactly once; after `ended`
nothing changes; what is held out of order is bounded by the choice's `max_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.router.logprobs import UNKNOWN, PromptScores, TokenLogprob
from penstock.router.trail import Trail
from penstock.workers.protocol import EndReason, GenerateRequest, PromptLogprobs, Tokens

__all__ = ["Delta", "Emission", "TokenLogprob"]


@dataclass(frozen=True, slots=True)
class Delta:
    """Everything new since the last read; `logprobs` is as long as `tokens`, or None where nobody asked."""

    tokens: Tokens
    logprobs: tuple[TokenLogprob, ...] | None
    end: EndReason


@dataclass(frozen=True, slots=True)
class _HeldRow:
    tokens: Sequence[int]
    end: int
    logprobs: Sequence[TokenLogprob] | None


class Emission:
    """One choice's output. `on_progress` is called (from the applying thread) when `take` has something new."""

    def __init__(
        self,
        max_tokens: int,
        emitted: Tokens = (),
        *,
        logprobs: bool = False,
        on_progress: Callable[[], None] | None = None,
        scores: PromptScores | None = None,
    ) -> None:
        self.tokens: list[int] = list(emitted)  # all generated tokens so far, without gaps
        self.end = EndReason.NONE
        self.attempt = 0
        self.cached_tokens = 0  # of the first attempt's context; set by the request path
        self.trail = Trail()  # of the request these tokens answer; written by the request path
        self.ignored_rows = 0  # rows that were stale, malformed or past the end
        self.embedding: NDArray[np.float32] | None = None  # of the prompt, where the request asks; see `Embedding`
        self.on_progress = on_progress
        self._max_tokens = max_tokens
        self._scores = scores
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None  # of tokens that are not handed out yet
        self._taken = len(emitted)
        self._end_taken = False
        self._held: dict[int, _HeldRow] = {}
        self._held_tokens = 0
        self._successor: int | None = None  # attempt that is to take over where the current one stops
        self._on_taken_over: Callable[[], None] | None = None
        self._early: list[tuple[int, _HeldRow]] = []  # rows of the successor behind what is out
        self._mark = 0  # count at which `_on_mark` is called
        self._on_mark: Callable[[], None] | None = None

    @staticmethod
    def for_request(request: GenerateRequest, on_progress: Callable[[], None] | None = None) -> Emission:
        """The emission that fits a request."""
        sampling = request.sampling
        wants, alternatives = sampling.logprobs is not None, sampling.prompt_logprobs
        scores = None if alternatives is None else PromptScores(len(request.prompt), alternatives)
        return Emission(sampling.max_tokens, request.emitted, logprobs=wants, on_progress=on_progress, scores=scores)

    @property
    def count(self) -> int:
        """Tokens generated so far, without gaps, `emitted` included."""
        return len(self.tokens)

    @property
    def ended(self) -> bool:
        """True once the end row and everything before it have been applied."""
        return self.end is not EndReason.NONE

    @property
    def pending(self) -> bool:
        """True when `take` has something new to hand out."""
        return self._taken < len(self.tokens) or (self.ended and not self._end_taken)

    @property
    def scored(self) -> bool:
        """True once every prompt token has its logprob; at once where nobody asked."""
        return self._scores is None or self._scores.complete

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """One entry per prompt token, None for the first; empty when not asked. Final once the first token is out."""
        return () if self._scores is None else self._scores.read()

    def begin_attempt(self, attempt: int) -> None:
        """From now on only rows of `attempt` count; what older ones sent ahead of a gap is dropped."""
        self.attempt = attempt
        self._held.clear()
        self._held_tokens = 0
        self._on_mark = None
        self.forget_successor()

    def expect_successor(self, attempt: int, on_taken_over: Callable[[], None]) -> None:
        """Rows of `attempt` count from where they continue what is out; from then on it is the current one."""
        self._successor, self._on_taken_over = attempt, on_taken_over

    def forget_successor(self) -> None:
        """The current attempt goes on."""
        self._successor = self._on_taken_over = None
        self._early.clear()

    def notify_at(self, count: int, callback: Callable[[], None]) -> None:
        """Call `callback` once, as soon as `count` tokens are there (at once if they are), unless an attempt begins
        before. It replaces the callback set before it."""
        self._on_mark = None
        if len(self.tokens) >= count:
            callback()
            return
        self._mark, self._on_mark = count, callback

    def conclude(self, end: EndReason) -> None:
        """End the choice with the tokens that are there: its last row was lost, but nothing can follow it."""
        self.end = end
        self._held.clear()
        self._held_tokens = 0
        if self.on_progress is not None:
            self.on_progress()

    def apply(
        self,
        attempt: int,
        start: int,
        tokens: Sequence[int],
        end: int = 0,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> bool:
        """Take in one row: `tokens[i]` is generated token `start + i`; `end` is an `EndReason` value.

        Returns True if this row completed the choice (exactly once). Never raises on rows from the wire.
        """
        if attempt != self.attempt and self._succeeds(attempt, start, _HeldRow(tokens, end, logprobs)):
            return self._take_over()
        if attempt != self.attempt or self.end is not EndReason.NONE:
            self.ignored_rows += 1
            return False
        have = len(self.tokens)
        ragged = logprobs is not None and len(logprobs) != len(tokens)
        if start < 0 or start + len(tokens) > self._max_tokens or ragged:
            self.ignored_rows += 1
            return False
        if start > have:
            self._hold(start, _HeldRow(tokens, end, logprobs))
            return False
        self._append(start, tokens, end, logprobs)
        if self._held:
            self._release_held()
        if self._early and not self.ended and self._early[0][0] <= len(self.tokens):
            return self._take_over()
        if len(self.tokens) == have and not self.ended:
            return False
        if self._on_mark is not None and len(self.tokens) >= self._mark:
            callback, self._on_mark = self._on_mark, None
            callback()
        if self.on_progress is not None:
            self.on_progress()
        return self.ended

    def apply_scores(self, message: PromptLogprobs) -> None:
        """Take in logprobs of prompt tokens. Never raises on what comes from the wire."""
        current = message.attempt == self.attempt and not self.ended
        if not current or self._scores is None or not self._scores.apply(message):
            self.ignored_rows += 1

    def apply_embedding(self, attempt: int, values: NDArray[np.float32]) -> None:
        """Take in the prompt's embedding."""
        if attempt != self.attempt or self.ended:
            self.ignored_rows += 1
            return
        self.embedding = values

    def take(self) -> Delta:
        """All tokens since the last call; empty with `EndReason.NONE` if there is nothing new."""
        start, stop = self._taken, len(self.tokens)
        self._taken = stop
        self._end_taken = self.ended
        logprobs = None
        if self._logprobs is not None:
            logprobs = tuple(self._logprobs)
            self._logprobs.clear()
        return Delta(tuple(self.tokens[start:stop]), logprobs, self.end)

    def check_integrity(self) -> None:
        """Raises ValueError when an invariant does not hold."""
        if self._logprobs is not None and len(self._logprobs) != len(self.tokens) - self._taken:
            raise ValueError("logprobs and tokens differ in length")
        if any(start <= len(self.tokens) for start in self._held):
            raise ValueError("a row is held that could be applied")
        if self._held_tokens != sum(len(row.tokens) for row in self._held.values()):
            raise ValueError("held token count is off")
        if not 0 <= self._taken <= len(self.tokens) <= self._max_tokens:
            raise ValueError("read position is outside the tokens")

    def _succeeds(self, attempt: int, start: int, row: _HeldRow) -> bool:
        """Whether the successor's row continues what is out. One that lies behind it is kept until it does.

        Where the current attempt has gone beyond it, or differs, both run: then the current one is believed.
        """
        if attempt != self._successor or self.ended or not 0 <= start <= self._max_tokens - len(row.tokens):
            return False
        known = self.tokens[start:]
        if start > len(self.tokens):
            if len(self._early) < self._max_tokens:
                self._early.append((start, row))
            return False
        if self._early or len(known) > len(row.tokens) or list(row.tokens[: len(known)]) != known:
            return False
        self._early.append((start, row))
        return True

    def _take_over(self) -> bool:
        """The successor is the current attempt from here on. True if its rows complete the choice."""
        early, callback = list(self._early), self._on_taken_over
        attempt = self._successor
        if attempt is None or callback is None:
            return False
        self.attempt = attempt
        self._held.clear()
        self._held_tokens = 0
        self.forget_successor()
        callback()
        completed = [self.apply(attempt, start, row.tokens, row.end, row.logprobs) for start, row in early]
        return any(completed)

    def _append(self, start: int, tokens: Sequence[int], end: int, logprobs: Sequence[TokenLogprob] | None) -> None:
        """Append what is new of a row that starts at or before the next index; the end counts if it is not beyond."""
        known = len(self.tokens) - start
        if end and start + len(tokens) < len(self.tokens):
            self.ignored_rows += 1  # an end before tokens that are already out cannot be true
            return
        if known < len(tokens):
            self.tokens.extend(tokens[known:])
            if self._logprobs is not None:
                self._logprobs.extend(logprobs[known:] if logprobs is not None else [UNKNOWN] * (len(tokens) - known))
        if end:
            self.end = EndReason(end) if end in (EndReason.STOP, EndReason.LENGTH) else EndReason.STOP
            self._held.clear()
            self._held_tokens = 0

    def _hold(self, start: int, row: _HeldRow) -> None:
        """Keep a row that came before its predecessors, the longer one of repeats; at most `max_tokens` tokens."""
        before = self._held.get(start)
        if before is not None and (len(before.tokens), before.end) >= (len(row.tokens), row.end):
            return
        grown = self._held_tokens + len(row.tokens) - (len(before.tokens) if before is not None else 0)
        if grown > self._max_tokens:
            self.ignored_rows += 1
            return
        self._held_tokens = grown
        self._held[start] = row

    def _release_held(self) -> None:
        """Apply held rows that the tokens now reach."""
        while self._held and not self.ended:
            ready = [start for start in self._held if start <= len(self.tokens)]
            if not ready:
                return
            for start in sorted(ready):
                row = self._held.pop(start, None)
                if row is not None:
                    self._held_tokens -= len(row.tokens)
                    self._append(start, row.tokens, row.end, row.logprobs)
