"""Placing sequences over hits, spare blocks and copies; what outlives a sequence."""

import numpy as np
from fakes.scheduler_stand import make_request

from penstock.workers.kv.banks import Bank, make_banks
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import PrefixCache, chain_digests
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.memory import SequenceMemory
from penstock.workers.scheduler.sequence import Sequence, context_of
from penstock.workers.scheduler.table import PREFILL, RESERVED, SequenceTable

LAYOUT = KVLayout(1, 1, 1, 4, "float32")
TOKENS = list(range(12))


class Setting:
    def __init__(self, num_blocks: int, caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool) if caching else None
        self.table = SequenceTable(4, 64, 4)
        self.memory = SequenceMemory(self.table, LAYOUT, [Bank(self.pool, self.cache)])
        self.arrivals = 0

    def sequence(self, tokens: list[int], work: Work = Work.GENERATE) -> Sequence:
        self.arrivals += 1
        request = make_request(tokens, 20)
        context = context_of(request)
        key, chain = SequenceKey("a", self.arrivals, 0), self.memory.first_digests(request, context)
        return Sequence(key, work, request, self.arrivals, 0, 9.0, context, chain=chain)

    def warm(self, tokens: list[int]) -> None:
        """Leave the blocks of these tokens behind in the cache."""
        sequence = self.sequence(tokens)
        placement = self.memory.place(sequence, 0, 0)
        assert placement is not None
        slot = self.table.insert(sequence, placement.blocks, len(tokens), PREFILL)
        sequence.published = 0
        self.memory.release(slot)


def test_growth_and_spare_blocks_decide():
    setting = Setting(5, caching=False)
    sequence = setting.sequence(TOKENS)
    assert setting.memory.place(sequence, 8, 1) is None
    assert setting.memory.place(sequence, 9, 0) is None
    placement = setting.memory.place(sequence, 8, 0)
    assert placement is not None
    assert (len(placement.blocks), placement.computed, placement.copy) == (5, 0, None)
    assert setting.pool.num_free == 0


def test_hits_are_shared_and_do_not_count_as_spare():
    setting = Setting(4)
    setting.warm(TOKENS[:8])
    longer = setting.sequence([*TOKENS[:8], 50, 51])
    assert setting.memory.place(longer, 4, 1) is None
    placement = setting.memory.place(longer, 2, 1)
    assert placement is not None
    assert placement.computed == 8
    assert setting.pool.num_owned == 3


def test_a_reservation_takes_all_its_hits_and_copies_nothing():
    setting = Setting(8)
    setting.warm(TOKENS)
    reserve = setting.memory.place(setting.sequence(TOKENS, Work.RESERVE), 0, 0)
    assert reserve is not None
    assert (reserve.computed, reserve.copy) == (12, None)
    generate = setting.memory.place(setting.sequence(TOKENS), 0, 0)
    assert generate is not None
    assert generate.copy == (reserve.blocks[2], generate.blocks[2])
    assert generate.computed == 11
    runs = setting.memory.held_runs(0)
    assert sum(runs.values()) == 1, "the copy's source; the sequences have no rows yet"
    setting.memory.end_copies(1)
    assert not setting.memory.held_runs(0)
    assert setting.pool.num_owned == 4


def test_prompt_digests_are_trusted_for_the_prompt_and_extended_for_the_rest():
    setting = Setting(8)
    sent = chain_digests(b"other root".ljust(32), TOKENS[:8], 4)
    request = make_request(TOKENS[:10], 20, emitted=(10, 11), prefix_digests=sent)
    digests = setting.memory.first_digests(request, context_of(request))
    assert digests == chain_digests(b"other root".ljust(32), TOKENS, 4)
    unsent = make_request(TOKENS, 20)
    assert setting.memory.first_digests(unsent, context_of(unsent)) == chain_digests(bytes(32), TOKENS, 4)
    assert setting.memory.first_digests(make_request(TOKENS, 20, cache_prefix=False), np.array(TOKENS)) == b""


def test_blocks_linger_until_their_transfer_settles():
    setting = Setting(8)
    for work, state in ((Work.PREFILL, PREFILL), (Work.RESERVE, RESERVED)):
        sequence = setting.sequence(TOKENS[:9], work)
        placement = setting.memory.place(sequence, 4, 0)
        assert placement is not None
        slot = setting.table.insert(sequence, placement.blocks, 0, state)
        if work is Work.PREFILL:
            setting.memory.hold_for_reader(slot, sequence.key)
            assert setting.pool.num_owned == 4
        else:
            setting.memory.quarantine_reserved(slot, sequence.key, 1, 3)
            assert setting.pool.num_quarantined == 2
        assert setting.memory.settle(sequence.key)
        assert not setting.memory.settle(sequence.key)
        assert setting.pool.num_free == 8
        setting.pool.check_integrity()


def test_publishing_names_full_computed_blocks_once():
    setting = Setting(8)
    sequence = setting.sequence(TOKENS[:11])
    placement = setting.memory.place(sequence, 4, 0)
    assert placement is not None
    slot = setting.table.insert(sequence, placement.blocks, 0, PREFILL)
    assert setting.cache is not None
    for computed, published in ((3, 0), (4, 1), (7, 1), (11, 2)):
        setting.table.computed[slot] = computed
        setting.memory.publish_row(slot, computed)
        assert len(setting.cache) == published
    setting.table.store_tokens(np.array([slot]), np.array([11]), np.array([11], np.int32))
    setting.table.computed[slot] = 12
    setting.memory.publish_row(slot, 12)
    assert sequence.chain == chain_digests(bytes(32), TOKENS, 4)
    assert setting.cache.match(sequence.chain).blocks.tolist() == placement.blocks[:3].tolist()


def test_banks_share_the_work_unless_one_knows_much_of_the_context():
    setting = Setting(1)
    table = setting.table = SequenceTable(16, 256, 4)
    setting.memory = SequenceMemory(table, LAYOUT, make_banks(2, 128, np.zeros(256, np.uint64), prefix_caching=True))

    def start(tokens: list[int]) -> int:
        sequence = setting.sequence(tokens)
        placement = setting.memory.place(sequence, 0, 0)
        assert placement is not None
        slot = table.insert(sequence, placement.blocks, placement.computed, PREFILL)
        table.computed[slot] = len(tokens)
        setting.memory.publish_row(slot, int(setting.table.computed[slot]))
        return sequence.bank

    assert sorted(start([100 + number] * 8) for number in range(4)) == [0, 0, 1, 1]
    long = list(range(80))  # 20 blocks
    first = start(long)
    assert [start([*long, number]) for number in range(2)] == [first, first]  # worth a row or two
    assert start([*long, 3]) != first  # but not many
    assert setting.memory.best_bank(b"", [0, 0, 0, 0]) == 1  # who waits for a bank counts as well
