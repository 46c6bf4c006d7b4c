"""What a benchmark sends and when: requests with lengths, arrival times and the structure of their prompts.

Built by `traces.py` and `sessions.py` here, and by `commands/bench.py`; sent by `runner.py`. Pure: seeds come in, the
same seed gives the same load, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIRST_ID = 8  # smaller ids are often special tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of prompt tokens that other prompts may hold too: equal `content` means equal tokens."""

    content: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of the plan.

    `at_s` counts from the start. The prompt is `pieces`, then seeded tokens of its own up to `input_tokens`. A turn
    of a conversation names the turn it follows in `after`: it is sent `think_s` after that one's answer (never before
    `at_s`), and its prompt is that turn's prompt and answer followed by the `input_tokens` of this one.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    pieces: tuple[Piece, ...] = ()
    after: int | None = None
    think_s: float = 0.0


def fixed_plan(count: int, input_tokens: int, output_tokens: int, arrivals: Sequence[float]) -> list[Planned]:
    """Requests of one size."""
    return [Planned(arrivals[i], input_tokens, output_tokens) for i in range(count)]


def prompt_tokens(planned: Planned, number: int, vocab_size: int, seed: int) -> list[int]:
    """The request's own tokens: random ids, the shared pieces equal wherever they stand."""
    low, high = min(FIRST_ID, vocab_size - 1), vocab_size
    tokens: list[int] = []
    for piece in planned.pieces:
        tokens += np.random.default_rng((seed, 1, *piece.content)).integers(low, high, piece.tokens).tolist()
    missing = planned.input_tokens - len(tokens)
    if missing > 0:
        tokens += np.random.default_rng((seed, 2, number)).integers(low, high, missing).tolist()
    return tokens[: planned.input_tokens]
