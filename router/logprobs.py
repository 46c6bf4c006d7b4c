"""Logprobs as a choice's reader gets them: of one token, and of a whole prompt while it comes in.

`emission.py` keeps them per choice, the links fill them, the HTTP front reads them. Pure; knows no workers.

Invariant: the scores of a prompt take a bounded number of bytes, arrays of 6 + 8 * alternatives bytes per prompt token,
until somebody reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.workers.protocol import PromptLogprobs


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token and of the most likely alternatives in its place, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


UNKNOWN = TokenLogprob(float("nan"))


class PromptScores:
    """Logprobs of the `num_tokens` tokens of a prompt with at most `alternatives` beside each, applied by index.

    Nothing precedes the first token, so it has none. A token that is scored twice keeps what came last.
    """

    def __init__(self, num_tokens: int, alternatives: int) -> None:
        self._alternatives = alternatives
        self._known = np.zeros(num_tokens, np.bool_)
        self._known[:1] = True
        self._missing = max(0, num_tokens - 1)
        self._logprobs = np.full(num_tokens, np.nan, np.float32)
        self._counts = np.zeros(num_tokens, np.uint8)
        self._ids = np.zeros((num_tokens, alternatives), np.int32)
        self._values = np.zeros((num_tokens, alternatives), np.float32)

    @property
    def complete(self) -> bool:
        """True once every token but the first is scored."""
        return self._missing == 0

    def apply(self, message: PromptLogprobs) -> bool:
        """Take in a piece. False, and nothing changes, where it does not fit the prompt. Never raises."""
        start, stop = message.start, message.start + len(message.logprobs)
        counts = message.top_counts
        if stop > len(self._known) or (len(counts) and int(counts.max()) > self._alternatives):
            return False
        wanted = np.arange(self._alternatives) < counts[:, None]
        self._logprobs[start:stop] = message.logprobs
        self._counts[start:stop] = counts
        self._ids[start:stop][wanted] = message.top_ids
        self._values[start:stop][wanted] = message.top_logprobs
        self._known[start:stop] = True
        self._missing = len(self._known) - int(np.count_nonzero(self._known))
        return True

    def read(self) -> tuple[TokenLogprob | None, ...]:
        """One entry per token; None for the first. NaN and no alternatives where no score has come."""
        ids, values, counts = self._ids.tolist(), self._values.tolist(), self._counts.tolist()
        rows = zip(self._logprobs.tolist(), counts, ids, values, strict=True)
        scores: list[TokenLogprob | None] = [
            TokenLogprob(logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
            for logprob, count, row_ids, row_values in rows
        ]
        return (None, *scores[1:]) if scores else ()
