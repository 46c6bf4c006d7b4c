"""The host half of attention on a GPU: which tile of queries meets which run of keys, worked out once per step.

Plan and run are separate (Ye et al. 2025, "FlashInfer", sections 3.3 and 3.4): this module turns a ragged batch into
lists of whole numbers, the kernels of `attention_kernels.py` only follow them. An item is one tile of queries against
one chunk of keys, for every kv head. Rows with one new token become decode items; rows with more become tiles; blocks
that several rows share become tiles of all the sharers' queries. A token whose keys lie in several items gets one
partial state per item, and a merge list names them in the order of the keys.
Called by `attention_workspace.py`. Pure numpy: knows lengths and block numbers; no tensors, no Triton, no device.
Legend: N rows, T tokens, G query heads of one kv head, H kv heads, P slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.gpu import attention_items as items
from penstock.kernels.ragged import RaggedBatch
from penstock.kernels.shared_prefix import SharedRun, SharingRule, find_shared, private_begins

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]

# A row with more new tokens x heads keeps a tile busy with one read of its keys, so sharing would save nothing.
MOST_SHARED_ROWS = 128


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the planner must know about the model and its storage."""

    query_heads: int
    kv_heads: int
    slots: int
    token_bytes: int  # keys and values of one token in one layer, all kv heads

    @property
    def group(self) -> int:
        """G, the query heads that read one kv head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How to cut. Costs are in tokens of keys: what one program could have read in that time."""

    sm_count: int = 132
    decode_per_sm: int = 2  # programs that run at once on one multiprocessor
    tile_per_sm: int = 1
    query_tile: int = 0  # rows (token, head) of a tile; 0 = by the mean number of the step
    most_tile: int = 128
    min_chunk: int = 128
    fixed_split: int = 0  # tokens per chunk whatever the batch; 0 = by cost
    sharing: SharingRule | None = field(default_factory=SharingRule)
    decode_overhead: int = 32
    tile_overhead: int = 128
    merge_cost: int = 64

    def decode_costs(self, heads: int) -> items.Costs:
        """Of rows with one new token."""
        return items.Costs(self.sm_count * self.decode_per_sm, heads, self.decode_overhead, self.merge_cost)

    def tile_costs(self, heads: int) -> items.Costs:
        """Of tiles of several queries."""
        return items.Costs(self.sm_count * self.tile_per_sm, heads, self.tile_overhead, self.merge_cost)


@dataclass(frozen=True, slots=True)
class PlanCaps:
    """The most that a plan may hold."""

    decode_items: int
    tile_items: int
    decode_partials: int  # tokens with a partial state
    tile_partials: int
    token_list: int  # packed tokens and the stacks of shared runs


@dataclass(frozen=True, slots=True, eq=False)
class PlanArrays:
    """One step's lists. Items are ordered by falling length, so that the last to start are short."""

    decode_items: I32  # [n, ITEM_FIELDS]
    tile_items: I32  # [n, ITEM_FIELDS]
    tokens: I32  # the packed tokens 0 .. T - 1, then those of every shared run; items name ranges of this list
    positions: I32  # [T]
    write_slots: I32  # [T] block * P + slot
    merge_tokens: I32  # [m] tokens with partial states
    merge_indptr: I32  # [m + 1]
    merge_slots: I32  # partial states in the order of their keys
    tables: I32  # [N, width]
    partial_tokens: int
    query_tile: int  # rows of a tile
    kv_tokens_read: int  # per kv head and layer, summed over the items


def query_tile_for(num_tokens: int, num_rows: int, group: int, most: int = 128) -> int:
    """Rows of a tile where a row has `num_tokens / num_rows` tokens, at most `most`; one token's heads always fit."""
    mean = num_tokens * group / max(num_rows, 1)
    wanted = 16 if mean <= 16 else 64 if mean <= 64 else 128
    return max(min(wanted, most), 1 << (group - 1).bit_length())


def caps_for(num_rows: int, num_tokens: int, query_tile: int, geometry: Geometry, settings: PlanSettings) -> PlanCaps:
    """Bounds within which every batch of this size can be planned, with room to split and to share.

    Without a split, tiles number at most ceil(tokens / tile) + rows and decode items at most rows (Ye et al. 2025,
    section 3.3.1); what is added bounds the splitting by the programs that run at once.
    """
    tile_tokens = max(1, query_tile // geometry.group)
    decode_room = -(-4 * settings.sm_count * settings.decode_per_sm // geometry.kv_heads)
    tiles = -(-num_tokens // tile_tokens) + num_rows if num_tokens > num_rows else 0
    shared = 2 * -(-num_tokens // tile_tokens) if settings.sharing else 0
    spare = -(-2 * settings.sm_count * settings.tile_per_sm // geometry.kv_heads) if tiles or shared else 0
    return PlanCaps(
        decode_items=num_rows + decode_room,
        tile_items=tiles + shared + spare,
        decode_partials=num_rows + decode_room,
        tile_partials=max(2 * spare * tile_tokens, 4 * num_rows) if spare else 0,
        token_list=num_tokens * (4 if settings.sharing else 1),
    )


def fixed_caps(num_rows: int, num_tokens: int, length: int, query_tile: int, group: int, split: int) -> PlanCaps:
    """The same where every chunk has `split` tokens, for rows of at most `length`."""
    chunks = -(-length // split)
    tiles = -(-num_tokens // max(1, query_tile // group)) + num_rows if num_tokens > num_rows else 0
    most = num_rows * chunks
    return PlanCaps(most, tiles * chunks, most, num_tokens * chunks if tiles else 0, num_tokens)


def make_plan(
    batch: RaggedBatch, geometry: Geometry, settings: PlanSettings, caps: PlanCaps | None = None
) -> PlanArrays:
    """Cut a batch into items; rows without new tokens take part in nothing.

    Without `caps`, those of a batch of this size. Raises ValueError when the batch does not fit.
    """
    counts = np.diff(batch.offsets).astype(np.int64)
    starts = batch.starts.astype(np.int64)
    width = -(-int((starts + counts).max(initial=1)) // geometry.slots)
    tables = batch.block_tables[:, :width]
    runs = _shared_runs(tables, starts, counts, geometry, settings)
    if runs and caps is None:
        caps = _caps_of(counts, runs, geometry, settings)
    arrays = _plan(batch, starts, counts, tables, runs, geometry, settings, caps)
    if arrays is None and runs:  # what sharing needs does not fit
        arrays = _plan(batch, starts, counts, tables, (), geometry, settings, caps)
    if arrays is None:
        raise ValueError("the batch is larger than the plan's maxima")
    return arrays


def _own_caps(starts: I64, counts: I64, query_tile: int, geometry: Geometry, settings: PlanSettings) -> PlanCaps:
    # Rows without new tokens would hide that others have several.
    rows, tokens, split = int(np.count_nonzero(counts)), int(counts.sum()), settings.fixed_split
    if split:
        return fixed_caps(rows, tokens, int((starts + counts).max(initial=1)), query_tile, geometry.group, split)
    return caps_for(rows, tokens, query_tile, geometry, settings)


def _caps_of(counts: I64, runs: tuple[SharedRun, ...], geometry: Geometry, settings: PlanSettings) -> PlanCaps:
    """Room for what this very batch shares, where memory is taken anew for each step."""
    stacked = sum(int(counts[run.rows].sum()) for run in runs)
    few = caps_for(len(counts), int(counts.sum()) + 1, settings.query_tile or 16, geometry, settings)
    return PlanCaps(
        few.decode_items,
        few.tile_items + 4 * stacked,
        few.decode_partials,
        few.tile_partials + 8 * stacked,
        few.token_list + stacked,
    )


def _shared_runs(
    tables: I32, starts: I64, counts: I64, geometry: Geometry, settings: PlanSettings
) -> tuple[SharedRun, ...]:
    rule = settings.sharing
    if rule is None or settings.fixed_split or len(starts) < rule.min_sharers:
        return ()
    takes_part = (counts > 0) & (counts * geometry.group <= MOST_SHARED_ROWS)
    # Only blocks that were full before this step: every new token attends to the whole of them.
    full = np.where(takes_part, starts // geometry.slots, 0)
    return find_shared(tables, full, geometry.slots, geometry.token_bytes, rule)


def _plan(
    batch: RaggedBatch,
    starts: I64,
    counts: I64,
    tables: I32,
    runs: tuple[SharedRun, ...],
    geometry: Geometry,
    settings: PlanSettings,
    caps: PlanCaps | None,
) -> PlanArrays | None:
    """None when the caps are exceeded."""
    offsets, slots = batch.offsets.astype(np.int64), geometry.slots
    begins = private_begins(runs, len(starts)) * slots
    row_of_token, ordinal = items.repeat_with_ordinal(counts)
    positions = starts[row_of_token] + ordinal
    tokens, stacks = items.stack_tokens(len(positions), offsets, counts, runs)
    query_tile = settings.query_tile or _mean_tile(counts, stacks, geometry.group, settings.most_tile)
    tile_tokens = max(1, query_tile // geometry.group)
    caps = caps or _own_caps(starts, counts, query_tile, geometry, settings)
    decodes = items.decode_units(begins, starts, counts, offsets)
    tiles = items.row_units(begins, starts, counts, offsets, tile_tokens)
    if runs:
        tiles = items.join(items.run_units(runs, tokens, stacks, positions, tile_tokens, slots), tiles)
    decode_chunk = tile_chunk = settings.fixed_split
    if not settings.fixed_split:
        heads, least = geometry.kv_heads, settings.min_chunk
        room = caps.decode_items, caps.decode_partials
        decode_chunk = items.choose_chunk(decodes, settings.decode_costs(heads), least, *room)
        room = caps.tile_items, caps.tile_partials
        tile_chunk = items.choose_chunk(tiles, settings.tile_costs(heads), least, *room)
    decode_items, decode_split = items.cut(decodes, decode_chunk, tables.shape[1])
    tile_items, tile_split = items.cut(tiles, tile_chunk, tables.shape[1])
    partial_tokens = items.place_partials(tile_items, tile_split, decode_items, decode_split)
    decode_partials = int(np.count_nonzero(decode_split))
    if not _fits(caps, decode_items, tile_items, partial_tokens, decode_partials) or len(tokens) > caps.token_list:
        return None
    merge_tokens, merge_indptr, merge_slots = items.merge_lists(tile_items, decode_items, tokens, partial_tokens)
    return PlanArrays(
        decode_items=items.longest_first(decode_items),
        tile_items=items.longest_first(tile_items),
        tokens=tokens.astype(np.int32),
        positions=positions.astype(np.int32),
        write_slots=_slots_of(tables, row_of_token, positions, slots),
        merge_tokens=merge_tokens,
        merge_indptr=merge_indptr,
        merge_slots=merge_slots,
        tables=tables,
        partial_tokens=partial_tokens,
        query_tile=query_tile,
        kv_tokens_read=_keys_of(decode_items) + _keys_of(tile_items),
    )


def write_slots(starts: I32, counts: I32, tables: I32, slots: int) -> I32:
    """[T] block * P + slot that each new token's keys and values go to."""
    row_of_token, ordinal = items.repeat_with_ordinal(counts.astype(np.int64))
    return _slots_of(tables, row_of_token, starts[row_of_token] + ordinal, slots)


def _slots_of(tables: I32, row_of_token: I64, positions: I64, slots: int) -> I32:
    return tables[row_of_token, positions // slots] * np.int32(slots) + (positions % slots).astype(np.int32)


def _keys_of(rows: I32) -> int:
    return int((rows[:, items.KV_END] - rows[:, items.KV_BEGIN]).sum())


def _fits(caps: PlanCaps, decode_items: I32, tile_items: I32, partials: int, decode_partials: int) -> bool:
    return (
        len(decode_items) <= caps.decode_items
        and len(tile_items) <= caps.tile_items
        and decode_partials <= caps.decode_partials
        and partials - decode_partials <= caps.tile_partials
    )


def _mean_tile(counts: I64, stacks: I64, group: int, most: int) -> int:
    """Of the step's rows with several tokens and its shared runs."""
    several = counts[counts > 1]
    if not len(several) and len(stacks) == 1:
        return query_tile_for(0, 1, group)
    sizes = np.concatenate([several, np.diff(stacks)])
    return query_tile_for(int(sizes.sum()), len(sizes), group, most)
