"""The pieces of an attention plan: tiles of queries, chunks of their keys, partial states and their merge lists.

Called by `attention_plan.py`. Pure numpy, no loops over rows or tokens: a step's plan is made while the device waits.
Knows lengths and block numbers only.
Legend: N rows, T tokens, n items, P slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.shared_prefix import SharedRun, run_edges

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]

ITEM_FIELDS = 8  # the last is unused: an item fills half a cache line
TOKEN_BEGIN, NUM_TOKENS, TABLE_BEGIN, KV_BEGIN, KV_END, PARTIAL_BEGIN, LOWEST = range(ITEM_FIELDS - 1)
DIRECT = -1  # in place of PARTIAL_BEGIN: the item's result is final
UNSPLIT = 1 << 30
_STEPS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """Tiles of queries before their keys are cut: one entry per tile."""

    token_begin: I64  # in the plan's token list
    num_tokens: I64
    row: I64  # whose block table is read
    kv_begin: I64
    kv_end: I64
    lowest: I64  # position of a query
    shared: NDArray[np.bool_]  # needs a partial state even when its keys are one chunk


@dataclass(frozen=True, slots=True)
class Costs:
    """What a cut costs, in tokens of keys: what one program could have read in that time."""

    slots: int  # programs that run at once
    heads: int
    overhead: int  # of one program
    merge: int  # of a step that merges at all


def repeat_with_ordinal(counts: I64) -> tuple[I64, I64]:
    """[sum] the index repeated `counts[index]` times, [sum] the how-manieth of its index each is."""
    if (counts == 1).all():  # the usual case, worth not repeating anything
        return np.arange(len(counts)), np.zeros(len(counts), np.int64)
    ends = counts.cumsum()
    index = np.arange(len(counts)).repeat(counts)
    return index, np.arange(len(index)) - (ends - counts).repeat(counts)


def decode_units(begins: I64, starts: I64, counts: I64, offsets: I64) -> Units:
    """The rows with one new token, one unit each. `begins` [N]: the first key that no shared run covers."""
    rows = np.flatnonzero(counts == 1)
    at = starts[rows]
    ones = np.ones(len(rows), np.int64)
    return Units(offsets[rows], ones, rows, begins[rows], at + 1, at, begins[rows] > 0)


def row_units(begins: I64, starts: I64, counts: I64, offsets: I64, tile_tokens: int) -> Units:
    """Tiles of the rows with several new tokens; the keys of a tile end with its last query."""
    rows = np.flatnonzero(counts > 1)
    index, ordinal = repeat_with_ordinal(-(-counts[rows] // tile_tokens))
    row, first = rows[index], ordinal * tile_tokens
    size = np.minimum(counts[row] - first, tile_tokens)
    lowest = starts[row] + first
    end = lowest + size
    return Units(offsets[row] + first, size, row, begins[row], end, lowest, begins[row] > 0)


def stack_tokens(num_tokens: int, offsets: I64, counts: I64, runs: tuple[SharedRun, ...]) -> tuple[I64, I64]:
    """The token list (all packed tokens, then those of every run's rows) and [runs + 1] where each run's begin."""
    if not runs:
        return np.arange(num_tokens), np.array([num_tokens], np.int64)
    parts, begins = [np.arange(num_tokens)], [num_tokens]
    for run in runs:
        index, ordinal = repeat_with_ordinal(counts[run.rows])
        parts.append(offsets[run.rows][index] + ordinal)
        begins.append(begins[-1] + len(index))
    return np.concatenate(parts), np.array(begins, np.int64)


def run_units(
    runs: tuple[SharedRun, ...], tokens: I64, stacks: I64, positions: I64, tile_tokens: int, slots: int
) -> Units:
    """Tiles of the stacked queries of every run, against the run's blocks."""
    sizes = np.diff(stacks)
    index, ordinal = repeat_with_ordinal(-(-sizes // tile_tokens))
    first = ordinal * tile_tokens
    begin = stacks[index] + first
    size = np.minimum(sizes[index] - first, tile_tokens)
    blocks = np.array([(run.begin, run.end, run.rows[0]) for run in runs], np.int64).reshape(-1, 3)[index]
    lowest = np.minimum.reduceat(positions[tokens], begin)  # the tiles follow one another to the end of the list
    ones = np.ones(len(begin), np.bool_)
    return Units(begin, size, blocks[:, 2], blocks[:, 0] * slots, blocks[:, 1] * slots, lowest, ones)


def join(a: Units, b: Units) -> Units:
    """The units of both, those of `a` first."""
    if not len(a.row):
        return b
    names = Units.__slots__
    return Units(*(np.concatenate([getattr(a, name), getattr(b, name)]) for name in names))


def choose_chunk(units: Units, costs: Costs, least: int, most_items: int, most_partials: int) -> int:
    """The chunk length, a multiple of `least` or UNSPLIT, for which the step is estimated to end first.

    The estimate is that of list scheduling: the work over all programs, at least the longest item, and where programs
    outnumber the slots half an item more for the uneven end.
    """
    lengths = units.kv_end - units.kv_begin
    if not len(lengths):
        return UNSPLIT
    longest = int(lengths.max())
    chunks = np.append(least * _STEPS[least * _STEPS < longest], UNSPLIT)
    # In floating point, which numpy divides and multiplies faster; 1e-9 is above any rounding and below any step.
    parts = np.ceil(lengths[:, None] * (1.0 / chunks) - 1e-9)
    items = parts.sum(axis=0)
    partials = units.num_tokens.astype(np.float64) @ (parts * ((parts > 1) | units.shared[:, None]))
    programs = items * costs.heads
    longest_item = np.minimum(chunks, longest)
    work = (int(lengths.sum()) * costs.heads + programs * costs.overhead) / costs.slots
    estimate = np.maximum(work, longest_item + costs.overhead)
    estimate += np.where(programs > costs.slots, longest_item / 2, 0) + np.where(items > len(lengths), costs.merge, 0)
    fits = (items <= most_items) & (partials <= most_partials)
    fits[-1] = True
    return int(chunks[np.argmin(np.where(fits, estimate, np.inf))])


def cut(units: Units, chunk: int, table_width: int) -> tuple[I32, NDArray[np.bool_]]:
    """[n, ITEM_FIELDS] items in the order of their units and keys, [n] which need a partial state."""
    if not len(units.row):
        return np.empty((0, ITEM_FIELDS), np.int32), np.empty(0, np.bool_)
    parts = -(-(units.kv_end - units.kv_begin) // chunk)
    unit, ordinal = repeat_with_ordinal(parts)
    items = np.zeros((len(unit), ITEM_FIELDS), np.int32)
    begin = units.kv_begin[unit] + ordinal * chunk
    items[:, TOKEN_BEGIN] = units.token_begin[unit]
    items[:, NUM_TOKENS] = units.num_tokens[unit]
    items[:, TABLE_BEGIN] = units.row[unit] * table_width
    items[:, KV_BEGIN] = begin
    items[:, KV_END] = np.minimum(begin + chunk, units.kv_end[unit])
    items[:, PARTIAL_BEGIN] = DIRECT
    items[:, LOWEST] = units.lowest[unit]
    return items, ((parts > 1) | units.shared)[unit]


def place_partials(tile_items: I32, tile_split: NDArray[np.bool_], decode_items: I32, split: NDArray[np.bool_]) -> int:
    """Give every item that needs it room for one partial state per token; returns the room taken, in tokens."""
    sizes = np.where(tile_split, tile_items[:, NUM_TOKENS], 0)
    ends = np.cumsum(sizes)
    tile_items[tile_split, PARTIAL_BEGIN] = (ends - sizes)[tile_split]
    taken = int(ends[-1]) if len(ends) else 0
    decodes = int(np.count_nonzero(split))
    decode_items[split, PARTIAL_BEGIN] = np.arange(taken, taken + decodes)
    return taken + decodes


def merge_lists(tile_items: I32, decode_items: I32, tokens: I64, states: int) -> tuple[I32, I32, I32]:
    """(tokens with partial states, [m + 1] where each one's list begins, the `states` in the order of their keys)."""
    if not states:
        none = np.empty(0, np.int32)
        return none, np.zeros(1, np.int32), none
    tiles = tile_items[tile_items[:, PARTIAL_BEGIN] != DIRECT]
    decodes = decode_items[decode_items[:, PARTIAL_BEGIN] != DIRECT]
    index, ordinal = repeat_with_ordinal(tiles[:, NUM_TOKENS].astype(np.int64))
    of_tiles = tokens[tiles[index, TOKEN_BEGIN] + ordinal]
    token = np.concatenate([of_tiles, decodes[:, TOKEN_BEGIN]])
    slots = np.concatenate([tiles[index, PARTIAL_BEGIN] + ordinal, decodes[:, PARTIAL_BEGIN]])
    if len(tiles):  # decode items alone are in the order of their tokens already
        order = np.argsort(token, kind="stable")
        token, slots = token[order], slots[order]
    edges = run_edges(token)
    return token[edges[:-1]].astype(np.int32), edges.astype(np.int32), slots.astype(np.int32)


def longest_first(items: I32) -> I32:
    """The items by falling number of keys, so that the last programs to start are short."""
    if len(items) < 2:
        return items
    lengths = items[:, KV_END] - items[:, KV_BEGIN]
    return items[np.argsort(-lengths, kind="stable")]
