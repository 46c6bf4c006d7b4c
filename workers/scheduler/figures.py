"""The scheduler's figures for the heartbeat, counted from its parts. Reads only; called by `Scheduler.stats`."""

from __future__ import annotations

from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.prefix_cache import PrefixCache
from penstock.workers.scheduler.events import SchedulerStats
from penstock.workers.scheduler.roster import Roster
from penstock.workers.scheduler.table import PREFILL, RESERVED


def count_figures(roster: Roster, pool: BlockPool, cache: PrefixCache | None, *, draining: bool) -> SchedulerStats:
    """What runs, waits and is held now. Engine thread only."""
    table, waiting = roster.table, roster.waiting
    left = (table.length - table.computed)[table.state == PREFILL]
    return SchedulerStats(
        running=table.num_sequences,
        reserved=len(table.rows_in(RESERVED)),
        sending=sum(not left.quarantined for left in roster.memory.lingering.values()),
        waiting=len(waiting),
        queued_prefill_tokens=waiting.prefill_tokens + int(left.sum()),
        free_blocks=pool.num_free,
        cached_blocks=0 if cache is None else len(cache),
        quarantined_blocks=pool.num_quarantined,
        preemptions=roster.preemptions,
        draining=draining,
    )
