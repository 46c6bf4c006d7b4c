"""Which sequence holds which KV blocks: placing, growing, publishing, releasing, and what outlives a sequence.

The scheduler's one way to the block pools and the prefix caches. Knows no queues, budgets or events.

Invariants: the first `published` blocks of a row are cached ones, held through the sequence's `run`, or `known` ones,
which it computed though another had them cached; all others are private to it. A lingering entry holds the same way,
and the source of a copy is held while the step is under way. A row's blocks cover its computed tokens; only blocks
before `published` may be shared, and those are never written again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from penstock.workers.kv.banks import Bank
from penstock.workers.kv.block_pool import BlockPool, Blocks
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import NO_BLOCKS, Match, PrefixCache, Run, chain_digests
from penstock.workers.protocol import DIGEST_BYTES, GenerateRequest
from penstock.workers.scheduler.events import RESERVE_WORK, SequenceKey
from penstock.workers.scheduler.plan import I32
from penstock.workers.scheduler.sequence import Sequence
from penstock.workers.scheduler.table import EMPTY, SequenceTable, Slots
from penstock.workers.scheduler.tier_loads import Landing, TierLoads

_ROW_BLOCKS = 8


class Placement(NamedTuple):
    """Blocks given to a sequence; `computed` leading tokens have their KV (after `copy`, where there is one)."""

    blocks: Blocks
    computed: int
    copy: tuple[int, int] | None = None  # (source, destination)


@dataclass(frozen=True, slots=True, eq=False)
class Lingering:
    """Blocks whose sequence is gone while a transfer may still read (held) or write (quarantined) them."""

    blocks: Blocks  # private or quarantined
    quarantined: bool
    run: Run | None = None  # held in the prefix cache
    bank: int = 0


class SequenceMemory:
    """Holds for the rows of one table, out of one bank or several; a sequence's blocks are all of one."""

    def __init__(
        self, table: SequenceTable, layout: KVLayout, banks: Sequences[Bank], loads: TierLoads | None = None
    ) -> None:
        self.banks = tuple(banks)
        self.loads = loads  # of the only bank
        self.lingering: dict[SequenceKey, Lingering] = {}
        self._lost: frozenset[int] = frozenset()  # banks
        self._table = table
        self._layout = layout
        self._block_size = layout.block_size
        # (bank, held because a step under way copies from its end), oldest first
        self._copy_sources: list[tuple[int, Run]] = []

    @property
    def usable_banks(self) -> list[Bank]:
        """Those that sequences can live in."""
        return [bank for number, bank in enumerate(self.banks) if number not in self._lost]

    @property
    def lost_banks(self) -> list[Bank]:
        """Those that went with their ranks."""
        return [bank for number, bank in enumerate(self.banks) if number in self._lost]

    @property
    def landings(self) -> Sequences[Landing]:
        """Blocks of the only bank that a tier is writing."""
        return self.loads.landings if self.loads is not None else ()

    def lose(self, number: int) -> None:
        """This bank is gone with its rank: no sequence gets blocks of it any more, and nothing is found in it.

        No sequence has blocks of it any more either; those that linger are settled like all others.
        """
        self._lost |= {number}
        pool = self.banks[number].pool
        pool.free(pool.allocate(pool.num_free))  # what was cached is cached no more, and routers hear of it

    def pool_of(self, sequence: Sequence) -> BlockPool:
        """Where the blocks of a sequence with a row come from."""
        return self.banks[sequence.bank].pool

    def first_digests(self, request: GenerateRequest, context: I32) -> bytes:
        """Digests of the context's full blocks; those of the prompt are taken from the request if it has them all."""
        if self.banks[0].cache is None or not request.cache_prefix:
            return b""
        size = self._block_size
        full = len(request.prompt) // size
        digests = request.prefix_digests
        if len(digests) != full * DIGEST_BYTES:
            return chain_digests(request.prefix_root, context, size)
        if len(context) // size > full:
            digests += chain_digests(digests[-DIGEST_BYTES:] or request.prefix_root, context[full * size :], size)
        return digests

    def place(self, sequence: Sequence, growth: int, spare: int) -> Placement | None:
        """Blocks for its context and `growth` more tokens, cached ones shared; None unless `spare` blocks stay free.

        At least one token is left to compute, except for a RESERVE, which gets its KV and next token from a peer.
        """
        for number in self._allowed(sequence):
            sequence.bank = number
            placement = self._place(sequence, growth, spare, *self.banks[number])
            if placement is not None:
                return placement
        return None

    def best_bank(self, chain: bytes, waiting: Iterable[int]) -> int:
        """Where a context with these digests had best be; `waiting` are the banks of those who have no row yet."""
        return self._preferred(chain, waiting)[0] if len(self.banks) > 1 else 0

    def _allowed(self, sequence: Sequence) -> Sequences[int]:
        if sequence.pinned is not None:
            return (sequence.pinned,)
        return self._preferred(b"" if sequence.unscored else sequence.chain) if len(self.banks) > 1 else (0,)

    def _preferred(self, chain: bytes, waiting: Iterable[int] = ()) -> list[int]:
        """Banks in the order to try them, the cheapest first, then the one with most room.

        What a bank knows of the context need not be computed. But a step takes as long as its busiest rank: a sequence
        more than elsewhere costs all ranks as much as computing `_ROW_BLOCKS` blocks once.
        """
        rows = np.bincount(self._table.bank[self._table.state != EMPTY], minlength=len(self.banks))
        for number in waiting:
            rows[number] += 1
        least = min(int(count) for number, count in enumerate(rows) if number not in self._lost)

        def cost(number: int) -> tuple[int, int]:
            pool, cache = self.banks[number]
            known = 0 if cache is None or not chain else cache.match(chain).num_blocks
            return (int(rows[number]) - least) * _ROW_BLOCKS - known, -pool.num_free

        return sorted((number for number in range(len(self.banks)) if number not in self._lost), key=cost)

    def _place(
        self, sequence: Sequence, growth: int, spare: int, pool: BlockPool, cache: PrefixCache | None
    ) -> Placement | None:
        length = len(sequence.context)
        total = self._layout.blocks_for(length + growth)
        left = pool.num_free - spare
        if cache is None or not sequence.chain or sequence.unscored:  # what is to be scored is always computed
            return Placement(pool.allocate(total), 0) if left >= total else None
        match = cache.match(sequence.chain)
        if sequence.work is RESERVE_WORK or match.num_blocks * self._block_size < length:
            shared = match.num_blocks
            if left - match.num_idle < total - shared:
                return None
            return Placement(self._share(sequence, match, shared, total), shared * self._block_size)
        # Everything is cached: the last block is copied, since its last token will be computed, and written, again.
        shared = match.num_blocks - 1
        source, idle_source = int(match.blocks[-1]), not match.runs[-1].holders
        if left - match.num_idle >= total - shared:
            self._copy_sources.append((sequence.bank, cache.hold(match, match.num_blocks)))
            placed = self._share(sequence, cache.match(sequence.chain), shared, total)
            return Placement(placed, length - 1, (source, int(placed[shared])))
        if left - match.num_idle + idle_source >= total - shared:
            # Holding the source too is one block too many: the last block is computed again.
            return Placement(self._share(sequence, match, shared, total), shared * self._block_size)
        return None

    def grow(self, slots: Slots) -> bool:
        """One more block for each of these rows, or False if a bank has too few, and nothing for its rows."""
        if len(self.banks) > 1:
            owners = self._table.bank[slots]
            grown = [self._grow(slots[owners == number], bank.pool) for number, bank in enumerate(self.banks)]
            return all(grown)
        return self._grow(slots, self.banks[0].pool)

    def _grow(self, slots: Slots, pool: BlockPool) -> bool:
        if len(slots) > pool.num_free:
            return False
        if len(slots):
            self._table.append_blocks(slots, pool.allocate(len(slots)))
        return True

    def publish_row(self, slot: int, computed: int) -> None:
        """Offer to the prefix cache what is full of this row's first `computed` tokens, and not yet published."""
        sequence = self._table.sequences[slot]
        if sequence is not None:
            full = computed // self._block_size
            self._publish(sequence, slot, self._table.block_tables[slot, sequence.published : full].astype(np.intp))

    def release(self, slot: int) -> None:
        """The row ends; its blocks go back to the pool, where full ones stay shareable until they are needed."""
        sequence = self._table.sequence_in(slot)
        blocks = self._unpublished(sequence, slot)
        full = self._table.computed.item(slot) // self._block_size - sequence.published
        if full > 0 and self._publish(sequence, slot, blocks[:full]):
            blocks = blocks[full:]
        if len(sequence.known):
            blocks = np.concatenate((blocks, sequence.known))
        self._let_go(sequence.bank, blocks, self._empty_row(slot))

    def hold_for_reader(self, slot: int, key: SequenceKey) -> None:
        """The row ends while a peer still reads its blocks: keep them until `settle(key)`."""
        bank = self._table.sequence_in(slot).bank
        blocks, run = self.private_of(slot), self._empty_row(slot)
        self.lingering[key] = Lingering(blocks, False, run, bank)

    def quarantine_reserved(self, slot: int, key: SequenceKey, first: int, end: int) -> None:
        """The row ends while a peer may still write its blocks [first, end): keep those apart until `settle(key)`.

        None of them is published: `first` is the number of blocks that were shared.
        """
        bank = self._table.sequence_in(slot).bank
        blocks, run = self.private_of(slot), self._empty_row(slot)
        written = blocks[: end - first]
        self._let_go(bank, blocks[end - first :], run)
        self.banks[bank].pool.quarantine(written)
        if len(written):
            self.lingering[key] = Lingering(written, True, bank=bank)

    def settle(self, key: SequenceKey) -> bool:
        """The transfer of a sequence that is gone is over. False if nothing lingers under this key."""
        left = self.lingering.pop(key, None)
        if left is None:
            return False
        if left.quarantined:
            self.banks[left.bank].pool.unquarantine(left.blocks)
        else:
            self._let_go(left.bank, left.blocks, left.run)
        return True

    def end_copies(self, count: int, *, newest: bool = False) -> None:
        """So many copies of the oldest or newest step are made, or will never be: let their sources go."""
        for _ in range(count):
            bank, run = self._copy_sources.pop(-1 if newest else 0)
            self._let_go(bank, NO_BLOCKS, run)

    def private_of(self, slot: int) -> Blocks:
        """Blocks of this row that nobody else can share."""
        sequence = self._table.sequence_in(slot)
        return np.concatenate((self._unpublished(sequence, slot), sequence.known))

    def held_runs(self, bank: int) -> Counter[Run]:
        """How often each run of a bank's prefix cache is held."""
        held = [(sequence.bank, sequence.run) for sequence in self._table.sequences if sequence is not None]
        held += [(left.bank, left.run) for left in self.lingering.values()]
        held += self._copy_sources
        held += [(0, landing.run) for landing in self.landings]
        return Counter(run for owner, run in held if owner == bank and run is not None and run.parent is not None)

    def _share(self, sequence: Sequence, match: Match, shared: int, total: int) -> Blocks:
        """Hold the first `shared` blocks of the match for the sequence; they and new ones, `total` in all."""
        blocks = match.blocks[:shared]
        pool, cache = self.banks[sequence.bank]
        # Before allocating, which could otherwise evict them.
        sequence.run = None if cache is None else cache.hold(match, shared)
        return np.concatenate((blocks, pool.allocate(total - shared)))

    def _unpublished(self, sequence: Sequence, slot: int) -> Blocks:
        """The blocks of its row that were not yet offered to the prefix cache, in order."""
        return self._table.block_tables[slot, sequence.published : self._table.num_blocks.item(slot)].astype(np.intp)

    def _publish(self, sequence: Sequence, slot: int, blocks: Blocks) -> bool:
        """Offer the next blocks of its row, all full, to the prefix cache. False: none of its are shared."""
        cache = self.banks[sequence.bank].cache
        if cache is None or not sequence.request.cache_prefix:
            return False
        if not len(blocks):
            return True
        size, first, chain = self._block_size, sequence.published, sequence.chain
        full, have = first + len(blocks), len(chain) // DIGEST_BYTES
        if have < full:
            root = chain[-DIGEST_BYTES:] or sequence.request.prefix_root
            chain += chain_digests(root, self._table.tokens[slot, have * size : full * size], size)
            sequence.chain = chain
        digests = chain[first * DIGEST_BYTES : full * DIGEST_BYTES]
        sequence.run, known = cache.publish(sequence.run or cache.root, digests, blocks)
        if len(known):
            sequence.known = np.concatenate((sequence.known, known))
        sequence.published = full
        return True

    def _empty_row(self, slot: int) -> Run | None:
        """Empty the row; the run that it held."""
        sequence = self._table.sequence_in(slot)
        run, sequence.run, sequence.known = sequence.run, None, NO_BLOCKS
        self._table.remove(slot)
        return run

    def _let_go(self, bank: int, blocks: Blocks, run: Run | None) -> None:
        pool, cache = self.banks[bank]
        pool.free(blocks)
        if cache is not None and run is not None:
            cache.leave(run)
