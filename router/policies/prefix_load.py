"""The default policy: uncached tokens plus what stands before them, evened out over time.

A request costs a prefilling worker what it must compute, and at a lower weight what is queued there: a wait passes,
but a prefix computed on a second worker is work for all. A decoding worker is chosen by how full it gets, and by how
much of the KV need not travel. Recently placed work, at a small weight, decides between equals, so that new
conversations go where least has gone while a long cached prefix still outweighs it. Tokens are those of the fleet's
fastest worker: one that takes ten times as long for each, such as a decode worker with large batches and little room
for prompts beside them, costs ten times as much.
"""

from __future__ import annotations

from penstock.router.policies.candidate import Candidate, Phase
from penstock.router.settings import PlacementSettings

_TRANSFER_SHARE = 0.05  # a token received costs about this much of a token computed
_FULL_PENALTY = 4.0  # contexts' worth of cost for a worker that would have to queue the request


class PrefixLoad:
    """Uncached tokens and load."""

    def __init__(self, settings: PlacementSettings) -> None:
        self._queue_weight = settings.queue_weight
        self._balance = settings.balance

    def cost(self, candidate: Candidate) -> float:
        """In prefill tokens."""
        wait = 0.0 if candidate.has_room else _FULL_PENALTY * (1 + candidate.standing) * candidate.context_tokens
        if candidate.phase is Phase.DECODE:
            used = candidate.total_tokens - candidate.free_tokens + candidate.uncached_tokens
            fullness = max(used / candidate.total_tokens, (candidate.sequences + 1) / candidate.max_sequences)
            return _TRANSFER_SHARE * candidate.uncached_tokens + fullness * candidate.context_tokens + wait
        if candidate.phase is Phase.PREFILL:
            wait = 0.0  # a prefilling worker's queue is in tokens
        tokens = candidate.uncached_tokens + self._queue_weight * candidate.queued_tokens
        return candidate.slowness * tokens + self._balance * candidate.recent_work + wait
