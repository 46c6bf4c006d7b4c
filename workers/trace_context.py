"""W3C trace context: which trace a request belongs to, and which span is the parent of what happens next.

Routers and workers carry it as text in `GenerateRequest.traceparent`; `tracing.py` here and in `cluster/` make spans
of it. Ids of spans below a given one are derived from it and a label, so both ends of a link know them without
telling each other. Pure; knows no tracing library.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

_HEADER = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]([0-9a-f])\Z")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span of one sampled trace: 128 and 64 bits, neither zero."""

    trace_id: int
    span_id: int

    def header(self) -> str:
        """The `traceparent` that names this span as the parent."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"

    def child(self, label: str) -> TraceContext:
        """The span below this one that `label` names; the same for everyone who asks."""
        seed = f"{self.trace_id:032x}{self.span_id:016x}{label}".encode()
        derived = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big")
        return TraceContext(self.trace_id, derived or 1)


def sampled_parent(header: str) -> TraceContext | None:
    """The span that `header` names; None when it is absent, malformed, or of a trace that is not sampled."""
    found = _HEADER.match(header)
    if found is None or not int(found[3], 16) & _SAMPLED:
        return None
    context = TraceContext(int(found[1], 16), int(found[2], 16))
    return context if context.trace_id and context.span_id else None


def is_trace_header(header: str) -> bool:
    """True for a well-formed `traceparent`, sampled or not."""
    found = _HEADER.match(header)
    return found is not None and bool(int(found[1], 16)) and bool(int(found[2], 16))
