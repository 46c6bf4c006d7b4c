"""Who runs in the next step: the scheduler of one worker. Pure state: a clock and requests in, plans and events out.

The engine (`workers/engine.py`) calls it from one thread: `submit`, `cancel`, `kv_*` as messages come, then in turn
`plan` -> run -> `commit` (or `abort_step`), and `take_events` after each. It knows no routers' streams, no transfer
sessions, no tensors. The parts: `admission` (can it ever run), `waiting` (who is next), `roster` (who is where),
`memory` (blocks), `chunked` (how many tokens), `preemption` (who gives way), `handover` (grants and offers), `moving`
(who goes on elsewhere), `outcome` (what the sampled tokens mean), `scoring` (prompt logprobs and embeddings), `edits`
(what is done to logits), `grammars` (what keeps a text to its grammar), `adapters` (who is computed with which),
`needs` (whether both can be had), `tier_loads` (what comes back from host memory or disk), `table` (state as columns),
`integrity` (the checks).

A key lives from `submit` to exactly one of: an end in a `StepOutcome` row, `EndedEvent`, `RefusedEvent`, a
`SentTail` without end (the sequence goes on at the peer), `moves.done` (the same), `cancel`, or `abort_step`. Blocks
that a transfer may still touch outlive it under the same key until its final event settles them (`kv_sent`,
`kv_closed`, `kv_failed`, `kv_arrived`, `moves.done` or `moves.failed`); a new sequence of that key waits as long.

While one step runs the next may be planned: `plan` again, before the first is committed. Steps are committed in their
order. Whether a token ends its sequence is then known one step late: what is computed past an end is dropped.

Invariants: a step holds at most `max_num_batched_tokens` tokens, and every decode-ready sequence unless memory made
it give way; at most two plans are not committed; `check_integrity` holds between any two calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.banks import Bank
from penstock.workers.kv.block_account import BlockAccount
from penstock.workers.kv.layout import KVLayout
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest, Tokens
from penstock.workers.scheduler.adapters import AdapterPlaces, Adapters
from penstock.workers.scheduler.admission import growth_of, refusal, refusal_of_prefill
from penstock.workers.scheduler.chunked import StepBudget, assemble, continue_prefills
from penstock.workers.scheduler.events import (
    PREFILL_WORK,
    RESERVE_WORK,
    QueuedEvent,
    RefusedEvent,
    SchedulerEvent,
    SchedulerStats,
    SentTail,
    SequenceKey,
    StartedEvent,
    StepOutcome,
    Work,
)
from penstock.workers.scheduler.figures import count_figures
from penstock.workers.scheduler.grammars import Guides, follow
from penstock.workers.scheduler.handover import grant, hand_over
from penstock.workers.scheduler.integrity import check_scheduler
from penstock.workers.scheduler.memory import Placement, SequenceMemory
from penstock.workers.scheduler.moving import Moves
from penstock.workers.scheduler.needs import Needs, unmet
from penstock.workers.scheduler.open_steps import MOST_STEPS
from penstock.workers.scheduler.outcome import committed_rows
from penstock.workers.scheduler.plan import StepPlan, StepResult
from penstock.workers.scheduler.preemption import ready_decodes
from penstock.workers.scheduler.roster import Roster
from penstock.workers.scheduler.scoring import take_embeddings, take_scores
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import PREFILL, RESERVED, SequenceTable
from penstock.workers.scheduler.tier_loads import TierLoads, Tiers
from penstock.workers.scheduler.waiting import AdmissionPace
from penstock.workers.settings import SchedulerSettings

__all__ = ["Scheduler", "SchedulerEvent", "SchedulerStats", "SequenceKey", "StepOutcome", "Work"]


class Scheduler:
    """One worker's scheduler, over one bank of KV blocks, or over one for each rank that attends for itself."""

    def __init__(
        self,
        settings: SchedulerSettings,
        layout: KVLayout,
        *banks: Bank,
        grammars: Guides | None = None,
        adapters: Adapters | None = None,
        tiers: tuple[Tiers, Callable[[int], float]] | None = None,
    ) -> None:
        """The banks are of one size. Without `grammars` or `adapters` requests that need them are refused.

        `tiers` below the only bank, and the seconds that a step of so many tokens takes.
        """
        self._needs = Needs(grammars, adapters)
        self._settings = settings
        self._layout = layout
        self._num_blocks = banks[0].pool.num_blocks  # that one sequence can have
        # No more sequences than tokens in a step: then every decode always fits, and a prefill beside them too.
        max_seqs = min(settings.max_num_seqs, settings.max_num_batched_tokens)
        self._table = SequenceTable(max_seqs, settings.max_model_len, layout.block_size)
        if adapters is not None:
            self._table.adapters.places = AdapterPlaces(adapters)
        loads = None if tiers is None else TierLoads(tiers[0], banks[0], tiers[1], layout.block_size)
        self._memory = SequenceMemory(self._table, layout, banks, loads)
        self._roster = Roster(self._table, self._memory, layout)
        self.moves = Moves(self._roster, layout)
        self._pace = AdmissionPace()
        self._watermark = int(settings.watermark * self._num_blocks)
        self._unannounced: list[Sequence] = []
        self._arrivals = 0
        self._step = 0
        self._draining = False

    def submit(
        self,
        key: SequenceKey,
        work: Work,
        request: GenerateRequest,
        now: float,
        *,
        sends_kv: bool = False,
        first_block: int = 0,
        bank: int | None = None,
        takes_over: bool = False,
    ) -> None:
        """Queue the request, or refuse it with a `RefusedEvent`. A key that is already known is ignored.

        `sends_kv`: a PREFILL under a grant, whose `first_block` its offers' fragment indices count from. `bank`: the
        one in which it must be, as `bank_for` said; None: any. `takes_over`: a RESERVE for a sequence that runs
        elsewhere and grows meanwhile.
        """
        if self._roster.find(key) is not None:
            return
        try:
            context = context_of(request)
        except OverflowError:
            self._refuse(key, FailureCode.BAD_REQUEST, "prompt: holds a token id outside 32 bits")
            return
        reason = refusal(request, work, self._settings.max_model_len, self._layout, self._num_blocks)
        if reason is None and work is PREFILL_WORK:
            reason = refusal_of_prefill(request, sends_kv, first_block, self._layout)
        if reason is None:
            reason = self._needs.refusal(request)
        if reason is not None:
            self._refuse(key, *reason)
        elif self._draining:
            self._refuse(key, FailureCode.DRAINING, "the worker takes no new work")
        elif len(self._roster.waiting) >= self._settings.max_waiting:
            retry = self._pace.wait_s(len(self._roster.waiting))
            self._refuse(key, FailureCode.QUEUE_FULL, "the worker's queue is full", retry)
        else:
            self._arrivals += 1
            sequence = Sequence(
                key=key,
                work=work,
                request=request,
                arrival=self._arrivals,
                router_index=self._roster.routers.enter(key.router_id),
                deadline=now + request.queue_timeout_s,
                context=context,
                sends_kv=sends_kv,
                first_block=first_block,
                offered=first_block,
                chain=self._memory.first_digests(request, context),
                pinned=bank,
                takes_over=takes_over,
                guided=self._needs.guide(request),
                adapted=self._needs.adapter(request),
                # Who computes the context scores it, and a reservation's context is computed elsewhere.
                scored=len(request.prompt) if work is RESERVE_WORK else 1,
            )
            self._roster.enter(sequence)
            self._unannounced.append(sequence)

    def bank_for(self, request: GenerateRequest) -> int:
        """Where a request's blocks had best be, for who must know it before the request is admitted."""
        waiting = (sequence.pinned for sequence in self._roster.waiting.entries())
        chain = request.prefix_digests if request.cache_prefix else b""
        return self._memory.best_bank(chain, (bank for bank in waiting if bank is not None))

    def cancel(self, key: SequenceKey, now: float) -> None:
        """End it without an event. Unknown keys are ignored.

        Blocks of a granted reservation stay in quarantine until `kv_closed` (or another final event of its session);
        blocks already offered to a peer stay held until `kv_sent`.
        """
        self._roster.cancel(key)

    def cancel_router(self, router_id: str, now: float) -> list[SequenceKey]:
        """Cancel all work of a router; returns the keys, so that their transfers can be ended too."""
        keys = [key for key in self._roster.known_keys() if key.router_id == router_id]
        for key in keys:
            self._roster.cancel(key)
        return keys

    def drain(self) -> None:
        """Refuse new requests from now on; those known run to their end."""
        self._draining = True

    # --- transfer events ------------------------------------------------------------------------------------------

    def kv_arrived(self, key: SequenceKey, first_tokens: Tokens, now: float) -> None:
        """The KV of a reservation is verified; it decodes from `first_tokens` on. `EndedEvent` if they end it."""
        self._roster.kv_arrived(key, first_tokens)

    def kv_failed(self, key: SequenceKey, now: float, code: FailureCode = FailureCode.TRANSFER_FAILED) -> None:
        """The KV will not come: `RefusedEvent` of this code, or the quarantine of a cancelled one is lifted."""
        self._roster.kv_failed(key, code)

    def kv_closed(self, key: SequenceKey, now: float) -> None:
        """Nobody writes the blocks of a cancelled reservation any more; its quarantine is lifted."""
        self._roster.kv_failed(key)

    def kv_sent(self, key: SequenceKey, now: float) -> None:
        """Nobody reads a prefill's blocks any more (done, or failed). One still computing ends in a `RefusedEvent`."""
        self._roster.kv_sent(key)

    # --- steps ----------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can be computed now. A commit or an abort_step must follow a plan.

        While a step is under way: also None where the next depends on what this one brings.
        """
        under_way = self._roster.under_way
        if len(under_way) == MOST_STEPS:
            raise IntegrityError(f"planned a step while {MOST_STEPS} are not committed")
        for sequence in self._roster.waiting.expired(now):
            waited = sequence.request.queue_timeout_s
            self._roster.refuse(sequence, FailureCode.DEADLINE, f"not admitted within {waited:g} s")
        if self._memory.loads is not None:
            self._memory.loads.poll(now)
        settings, before = self._settings, under_way.newest
        if before is not None:
            if self._table.edits.reading:
                return None
            under_way.advance(before)
        ready = ready_decodes(self._roster, settings.max_preemptions)
        if ready is None:
            return None
        num_decode, gave_way = ready
        budget = StepBudget(settings.max_num_batched_tokens - num_decode, settings.long_prefill_token_threshold)
        continue_prefills(self._table, budget)
        # Blocks that a preemption freed are for those still running, unless none is.
        if not gave_way or not (num_decode or budget.slots):
            self._admit(budget, now)
        self._announce()
        if not num_decode and not budget.slots:
            return None
        self._step += 1
        step = assemble(self._table, self._roster.steps, self._step, num_decode, budget, before)
        under_way.begin(step)
        return step.plan

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> StepOutcome:
        """Take the oldest step's result in. Raises IntegrityError if it does not fit the plan, which stays open."""
        table, memory, under_way = self._table, self._memory, self._roster.under_way
        step = under_way.oldest_is(plan)
        rows = committed_rows(step, result, under_way.leaving)
        scored = take_scores(table, step.spans, result, under_way.leaving) if plan.scored is not None else []
        embedded = take_embeddings(table, step.sampled, plan, result, under_way.leaving) if len(plan.embed_rows) else []
        under_way.advance(step)
        under_way.end(step)
        starts, ends = self._roster.steps.take_tokens(step.rows, plan.sample_rows, result.token_ids)
        if rows.kept is not None:
            starts, ends = starts[rows.kept], ends[rows.kept]
        # Blocks that decoding fills are published when the sequence ends: nobody can ask for them before.
        prefills = rows.slots[rows.num_decode :].tolist()
        for slot, computed in zip(prefills, rows.computed[rows.num_decode :].tolist(), strict=True):
            memory.publish_row(slot, computed)
        memory.end_copies(len(plan.copies))
        offers, tails = hand_over(self._roster, self._layout, rows, ends)
        names, more = self._roster.routers.names, {"scored": scored, "embedded": embedded}
        outcome = rows.outcome(names, starts, ends, offers=offers, sent_tails=tails, **more)
        for row in ends.nonzero()[0].tolist():
            sequence = table.sequence_in(int(rows.sampled[row]))
            if sequence.moving is not None:  # nothing is left to move
                tails.append(SentTail(sequence.key, int(rows.tokens[row]), EndReason(int(ends[row]))))
            self._roster.end(sequence)
        follow(self._roster, rows.sampled, rows.tokens, ends)
        if under_way.leaving:
            self._roster.empty_left_rows()
        return outcome

    def abort_step(self, plan: StepPlan, now: float) -> list[SequenceKey]:
        """The newest step failed: end all its sequences without events; their keys, for the caller to report."""
        under_way = self._roster.under_way
        step = under_way.newest_is(plan)
        under_way.end(step)
        self._memory.end_copies(len(plan.copies), newest=True)
        self._table.computed[step.rows.slots] = plan.starts  # what it would have computed is not there
        lost = [self._table.sequence_in(slot) for slot in plan.slots.tolist() if slot not in under_way.leaving]
        for sequence in lost:
            self._roster.end(sequence)
        self._roster.empty_left_rows()
        return [sequence.key for sequence in lost]

    def lose_banks(self, banks: Tokens, plan: StepPlan | None = None) -> None:
        """These banks are gone with their ranks. `plan` is the step that failed by it: nothing of it was computed.

        Their sequences wait to be computed again in other banks, unless a peer was to write or read their blocks:
        then they end in a `RefusedEvent`. All other sequences go on where they were.
        """
        if plan is not None:
            under_way = self._roster.under_way
            under_way.end(under_way.newest_is(plan))
            # A row that begins with a copied block is not to go on without the copy.
            for slot in self._table.rows_in(PREFILL).tolist():
                if np.isin(self._table.blocks_of(slot), plan.copies[:, 1]).any():
                    self._roster.requeue(self._table.sequence_in(slot))
            self._memory.end_copies(len(plan.copies), newest=True)
            self._roster.empty_left_rows()
        for bank in banks:
            self._roster.lose_bank(bank)

    def take_events(self) -> list[SchedulerEvent]:
        """Events since the last call, oldest first."""
        events = self._roster.events
        self._roster.events = []
        return events

    @property
    def next_deadline(self) -> float | None:
        """Plan again by this time at the latest, even if nothing happens until then; None: no need."""
        due, loads = self._roster.waiting.next_deadline, self._memory.loads
        if loads is None or math.isinf(loads.next_deadline):
            return due
        return loads.next_deadline if due is None else min(due, loads.next_deadline)

    def stats(self) -> SchedulerStats:
        """Figures for the heartbeat; engine thread only."""
        return count_figures(self._roster, draining=self._draining)

    def account(self) -> BlockAccount:
        """The blocks of all banks; engine thread only."""
        return sum((bank.pool.account() for bank in self._memory.banks), BlockAccount())

    @property
    def lingering(self) -> int:
        """Ended sequences whose blocks a transfer may still touch."""
        return len(self._memory.lingering)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pool, cache, table, queue and keys agree."""
        check_scheduler(self._roster)

    def _admit(self, budget: StepBudget, now: float) -> None:
        """Start sequences from the queue's head while rows, blocks and tokens last."""
        plain = False  # somebody waits for a place for its adapter
        while not self._table.is_full:
            sequence = self._roster.waiting.first(self._roster.busy_keys, plain=plain)
            if sequence is None or (sequence.work is not RESERVE_WORK and not budget.left):
                return
            problem = unmet(sequence)
            if problem is not None:
                self._roster.refuse(sequence, *problem)
                continue
            if not self._table.adapters.has_room(sequence.adapter):
                plain = True
                continue
            spare = self._watermark if self._table.num_sequences else 0
            if self._memory.loads is not None and self._memory.loads.begin(sequence, spare, now):
                continue
            growth = growth_of(sequence.work, sequence.remaining)
            if sequence.preemptions < self._settings.max_preemptions:
                growth = min(growth, self._settings.reserve_tokens)
            placement = self._memory.place(sequence, growth, spare)
            if placement is None:
                return
            self._start(sequence, placement, budget)
            self._pace.note(now)

    def _start(self, sequence: Sequence, placement: Placement, budget: StepBudget) -> None:
        self._roster.waiting.remove(sequence)
        if sequence.work is RESERVE_WORK:
            self._table.insert(sequence, placement.blocks, placement.computed, RESERVED)
            self._roster.events.append(grant(sequence, placement, self._layout, self._memory.pool_of(sequence)))
        else:
            slot = self._table.insert(sequence, placement.blocks, placement.computed, PREFILL)
            if placement.copy is not None:
                budget.copies.append(placement.copy)
            budget.add_chunk(slot, len(sequence.context) - placement.computed)
            if not sequence.started:
                self._roster.events.append(StartedEvent(sequence.key, placement.computed, len(sequence.context)))
        sequence.started = True

    def _announce(self) -> None:
        """Tell routers of requests that could not be admitted at once."""
        for sequence in self._unannounced:
            if self._roster.find(sequence.key) is sequence and sequence.slot is None:
                self._roster.events.append(QueuedEvent(sequence.key, self._roster.waiting.position(sequence)))
        self._unannounced.clear()

    def _refuse(self, key: SequenceKey, code: FailureCode, message: str, retry_after_s: float | None = None) -> None:
        self._roster.events.append(RefusedEvent(key, code, message, retry_after_s))
