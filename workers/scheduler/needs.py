"""What a request must have beside blocks before it can be computed: a grammar's guide, an adapter.

Part of the scheduler, which asks on submission whether this worker can have it at all, and on admission whether it
came. Both are prepared elsewhere while the request waits in the queue, so no step waits for them.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from penstock.workers.protocol import FailureCode, GenerateRequest
from penstock.workers.scheduler.adapters import Adapters, LoadedAdapter
from penstock.workers.scheduler.admission import Refusal
from penstock.workers.scheduler.grammars import Guide, Guides
from penstock.workers.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Needs:
    """Who gives what requests need; None: nobody does on this worker."""

    grammars: Guides | None
    adapters: Adapters | None

    def refusal(self, request: GenerateRequest) -> Refusal | None:
        """Why this worker can never have what the request needs; None if it can."""
        if request.sampling.grammar is not None and self.grammars is None:
            return FailureCode.BAD_REQUEST, "structured output: this worker follows no grammars"
        if request.adapter is not None and self.adapters is None:
            return FailureCode.ADAPTER, "this worker serves no adapters"
        return None

    def guide(self, request: GenerateRequest) -> Future[Guide] | None:
        """What keeps the text to its grammar, to come."""
        grammar = request.sampling.grammar
        return None if grammar is None or self.grammars is None else self.grammars.begin(grammar, request.emitted)

    def adapter(self, request: GenerateRequest) -> Future[LoadedAdapter] | None:
        """The adapter, to come."""
        return None if request.adapter is None or self.adapters is None else self.adapters.begin(request.adapter)


def unmet(sequence: Sequence) -> Refusal | None:
    """Why what the sequence waited for will not come; None if all is there."""
    if sequence.guided is not None and (problem := sequence.guided.exception()) is not None:
        return FailureCode.BAD_REQUEST, f"structured output: {problem}"
    if sequence.adapted is not None and (problem := sequence.adapted.exception()) is not None:
        return FailureCode.ADAPTER, str(problem)
    return None
