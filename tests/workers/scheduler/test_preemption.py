"""Who is preempted, and who never is."""

import pytest
from fakes.scheduler_stand import make_request

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.banks import Bank
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.memory import SequenceMemory
from penstock.workers.scheduler.preemption import choose_victim, ready_decodes
from penstock.workers.scheduler.roster import Roster
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import DECODE, PREFILL, RESERVED, SequenceTable

LAYOUT = KVLayout(1, 1, 1, 4, "float32")


def make_roster(num_blocks: int) -> Roster:
    table = SequenceTable(6, 64, 4)
    return Roster(table, SequenceMemory(table, LAYOUT, [Bank(BlockPool(num_blocks), None)]), LAYOUT)


def add(roster: Roster, arrival: int, state: int = DECODE, priority: int = 0, sends_kv: bool = False) -> Sequence:
    """A sequence of 5 tokens, 4 of them computed, whose one block is full."""
    request = make_request([arrival] * 5, 20, priority=priority)
    key = SequenceKey("a", arrival, 0)
    index = roster.routers.enter("a")
    sequence = Sequence(key, Work.GENERATE, request, arrival, index, 9.0, context_of(request), sends_kv)
    roster.enter(sequence)
    roster.waiting.remove(sequence)
    roster.table.insert(sequence, roster.memory.banks[0].pool.allocate(1), 4, state)
    sequence.published = 0
    return sequence


def test_least_urgent_then_youngest():
    roster = make_roster(6)
    one, two, three = add(roster, 1), add(roster, 2), add(roster, 3, PREFILL)
    assert choose_victim(roster.table, 1) is three
    less_urgent = add(roster, 0, priority=1)
    assert choose_victim(roster.table, 1) is less_urgent
    for sequence in (less_urgent, three, two):
        sequence.preemptions = 1
    assert choose_victim(roster.table, 1) is one
    assert choose_victim(roster.table, 0) is None


def test_those_a_peer_reads_or_writes_are_never_chosen():
    roster = make_roster(6)
    add(roster, 1, RESERVED)
    add(roster, 2, PREFILL, sends_kv=True)
    assert choose_victim(roster.table, 3) is None


def test_decodes_get_their_blocks_or_somebody_gives_way():
    roster = make_roster(4)
    old, young = add(roster, 1), add(roster, 2)
    assert ready_decodes(roster, 3) == (2, False)
    assert roster.table.num_blocks[[old.slot, young.slot]].tolist() == [2, 2]
    third = add_without_room(roster)
    assert ready_decodes(roster, 3) == (2, True)
    assert third.slot is None
    assert third.preemptions == 1
    assert roster.waiting.entries() == (third,)
    assert third.context.tolist() == [3] * 5


def add_without_room(roster: Roster) -> Sequence:
    """One more than the pool can grow: its one block comes from the youngest's second."""
    table, pool = roster.table, roster.memory.banks[0].pool
    young = table.sequences[1]
    assert young is not None
    pool.free(table.blocks_of(1)[-1:])
    table.block_tables[1, 1] = 0
    table.num_blocks[1] -= 1
    table.capacity[1] -= 4
    return add(roster, 3)


def test_growth_without_a_victim_is_a_defect():
    roster = make_roster(1)
    add(roster, 1).preemptions = 3
    with pytest.raises(IntegrityError, match="nobody can be preempted"):
        ready_decodes(roster, 3)
