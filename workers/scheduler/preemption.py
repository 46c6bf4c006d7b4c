"""Who gives way when decodes run out of blocks: preemption by recompute, bounded per request.

A preempted sequence gives all its blocks back and waits at the queue's front with every token it has; published
blocks make the recompute cheap. After `max_preemptions` it is admitted with its whole remainder reserved and is never
chosen again. Whoever lacks a block has not reserved its remainder, so there is always a victim: at worst itself.
"""

from __future__ import annotations

import numpy as np

from penstock.workers.errors import IntegrityError
from penstock.workers.scheduler.roster import Roster
from penstock.workers.scheduler.sequence import Sequence
from penstock.workers.scheduler.table import DECODE, PREFILL, SequenceTable, Slots


def choose_victim(table: SequenceTable, max_preemptions: int, bank: int = 0) -> Sequence | None:
    """The least urgent, then youngest, running sequence in a bank that may be preempted; None if there is none.

    Sequences that wait for KV, or whose blocks a peer reads, are never chosen; one that is on its way to a peer
    pauses instead when it lacks a block.
    """
    rows = np.flatnonzero(((table.state == PREFILL) | (table.state == DECODE)) & (table.bank == bank))
    candidates = [table.sequences[slot] for slot in rows.tolist()]
    return max(
        (
            s
            for s in candidates
            if s is not None and not s.sends_kv and s.moving is None and s.preemptions < max_preemptions
        ),
        key=lambda sequence: (sequence.request.priority, sequence.arrival),
        default=None,
    )


def ready_decodes(roster: Roster, max_preemptions: int) -> tuple[int, bool] | None:
    """(number of decodes, each with room for its token; whether somebody was preempted for that).

    None if somebody would have to be while a step is under way: he computes its token again, which is not known yet.
    """
    table, gave_way = roster.table, False
    while True:
        num_decode, full = roster.steps.ready()
        if not len(full) or roster.memory.grow(full):
            return num_decode, gave_way
        if _pause_moving(roster, full):
            continue
        if len(roster.under_way):
            return None
        # Rows of banks with room have grown; of those that are still full, one is in a bank that has too few blocks.
        lacking = full[table.computed[full] == table.capacity[full]]
        victim = choose_victim(table, max_preemptions, int(table.bank[lacking[0]]))
        if victim is None:
            raise IntegrityError("a sequence lacks a block and nobody can be preempted")
        roster.preempt(victim)
        gave_way = True


def _pause_moving(roster: Roster, full: Slots) -> bool:
    """Whoever lacks a block and is on its way to a peer waits for that. False: none of these rows is."""
    table = roster.table
    moving = [table.sequence_in(slot) for slot in full.tolist() if table.computed[slot] == table.capacity[slot]]
    moving = [sequence for sequence in moving if sequence.moving is not None]
    for sequence in moving:
        roster.pause(sequence)
    return bool(moving)
