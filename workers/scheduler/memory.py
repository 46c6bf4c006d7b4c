"""Which sequence holds which KV blocks: placing, growing, publishing, releasing, and what outlives a sequence.

The scheduler's one way to the block pool and the prefix cache. Knows no queues, budgets or events.

Invariants: a block is held once per row of the table that lists it, once per lingering entry, and once while it is
the source of a copy in the step under way; a row's blocks cover its computed tokens; only blocks before `published`
may be shared, and those are never written again.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import PrefixCache, chain, split_digests
from penstock.workers.protocol import DIGEST_BYTES, GenerateRequest
from penstock.workers.scheduler.events import SequenceKey, Work
from penstock.workers.scheduler.plan import I32
from penstock.workers.scheduler.sequence import Sequence
from penstock.workers.scheduler.table import SequenceTable, Slots


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Blocks given to a sequence; `computed` leading tokens have their KV (after `copy`, where there is one)."""

    blocks: list[int]
    computed: int
    copy: tuple[int, int] | None = None  # (source, destination)


@dataclass(frozen=True, slots=True, eq=False)
class Lingering:
    """Blocks whose sequence is gone while a transfer may still read (held) or write (quarantined) them."""

    blocks: list[int]
    quarantined: bool


class SequenceMemory:
    """Holds for the rows of one table, out of one pool."""

    def __init__(self, table: SequenceTable, layout: KVLayout, pool: BlockPool, cache: PrefixCache | None) -> None:
        self.pool = pool
        self.lingering: dict[SequenceKey, Lingering] = {}
        self._table = table
        self._layout = layout
        self._cache = cache
        self._block_size = layout.block_size
        self._copy_sources: list[int] = []

    @property
    def copy_sources(self) -> tuple[int, ...]:
        """Blocks that the step under way copies from."""
        return tuple(self._copy_sources)

    def first_digests(self, request: GenerateRequest, context: I32) -> list[bytes]:
        """Digests of the context's full blocks; those of the prompt are taken from the request if it has them all."""
        if self._cache is None or not request.cache_prefix:
            return []
        size = self._block_size
        full = len(request.prompt) // size
        if len(request.prefix_digests) != full * DIGEST_BYTES:
            return chain(request.prefix_root, context, size)
        digests = split_digests(request.prefix_digests)
        if len(context) // size > full:
            digests += chain(digests[-1] if digests else request.prefix_root, context[full * size :], size)
        return digests

    def place(self, sequence: Sequence, growth: int, spare: int) -> Placement | None:
        """Blocks for its context and `growth` more tokens, cached ones shared; None unless `spare` blocks stay free.

        At least one token is left to compute, except for a RESERVE, which gets its KV and next token from a peer.
        """
        length = len(sequence.context)
        total = self._layout.blocks_for(length + growth)
        hits: list[int] = []
        if self._cache is not None and not sequence.unscored:  # what is to be scored is computed, cached or not
            hits = self._cache.match(sequence.chain)
        if sequence.work is Work.RESERVE or len(hits) * self._block_size < length:
            return self._take(hits, total, spare, source=None, length=length)
        # Everything is cached: the last block is copied, since its last token will be computed, and written, again.
        source = hits[-1]
        placement = self._take(hits[:-1], total, spare, source, length)
        # Holding the source too can be one block too many; then the last block is computed again.
        return placement or self._take(hits[:-1], total, spare, source=None, length=length)

    def grow(self, slots: Slots) -> bool:
        """One more block for each of these rows, or False and nothing if the pool has too few."""
        if len(slots) > self.pool.num_free:
            return False
        self._table.append_blocks(slots, self.pool.allocate(len(slots)))
        return True

    def publish_row(self, slot: int) -> None:
        """Offer all blocks of this row that are full, and not yet published, to the prefix cache."""
        sequence = self._table.sequences[slot]
        if self._cache is None or sequence is None or not sequence.request.cache_prefix:
            return
        first, full = int(self._table.published[slot]), int(self._table.computed[slot]) // self._block_size
        if full <= first:
            return
        digests, size = sequence.chain, self._block_size
        if len(digests) < full:
            root = digests[-1] if digests else sequence.request.prefix_root
            digests += chain(root, self._table.tokens[slot, len(digests) * size : full * size], size)
        self._cache.publish(digests[first:full], self._table.block_tables[slot, first:full].tolist())
        self._table.published[slot] = full

    def release(self, slot: int) -> None:
        """The row ends; its blocks go back to the pool, where full ones stay shareable until they are needed."""
        self.publish_row(slot)
        self.pool.release(self._table.blocks_of(slot))
        self._table.remove(slot)

    def hold_for_reader(self, slot: int, key: SequenceKey) -> None:
        """The row ends while a peer still reads its blocks: keep them until `settle(key)`."""
        self._linger(key, self._table.blocks_of(slot), quarantined=False)
        self._table.remove(slot)

    def quarantine_reserved(self, slot: int, key: SequenceKey, first: int, end: int) -> None:
        """The row ends while a peer may still write its blocks [first, end): keep those apart until `settle(key)`."""
        blocks = self._table.blocks_of(slot)
        written = blocks[first:end]
        self.pool.release(blocks[:first] + blocks[end:])
        self.pool.quarantine(written)
        if len(written):
            self._linger(key, written, quarantined=True)
        self._table.remove(slot)

    def settle(self, key: SequenceKey) -> bool:
        """The transfer of a sequence that is gone is over. False if nothing lingers under this key."""
        left = self.lingering.pop(key, None)
        if left is None:
            return False
        if left.quarantined:
            self.pool.unquarantine(left.blocks)
        else:
            self.pool.release(left.blocks)
        return True

    def end_copies(self) -> None:
        """The step's copies are made (or will never be): let their sources go."""
        for source in self._copy_sources:
            self.pool.release((source,))
        self._copy_sources.clear()

    def _take(self, hits: list[int], total: int, spare: int, source: int | None, length: int) -> Placement | None:
        held = hits if source is None else [*hits, source]
        fresh = total - len(hits)
        if self.pool.num_free - self.pool.count_free(held) < fresh + spare:
            return None
        # Before allocating, which could otherwise evict them.
        self.pool.share(held)
        new = self.pool.allocate(fresh)
        if source is None:
            return Placement(hits + new, len(hits) * self._block_size)
        self._copy_sources.append(source)
        return Placement(hits + new, length - 1, (source, new[0]))

    def _linger(self, key: SequenceKey, blocks: list[int], *, quarantined: bool) -> None:
        self.lingering[key] = Lingering(blocks, quarantined)
