"""Rows of tokens sorted by expert and cut into blocks of one expert each, on the GPU, with no wait for the host.

Launched by `moe`. A stable counting sort: ranks within a chunk by comparing pairs, counts per chunk and expert, and
their running sums, so that nothing depends on the order in which programs run. No slot is padded: a block is an expert,
a first place and a count. Grids and buffers are sized by bounds that depend on the number of tokens only.
Legend: R = T * k rows (row t * k + j is choice j of token t), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.gpu.aot import AotCase

CHUNK = 512  # rows of one program; as many or fewer rows in all take a single launch
_PAIRS = tl.constexpr(32)  # rows compared with a chunk at a time
_COUNT_TILE = 16


@dataclass(frozen=True, slots=True, eq=False)
class ExpertBlocks:
    """`order[place]` is the row at that place; block b covers places starts[b] .. starts[b] + counts[b] - 1.

    Blocks that are not needed have count 0. Rows without an expert are in no block.
    """

    order: Tensor  # [R] int32
    experts: Tensor  # [B] int32
    starts: Tensor  # [B] int32
    counts: Tensor  # [B] int32


def most_blocks(rows: int, experts: int, block_t: int) -> int:
    """No choice of experts needs more blocks: each expert hit takes one for its first row."""
    hit = min(rows, experts)
    return hit + (rows - hit) // block_t


@triton.jit
def ranks_in_chunk(ids, expert, row, R, CHUNK: tl.constexpr):
    """How many earlier rows of the same chunk have the same expert."""
    rank = tl.zeros((CHUNK,), dtype=tl.int32)
    first = tl.program_id(0) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, R), _PAIRS):
        other = start + tl.arange(0, _PAIRS)
        theirs = tl.load(ids + other, mask=other < R, other=-1).to(tl.int32)
        same = (theirs[None, :] == expert[:, None]) & (other[None, :] < row[:, None])
        rank += tl.sum(same.to(tl.int32), axis=1)
    return rank


@triton.jit
def write_places(order, experts, starts, counts, row, expert, rank, offset, total, first_block, fine, BLOCK_T):
    """A row's place, and the block that it opens if it is the first of one."""
    place = offset + rank
    tl.store(order + place, row, mask=fine)
    block = first_block + rank // BLOCK_T
    opens = fine & (rank % BLOCK_T == 0)
    tl.store(experts + block, expert, mask=opens)
    tl.store(starts + block, place, mask=opens)
    tl.store(counts + block, tl.minimum(total - rank, BLOCK_T), mask=opens)


@triton.jit
def clear_blocks(counts, first, last):
    """Zero counts[first:last]."""
    for start in range(first, last, 128):
        block = start + tl.arange(0, 128)
        tl.store(counts + block, tl.zeros((128,), dtype=tl.int32), mask=block < last)


@triton.jit(do_not_specialize=["R", "B"])
def align_small_kernel(
    ids, order, experts, starts, counts, R, B, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr
):
    """Everything in one program, for at most CHUNK rows."""
    row = tl.arange(0, CHUNK)
    expert = tl.load(ids + row, mask=row < R, other=-1).to(tl.int32)
    fine = (expert >= 0) & (expert < E)
    known = tl.where(fine, expert, 0)
    totals = tl.histogram(known, BLOCK_E, mask=fine)
    blocks = (totals + BLOCK_T - 1) // BLOCK_T
    offsets = tl.cumsum(totals, axis=0) - totals
    first_blocks = tl.cumsum(blocks, axis=0) - blocks
    rank = ranks_in_chunk(ids, expert, row, R, CHUNK)
    offset = tl.gather(offsets, known, axis=0)
    total = tl.gather(totals, known, axis=0)
    first_block = tl.gather(first_blocks, known, axis=0)
    write_places(order, experts, starts, counts, row, expert, rank, offset, total, first_block, fine, BLOCK_T)
    clear_blocks(counts, tl.sum(blocks, axis=0), B)


@triton.jit(do_not_specialize=["R"])
def count_kernel(ids, partial, R, E, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr):
    """partial[chunk, e]: rows of the chunk that chose expert e."""
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + row, mask=row < R, other=-1).to(tl.int32)
    fine = (expert >= 0) & (expert < E)
    totals = tl.histogram(tl.where(fine, expert, 0), BLOCK_E, mask=fine)
    tl.store(partial + tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), totals)


@triton.jit(do_not_specialize=["chunks", "B"])
def offsets_kernel(
    partial, summary, counts, chunks, B, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr
):
    """Turns counts per chunk into running sums; summary[0:3, e] is first place, total and first block."""
    e = tl.arange(0, BLOCK_E)
    chunk = tl.arange(0, TILE)
    totals = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, chunks, TILE):
        place = partial + (start + chunk)[:, None] * BLOCK_E + e[None, :]
        inside = (start + chunk < chunks)[:, None]
        here = tl.load(place, mask=inside, other=0)
        before = tl.cumsum(here, axis=0) - here + totals[None, :]
        totals += tl.sum(here, axis=0)
        tl.store(place, before, mask=inside)
    blocks = (totals + BLOCK_T - 1) // BLOCK_T
    tl.store(summary + e, tl.cumsum(totals, axis=0) - totals)
    tl.store(summary + BLOCK_E + e, totals)
    tl.store(summary + 2 * BLOCK_E + e, tl.cumsum(blocks, axis=0) - blocks)
    clear_blocks(counts, tl.sum(blocks, axis=0), B)


@triton.jit(do_not_specialize=["R"])
def place_kernel(
    ids,
    partial,
    summary,
    order,
    experts,
    starts,
    counts,
    R,
    E,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The places of one chunk's rows, from the sums before it."""
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + row, mask=row < R, other=-1).to(tl.int32)
    fine = (expert >= 0) & (expert < E)
    known = tl.where(fine, expert, 0)
    rank = ranks_in_chunk(ids, expert, row, R, CHUNK) + tl.load(partial + tl.program_id(0) * BLOCK_E + known)
    offset = tl.load(summary + known)
    total = tl.load(summary + BLOCK_E + known)
    first_block = tl.load(summary + 2 * BLOCK_E + known)
    write_places(order, experts, starts, counts, row, expert, rank, offset, total, first_block, fine, BLOCK_T)


def align(ids: Tensor, num_experts: int, block_t: int) -> ExpertBlocks:
    """Sort the rows of ids [T, k], contiguous; ids outside 0 .. E - 1 stand for no expert. T at least 1."""
    rows, device = ids.numel(), ids.device
    bound = most_blocks(rows, num_experts, block_t)
    order = torch.empty(rows, device=device, dtype=torch.int32)
    experts, starts, counts = torch.empty(3, bound, device=device, dtype=torch.int32).unbind()
    width = max(triton.next_power_of_2(num_experts), 32)
    sizes = {"BLOCK_T": block_t, "BLOCK_E": width}
    if rows <= CHUNK:
        align_small_kernel[(1,)](
            ids, order, experts, starts, counts, rows, bound, num_experts, **sizes, CHUNK=CHUNK, num_warps=8
        )
        return ExpertBlocks(order, experts, starts, counts)
    chunks = triton.cdiv(rows, CHUNK)
    partial = torch.empty(chunks, width, device=device, dtype=torch.int32)
    summary = torch.empty(3, width, device=device, dtype=torch.int32)
    count_kernel[(chunks,)](ids, partial, rows, num_experts, BLOCK_E=width, CHUNK=CHUNK, num_warps=4)
    offsets_kernel[(1,)](partial, summary, counts, chunks, bound, **sizes, TILE=_COUNT_TILE, num_warps=8)
    place_kernel[(chunks,)](
        ids, partial, summary, order, experts, starts, counts, rows, num_experts, **sizes, CHUNK=CHUNK, num_warps=8
    )
    return ExpertBlocks(order, experts, starts, counts)


def _cases() -> tuple[AotCase, ...]:
    blocks = dict.fromkeys(("order", "experts", "starts", "counts"), "*i32")
    sizes = {"BLOCK_T": 16, "BLOCK_E": 128}
    small = {"ids": "*i32", **blocks, "R": "i32", "B": "i32", "E": "i32"}
    count = {"ids": "*i32", "partial": "*i32", "R": "i32", "E": "i32"}
    offsets = {"partial": "*i32", "summary": "*i32", "counts": "*i32", "chunks": "i32", "B": "i32"}
    place = {"ids": "*i32", "partial": "*i32", "summary": "*i32", **blocks, "R": "i32", "E": "i32"}
    return (
        AotCase("small", align_small_kernel, small, {**sizes, "CHUNK": CHUNK}, 8, may_spill=True),
        AotCase("count", count_kernel, count, {"BLOCK_E": 128, "CHUNK": CHUNK}, 4),
        AotCase("offsets", offsets_kernel, offsets, {**sizes, "TILE": _COUNT_TILE}, 8),
        AotCase("place", place_kernel, place, {**sizes, "CHUNK": CHUNK}, 8),
    )


AOT_CASES = _cases()
