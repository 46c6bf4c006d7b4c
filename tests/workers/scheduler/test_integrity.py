"""Every kind of disagreement is found: a check that cannot fail checks nothing."""

import pytest
from fakes.scheduler_stand import make_request, make_stand

from penstock.workers.errors import IntegrityError
from penstock.workers.scheduler.scheduler import Work
from penstock.workers.scheduler.table import DECODE, EMPTY


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda s: s._table.length.__setitem__(0, 50),
        lambda s: s._table.computed.__setitem__(0, 3),
        lambda s: s._table.state.__setitem__(0, EMPTY),
        lambda s: s._table.state.__setitem__(2, DECODE),
        lambda s: s._table.num_blocks.__setitem__(0, 2),
        lambda s: s._table.block_tables.__setitem__((0, 0), s._table.block_tables[0, 1]),
        lambda s: s._table.block_tables.__setitem__((0, 0), 19),
        lambda s: setattr(s._table.sequences[0], "slot", 3),
        lambda s: s._table._empty.pop(),
        lambda s: s._roster._known.popitem(),
        lambda s: s._roster.waiting._entries.reverse(),
        lambda s: setattr(s._roster.waiting._entries[0], "slot", 4),
        lambda s: s._memory._copy_sources.append((0, next(iter(s._memory.banks[0].cache.runs())))),
        lambda s: s._memory.lingering.clear(),
        lambda s: s._memory.banks[0].pool.allocate(1),
    ],
)
def test_corruption_is_found(corrupt):
    stand = make_stand(num_blocks=20, max_num_seqs=3)
    stand.submit(1, Work.GENERATE, make_request([1] * 9, 20))
    reserved = stand.submit(2, Work.RESERVE, make_request([2] * 9, 20))
    stand.step()
    stand.scheduler.cancel(reserved, 0.0)
    for slot in (3, 4, 5):
        stand.submit(slot, Work.GENERATE, make_request([slot] * 9, 20))
    stand.step()
    assert stand.scheduler.stats().waiting == 2
    stand.scheduler.check_integrity()
    corrupt(stand.scheduler)
    with pytest.raises(IntegrityError):
        stand.scheduler.check_integrity()
