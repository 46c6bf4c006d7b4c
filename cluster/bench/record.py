"""One JSON line per request of a run, so that every figure can be derived again later.

Written by `commands/bench.py` on demand. Seconds count from the first scheduled time; no prompt, no text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from penstock.cluster.bench.event_stream import Outcome


def write_record(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Scheduled, sent, first token, every chunk, end, tokens, cached tokens and error of each request."""
    origin = min((outcome.scheduled for outcome in outcomes), default=0.0)
    with path.open("w", encoding="utf-8") as lines:
        for outcome in outcomes:
            lines.write(json.dumps(_line(outcome, origin)) + "\n")


def _line(outcome: Outcome, origin: float) -> dict[str, object]:
    chunks = [round(at - origin, 6) for at in outcome.chunks]
    return {
        "scheduled_s": round(outcome.scheduled - origin, 6),
        "sent_s": round(outcome.sent - origin, 6) if outcome.sent else None,
        "first_token_s": chunks[0] if chunks else None,
        "chunks_s": chunks,
        "end_s": chunks[-1] if chunks else None,
        "input_tokens": outcome.input_tokens,
        "output_tokens": outcome.output_tokens,
        "cached_tokens": outcome.cached_tokens,
        "error": outcome.error,
    }
