"""What a worker does, counted since its start, and told to its tracer where requests are traced.

The engine and its hand-overs report here, on the engine thread; the heartbeat reads `totals` from its own. Counting
costs a few additions per step and nothing per token. Knows no messages, no sockets.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from penstock.workers.audit import AuditLog
from penstock.workers.protocol import FailureCode, GenerateRequest
from penstock.workers.scheduler.events import (
    EndedEvent,
    GrantedEvent,
    RefusedEvent,
    SchedulerEvent,
    SequenceKey,
    StartedEvent,
    StepOutcome,
    Work,
)
from penstock.workers.totals import (
    STEP_TOKENS_UP_TO,
    TRANSFER_S_UP_TO,
    AdapterTotals,
    GrammarTotals,
    GroupTotals,
    TierTotals,
    TransferCause,
    WeightFigures,
    WorkerTotals,
)
from penstock.workers.tracing import WorkerTracer

_CAUSES = {cause: index for index, cause in enumerate(TransferCause)}


class Observation:
    """Counters of one worker. `block_bytes`: of one KV block; `weights` counts for itself."""

    def __init__(
        self,
        block_bytes: int = 0,
        tracer: WorkerTracer | None = None,
        clock: Callable[[], float] = time.monotonic,
        group: Callable[[], GroupTotals] = GroupTotals,
        weights: Callable[[], WeightFigures] = WeightFigures,
        grammars: Callable[[], GrammarTotals] = GrammarTotals,
        tiers: Callable[[], TierTotals] = TierTotals,
        adapters: Callable[[], AdapterTotals] = AdapterTotals,
        audit: AuditLog | None = None,
    ) -> None:
        """`group` tells of the ranks, where there are several; from any thread. `audit`: where a ledger is kept."""
        self.audit = audit
        self._group = group
        self._grammars = grammars
        self._tiers = tiers
        self._adapters = adapters
        self._block_bytes = block_bytes
        self._tracer = tracer
        self._clock = clock
        self._weights = weights
        self._steps = [0] * (len(STEP_TOKENS_UP_TO) + 1)
        self._step_tokens = self._generated = self._prompt = self._cached = 0
        self._step_s = 0.0
        self._sent = [0] * (len(TRANSFER_S_UP_TO) + 1)
        self._sent_s = 0.0
        self._sent_bytes = self._received = self._leases = 0
        self._failures = [0] * len(_CAUSES)
        self._sending: dict[SequenceKey, tuple[int, float | None]] = {}  # blocks granted, time of the first offer

    def totals(self, reserved: int = 0, blocks_lost: int = 0) -> WorkerTotals:
        """The counters so far; from any thread. `reserved` and `blocks_lost` are the engine's own figures."""
        group, weights = self._group(), self._weights()
        return WorkerTotals(
            reserved=reserved,
            steps_by_tokens=tuple(self._steps),
            step_tokens=self._step_tokens,
            step_s=self._step_s,
            generated_tokens=self._generated,
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            transfers_by_s=tuple(self._sent),
            transfer_s=self._sent_s,
            transfer_bytes=self._sent_bytes,
            transfers_received=self._received,
            transfer_failures=tuple(self._failures),
            router_leases_expired=self._leases,
            grammars=self._grammars(),
            tiers=self._tiers(),
            adapters=self._adapters(),
            blocks_lost=blocks_lost,
            ranks_lost=group.ranks_lost,
            experts_gone=group.experts_gone,
            expert_skew=group.expert_skew,
            weights_from_peers=weights.from_peers,
            weights_from_disk=weights.from_disk,
            weights_load_s=weights.load_s,
            weights_served=weights.served,
            spans_dropped=0 if self._tracer is None else self._tracer.dropped,
        )

    # --- requests and steps ---------------------------------------------------------------------------------------

    def received(self, key: SequenceKey, work: Work, request: GenerateRequest, now: float) -> None:
        """A router asks for something."""
        if self.audit is not None:
            self.audit.received(key, request.request_id)
        if self._tracer is not None and request.traceparent:
            self._tracer.begin(key, work, request, now)

    def happened(self, event: SchedulerEvent) -> None:
        """The scheduler decided something."""
        if self.audit is not None:
            self.audit.happened(event)
        if isinstance(event, StartedEvent):
            self._prompt += event.context_tokens
            self._cached += event.cached_tokens
        tracer = self._tracer
        if tracer is None or not tracer.active:
            return
        now = self._clock()
        match event:
            case StartedEvent(key, cached):
                tracer.started(key, cached, now)
            case GrantedEvent(key):
                tracer.granted(key, event.cached_tokens, now)
            case EndedEvent(key):
                tracer.over(key, "", now)
            case RefusedEvent(key, code):
                tracer.over(key, code, now)

    def stepped(self, num_tokens: int, outcome: StepOutcome, began: float, ended: float) -> None:
        """A step was computed and committed."""
        self._steps[bisect_left(STEP_TOKENS_UP_TO, num_tokens)] += 1
        self._step_tokens += num_tokens
        self._step_s += max(0.0, ended - began)  # a clock that was set back must not make a total that is refused
        self._generated += len(outcome.tokens)
        if self.audit is not None:
            self.audit.stepped(outcome)
        if self._tracer is not None and self._tracer.active:
            self._tracer.rows(outcome, began, ended)

    def over(self, key: SequenceKey, code: FailureCode) -> None:
        """The sequence failed or was cancelled."""
        if self.audit is not None:
            self.audit.over(key, code)
        if self._tracer is not None and self._tracer.active:
            self._tracer.over(key, code, self._clock())

    def lease_expired(self) -> None:
        """A router did not renew its lease."""
        self._leases += 1

    # --- transfers ------------------------------------------------------------------------------------------------

    def sending(self, key: SequenceKey, blocks: int) -> None:
        """A session towards a granter of so many blocks is open."""
        self._sending[key] = (blocks, None)

    def offered(self, key: SequenceKey) -> None:
        """Blocks, or the end, of a session are on their way; the first time counts."""
        blocks, began = self._sending.get(key, (0, 0.0))
        if began is None:
            self._sending[key] = (blocks, self._clock())

    def sent(self, key: SequenceKey, now: float, cause: TransferCause | None = None) -> None:
        """The session is over: whole, or for this cause."""
        blocks, began = self._sending.pop(key, (0, None))
        size = blocks * self._block_bytes
        if cause is not None:
            self._failures[_CAUSES[cause]] += 1
        else:
            seconds = 0.0 if began is None else max(0.0, now - began)
            self._sent[bisect_left(TRANSFER_S_UP_TO, seconds)] += 1
            self._sent_s += seconds
            self._sent_bytes += size
        if self._tracer is not None:
            self._tracer.sent(key, (now if began is None else began, now), (blocks, size), cause)

    def arrived(self, key: SequenceKey, now: float, cause: TransferCause | None = None) -> None:
        """A granted session is over: its KV is here, or will not come for this cause."""
        if cause is not None:
            self._failures[_CAUSES[cause]] += 1
            return
        self._received += 1
        if self._tracer is not None and self._tracer.active:
            self._tracer.arrived(key, now)
