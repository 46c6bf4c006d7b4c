"""What a placement policy sees of one worker for one request, and the shape every policy has.

Used by `placement.py` and all policies. All counts are beliefs; costs are in prefill tokens, lower is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from penstock.router.settings import PlacementSettings


class Phase(Enum):
    """What the worker would do with the request."""

    PREFILL = "prefill"  # compute the prompt, hand the KV over
    DECODE = "decode"  # receive the KV, generate
    LOCAL = "local"  # both


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker, one request, one phase."""

    worker_id: str
    phase: Phase
    context_tokens: int
    uncached_tokens: int  # of the context, that this worker would have to compute or receive
    queued_tokens: int  # prefill tokens ahead of it
    sequences: int  # running and waiting there
    max_sequences: int
    free_tokens: int  # KV room
    total_tokens: int
    recent_work: float  # tokens placed there lately, less the fleet's least
    slowness: float = 1.0  # time that it takes for a prompt token, against the fleet's fastest worker

    @property
    def has_room(self) -> bool:
        """True when the request would probably start at once."""
        return self.sequences < self.max_sequences and self.uncached_tokens <= self.free_tokens

    @property
    def standing(self) -> int:
        """Sequences that wait there for a place already."""
        return max(0, self.sequences - self.max_sequences)


class Policy(Protocol):
    """How a candidate is scored."""

    def __init__(self, settings: PlacementSettings) -> None: ...

    def cost(self, candidate: Candidate) -> float:
        """Cost of choosing it; lower is better. Pure."""
        ...
