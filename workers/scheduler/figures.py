"""The scheduler's figures for the heartbeat, counted from its parts. Reads only; called by `Scheduler.stats`."""

from __future__ import annotations

from penstock.workers.scheduler.events import SchedulerStats
from penstock.workers.scheduler.roster import Roster
from penstock.workers.scheduler.table import PREFILL, RESERVED


def count_figures(roster: Roster, *, draining: bool) -> SchedulerStats:
    """What runs, waits and is held now. Engine thread only."""
    table, waiting, memory = roster.table, roster.waiting, roster.memory
    banks, lost = memory.usable_banks, memory.lost_banks
    left = (table.length - table.computed)[table.state == PREFILL]
    return SchedulerStats(
        running=table.num_sequences,
        reserved=len(table.rows_in(RESERVED)),
        sending=sum(not left.quarantined for left in memory.lingering.values()),
        waiting=len(waiting),
        queued_prefill_tokens=waiting.prefill_tokens + int(left.sum()),
        free_blocks=sum(bank.pool.num_free for bank in banks),
        cached_blocks=sum(len(bank.cache) for bank in banks if bank.cache is not None),
        quarantined_blocks=sum(bank.pool.num_quarantined for bank in banks),
        lost_blocks=sum(bank.pool.num_blocks for bank in lost),
        preemptions=roster.preemptions,
        draining=draining,
    )
