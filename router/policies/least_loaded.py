"""Load only, blind to prefixes: the baseline that prefix-aware placement is compared with."""

from __future__ import annotations

from penstock.router.policies.candidate import Candidate, Phase
from penstock.router.settings import PlacementSettings


class LeastLoaded:
    """Fewest queued prefill tokens, or fewest sequences where it decodes."""

    def __init__(self, settings: PlacementSettings) -> None:
        self._balance = settings.balance

    def cost(self, candidate: Candidate) -> float:
        """In prefill tokens; the whole context counts, cached or not."""
        fullness = (candidate.sequences + 1) / candidate.max_sequences * candidate.context_tokens
        if candidate.phase is Phase.DECODE:
            return fullness
        tokens = candidate.context_tokens + candidate.queued_tokens
        return candidate.slowness * tokens + self._balance * candidate.recent_work
