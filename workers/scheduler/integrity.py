"""Checks that the scheduler's parts agree with each other and with the block pool.

Called by `Scheduler.check_integrity`: by the engine when idle, and by tests after every randomised step. Reads only.
"""

from __future__ import annotations

import numpy as np

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.prefix_cache import NO_BLOCKS
from penstock.workers.scheduler.roster import Roster
from penstock.workers.scheduler.sequence import Sequence
from penstock.workers.scheduler.table import SequenceTable, State


def check_scheduler(roster: Roster) -> None:
    """Raise IntegrityError with the first thing that does not add up."""
    for number, (pool, cache) in enumerate(roster.memory.banks):
        pool.check_integrity()
        if cache is not None:
            cache.check_integrity(roster.memory.held_runs(number))
    _check_places(roster)
    roster.table.adapters.check()
    for slot, sequence in enumerate(roster.table.sequences):
        _check_row(roster.table, slot, sequence)
    for number, (pool, _) in enumerate(roster.memory.banks):
        _check_holders(roster, pool, number)


def _check_places(roster: Roster) -> None:
    """Every known sequence waits or has a slot, never both, and the queue is in order."""
    queued = roster.waiting.entries()
    orders = [sequence.order for sequence in queued]
    if orders != sorted(orders):
        raise IntegrityError("the waiting queue is out of order")
    placed = [sequence for sequence in roster.table.sequences if sequence is not None]
    if any(sequence.slot is not None for sequence in queued):
        raise IntegrityError("a sequence waits and has a slot")
    known = [roster.find(key) for key in roster.known_keys()]
    leaving = roster.under_way.leaving
    running = [sequence for sequence in placed if sequence.slot not in leaving]
    if len(known) != len(queued) + len(running) or any(s is not roster.find(s.key) for s in (*queued, *running)):
        raise IntegrityError("the known sequences are not those that wait or run")
    if not all(roster.under_way.holds(slot) for slot in leaving):
        raise IntegrityError("a row that no step computes was not emptied")
    if len(placed) != roster.table.num_sequences:
        raise IntegrityError("the table's count of empty rows is wrong")


def _check_row(table: SequenceTable, slot: int, sequence: Sequence | None) -> None:
    state = State(int(table.state[slot]))
    blocks, length, computed = int(table.num_blocks[slot]), int(table.length[slot]), int(table.computed[slot])
    if (sequence is None) != (state is State.EMPTY):
        raise IntegrityError(f"row {slot} is {state.name} and its sequence is {sequence}")
    if table.block_tables[slot, blocks:].any():
        raise IntegrityError(f"row {slot} lists blocks beyond its {blocks}")
    if sequence is None:
        if blocks:
            raise IntegrityError(f"empty row {slot} holds {blocks} blocks")
        return
    if sequence.slot != slot:
        raise IntegrityError(f"the sequence in row {slot} believes to be in {sequence.slot}")
    if computed > blocks * table.block_size or len(np.unique(table.block_tables[slot, :blocks])) != blocks:
        raise IntegrityError(f"row {slot} has {computed} computed tokens in {blocks} blocks, or one block twice")
    left = length - computed
    if (state is State.DECODE and left != 1) or left < 0 or (state is State.PREFILL and left < 1):
        raise IntegrityError(f"row {slot} is {state.name} with {left} tokens left to compute")
    if state is not State.LAST and length > int(table.last_position[slot]):
        raise IntegrityError(f"row {slot} is longer than it may become")


def _check_holders(roster: Roster, pool: BlockPool, bank: int) -> None:
    """Every private block of a bank has one holder, and published ones are those of the runs that their rows hold."""
    table, memory = roster.table, roster.memory
    lingering = [left for left in memory.lingering.values() if left.bank == bank]
    private = [left.blocks for left in lingering if not left.quarantined]
    private += [landing.blocks for landing in memory.landings]
    for sequence in table.sequences:
        if sequence is None or sequence.slot is None or sequence.bank != bank:
            continue
        slot = sequence.slot
        private.append(memory.private_of(slot))
        published = table.block_tables[slot, : sequence.published]
        shared = NO_BLOCKS if sequence.run is None else sequence.run.path
        if len(shared) != len(published) or not np.array_equal(published[published != shared], sequence.known):
            raise IntegrityError(f"row {slot} holds other blocks of the prefix cache than it lists")
    if not np.array_equal(np.sort(np.concatenate((NO_BLOCKS, *private))), pool.private_blocks()):
        raise IntegrityError("the pool's private blocks are not those that sequences hold")
    quarantined = sum(len(left.blocks) for left in lingering if left.quarantined)
    if quarantined != pool.num_quarantined:
        raise IntegrityError("the quarantine differs from the cancelled reservations")
