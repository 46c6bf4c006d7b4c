"""Times one HTTP request and tells the metrics: first token, gaps, whole.

Made by `app.py` when a request arrives. Gaps are between two reads of the same choice, as clients see them.
"""

from __future__ import annotations

import time

from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.choices import Tally
from penstock.cluster.metrics import Metrics


class Stopwatch:
    """Monotonic times of one request."""

    __slots__ = ("_arrived", "_first", "_last", "_metrics")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived = time.perf_counter()
        self._first: float | None = None
        self._last: dict[int, float] = {}

    def piece(self, piece: Piece) -> None:
        """A choice has something new."""
        now = time.perf_counter()
        before = self._last.get(piece.index)
        self._last[piece.index] = now
        if before is not None:
            self._metrics.inter_token_latency.observe(now - before)
        elif self._first is None:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._arrived)
        if piece.finish_reason is not None:
            self._metrics.request_success.labels(piece.finish_reason).inc()

    def finish(self, tally: Tally) -> None:
        """The whole request was answered."""
        metrics, elapsed = self._metrics, time.perf_counter() - self._arrived
        metrics.e2e_latency.observe(elapsed)
        if self._first is not None and tally.completion > len(self._last):
            decode = elapsed - (self._first - self._arrived)
            metrics.time_per_output_token.observe(decode * len(self._last) / (tally.completion - len(self._last)))
        metrics.request_prompt_tokens.observe(tally.prompt)
        metrics.request_generation_tokens.observe(tally.completion)
        metrics.prompt_tokens.inc(tally.prompt)
        metrics.prompt_tokens_cached.inc(tally.cached)
        metrics.generation_tokens.inc(tally.completion)
