"""Whole choices, collected from their pieces, and the best of them where more were generated than asked for.

Used by `service.py`. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.choice_text import Piece
from penstock.router.emission import TokenLogprob


@dataclass(slots=True)
class CallResult:
    """One tool call of a choice, and the text of its arguments in pieces."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ChoiceResult:
    """One choice. `logprobs` is empty where nobody asked."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[CallResult] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Append one piece."""
        self.text.append(piece.text)
        self.tokens.extend(piece.tokens)
        self.logprobs.extend(piece.logprobs or ())
        for call in piece.calls:
            if call.dropped:
                del self.calls[call.index]
                continue
            if call.id:
                self.calls.append(CallResult(call.id, call.name))
            self.calls[call.index].arguments.append(call.arguments)
        self.finish_reason = piece.finish_reason

    @property
    def cumulative_logprob(self) -> float:
        """Of the whole choice; minus infinity where it is not known."""
        total = math.fsum(entry.logprob for entry in self.logprobs)
        return total if math.isfinite(total) else -math.inf


def best_results(call: Call, results: Sequence[ChoiceResult]) -> list[ChoiceResult]:
    """Of every prompt's runs the `n` with the highest cumulative logprob, best first; in order where all are kept."""
    if call.runs == call.n:
        return list(results)
    chosen: list[ChoiceResult] = []
    for first in range(0, call.num_runs, call.runs):
        ranked = sorted(results[first : first + call.runs], key=lambda r: r.cumulative_logprob, reverse=True)
        chosen += ranked[: call.n]
    return chosen
