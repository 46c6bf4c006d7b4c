"""What the scheduler says to the other half of a split request: grants on the decode side, offers on the prefill side.

Called by `scheduler.py` when a reservation gets its blocks and after every step. The engine passes the values on to
the transfer; nothing here knows sessions or bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.protocol import EndReason
from penstock.workers.scheduler.events import GrantedEvent, Offer, SentTail
from penstock.workers.scheduler.memory import Placement
from penstock.workers.scheduler.outcome import CommittedRows
from penstock.workers.scheduler.roster import Roster
from penstock.workers.scheduler.sequence import Sequence


def grant(sequence: Sequence, placement: Placement, layout: KVLayout, pool: BlockPool) -> GrantedEvent:
    """The promise for a reservation: blocks of its context that are not here yet, with their generations in `pool`.

    Who takes over a running sequence gives all of its blocks: the context grows until it is here.
    """
    first = placement.computed // layout.block_size
    end = len(placement.blocks) if sequence.takes_over else layout.blocks_for(len(sequence.context))
    blocks = placement.blocks[first:end]
    generations = tuple(pool.generations_of(blocks).tolist())
    sequence.granted = first
    return GrantedEvent(sequence.key, first, tuple(blocks.tolist()), generations, placement.computed, sequence.bank)


def hand_over(
    roster: Roster, layout: KVLayout, rows: CommittedRows, ends: NDArray[np.uint8]
) -> tuple[list[Offer], list[SentTail]]:
    """What a step's sending prefills have for their peers. Those done without an end leave their rows here."""
    offers: list[Offer] = []
    tails: list[SentTail] = []
    prefills = rows.slots[rows.num_decode :].tolist()
    if not any(roster.table.sequence_in(slot).sends_kv for slot in prefills):
        return offers, tails
    # Every decode row samples, so the prefills that do come after them.
    sampled = dict(
        zip(rows.sampled[rows.num_decode :].tolist(), range(rows.num_decode, len(rows.sampled)), strict=True)
    )
    for slot, computed in zip(prefills, rows.computed[rows.num_decode :].tolist(), strict=True):
        sequence = roster.table.sequence_in(slot)
        if not sequence.sends_kv:
            continue
        row = sampled.get(slot)
        if row is None:
            offer_blocks(roster, sequence, slot, computed // layout.block_size, offers)
            continue
        end = EndReason(int(ends[row]))
        if end is EndReason.NONE:
            offer_blocks(roster, sequence, slot, layout.blocks_for(len(sequence.context)), offers)
            roster.forget(sequence)
            roster.memory.hold_for_reader(slot, sequence.key)
        tails.append(SentTail(sequence.key, int(rows.tokens[row]), end))
    return offers, tails


def offer_blocks(roster: Roster, sequence: Sequence, slot: int, whole: int, offers: list[Offer]) -> None:
    """Offer the leading `whole` blocks, so far as that has not been done; fragments count from the granted ones."""
    if whole <= sequence.offered:
        return
    blocks = roster.table.block_tables[slot, sequence.offered : whole].tolist()
    indices = range(sequence.offered - sequence.first_block, whole - sequence.first_block)
    offers.append(Offer(sequence.key, list(zip(indices, blocks, strict=True))))
    sequence.offered = whole
