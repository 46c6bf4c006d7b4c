"""Writing, copying, gathering and scattering KV blocks on the GPU.

Called through `kernels/ops.py`; knows only tensors and plans. New keys and values go where the plan says, as numbers or
as 8-bit codes; whole blocks are moved as bits, so that every stored number arrives as it was.
Legend: B blocks, L layers, C = 2 (key, value), H kv heads, P slots of a block, D head dim, T tokens, n blocks moved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.attention import KINDS, own_plan
from penstock.kernels.gpu.kv_codes import E4M3, INT8, PLAIN, encode, finite
from penstock.kernels.ragged import AttentionPlan

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
MOVED_AT_ONCE = 4096  # numbers of one program


@triton.jit(do_not_specialize=["scale_begin"])
def write_kernel(
    new, kv, scales, write_slots, first, stride_nt, stride_nc, stride_nh, stride_b, stride_c, stride_h, stride_p,
    scale_begin, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BR: tl.constexpr,
    KIND: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """BR of the 2 H vectors of one token. Grid: tokens, groups of vectors. Slot -1 is padding."""
    token = tl.program_id(0)
    slot = tl.load(write_slots + token)
    if slot < 0:
        return
    row = tl.program_id(1) * BR + tl.arange(0, BR)
    part = row // H
    head = row % H
    d = tl.arange(0, DP)
    real = (row < 2 * H)[:, None] & (d < D)[None, :]
    source = token.to(tl.int64) * stride_nt + part.to(tl.int64) * stride_nc + head.to(tl.int64) * stride_nh
    x = tl.load(new + source[:, None] + d[None, :], mask=real, other=0.0).to(tl.float32)
    if KIND == 0:
        x = finite(x, MOST).to(kv.dtype.element_ty)
    else:
        scale = tl.load(scales + scale_begin + row, mask=row < 2 * H, other=1.0)
        x = encode(tl.div_rn(x, tl.broadcast_to(scale[:, None], [BR, DP])), KIND)
    target = (slot // P).to(tl.int64) * stride_b + (slot % P).to(tl.int64) * stride_p
    target = target + part.to(tl.int64) * stride_c + head.to(tl.int64) * stride_h
    tl.store(kv + first + target[:, None] + d[None, :], x, mask=real)
    return


@triton.jit
def move_kernel(
    source, target, source_blocks, target_blocks, stride_sb, stride_sl, stride_sc, stride_tb, stride_tl, stride_tc,
    length, PARTS: tl.constexpr, RUNS: tl.constexpr, BE: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Copy `length` adjacent numbers of one (block, layer, key or value), BE a program.

    FROM and TO: whether the source's and the target's blocks are named by a list; else they are the numbers of the
    list itself. Grid: blocks x RUNS, ceil(length / BE), with RUNS = L * PARTS.
    """
    program = tl.program_id(0)
    number = program // RUNS
    run = program % RUNS
    layer = (run // PARTS).to(tl.int64)
    part = (run % PARTS).to(tl.int64)
    place = tl.program_id(1) * BE + tl.arange(0, BE)
    a = number.to(tl.int64)
    b = number.to(tl.int64)
    if FROM:
        a = tl.load(source_blocks + number).to(tl.int64)
    if TO:
        b = tl.load(target_blocks + number).to(tl.int64)
    real = place < length
    bits = tl.load(source + a * stride_sb + layer * stride_sl + part * stride_sc + place, mask=real)
    tl.store(target + b * stride_tb + layer * stride_tl + part * stride_tc + place, bits, mask=real)
    return


def write_kv(
    kv_BLCHPD: Tensor, layer: int, new_TCHD: Tensor, plan: AttentionPlan, kv_scales: Tensor | None = None
) -> None:
    """See `ops.write_kv`."""
    expect.dense_rows("write_kv", "new", new_TCHD)
    expect.dense_rows("write_kv", "kv", kv_BLCHPD)
    slots, tokens = own_plan(plan).write_slots(kv_BLCHPD), len(new_TCHD)
    if not tokens:
        return
    _, _, parts, heads, block_slots, dim = kv_BLCHPD.shape
    kind = KINDS.get(kv_BLCHPD.dtype, PLAIN)
    wide = triton.next_power_of_2(dim)
    rows = min(triton.next_power_of_2(parts * heads), max(1, 2048 // wide))
    write_kernel[(tokens, triton.cdiv(parts * heads, rows))](
        new_TCHD,
        kv_BLCHPD.view(torch.uint8) if kind == E4M3 else kv_BLCHPD,
        slots if kv_scales is None else kv_scales,
        slots,
        layer * kv_BLCHPD.stride(1),
        *new_TCHD.stride()[:3],
        kv_BLCHPD.stride(0),
        *kv_BLCHPD.stride()[2:5],
        layer * parts * heads,
        H=heads,
        D=dim,
        DP=wide,
        P=block_slots,
        BR=rows,
        KIND=kind,
        MOST=torch.finfo(kv_BLCHPD.dtype).max if kind == PLAIN else 0.0,
        num_warps=4,
        num_stages=1,
    )


def copy_blocks(kv_BLCHPD: Tensor, pairs: Tensor) -> None:
    """See `ops.copy_blocks`. Where no source is known to be a target, one launch and no memory between."""
    if not len(pairs):
        return
    sources, targets = (pairs[:, column].contiguous().to(kv_BLCHPD.device) for column in (0, 1))
    if not may_overlap(pairs):
        _move("copy_blocks", kv_BLCHPD, kv_BLCHPD, sources, targets)
        return
    between = kv_BLCHPD.new_empty((len(pairs), *kv_BLCHPD.shape[1:]))
    gather_blocks(kv_BLCHPD, sources, between)
    scatter_blocks(kv_BLCHPD, targets, between)


def may_overlap(pairs: Tensor) -> bool:
    """Whether a source may be a target too: always, where looking would make the device wait."""
    if pairs.device.type != "cpu":
        return True
    return bool(set(pairs[:, 0].tolist()) & set(pairs[:, 1].tolist()))


def gather_blocks(kv_BLCHPD: Tensor, blocks: Tensor, staging_nLChPD: Tensor, first_head: int = 0) -> None:
    """See `ops.gather_blocks`."""
    part = kv_BLCHPD.narrow(3, first_head, staging_nLChPD.shape[3])
    _move("gather_blocks", part, staging_nLChPD, blocks.to(kv_BLCHPD.device), None)


def scatter_blocks(kv_BLCHPD: Tensor, blocks: Tensor, staging_nLChPD: Tensor, first_head: int = 0) -> None:
    """See `ops.scatter_blocks`."""
    part = kv_BLCHPD.narrow(3, first_head, staging_nLChPD.shape[3])
    _move("scatter_blocks", staging_nLChPD, part, None, blocks.to(kv_BLCHPD.device))


def _move(op: str, source: Tensor, target: Tensor, source_blocks: Tensor | None, target_blocks: Tensor | None) -> None:
    """Copy blocks of [.., L, C, H, P, D] whose last three dimensions are adjacent."""
    _, layers, parts, heads, slots, dim = target.shape
    for name, tensor in (("kv", source), ("kv", target)):
        if tensor.stride()[3:] != (slots * dim, dim, 1) and heads * slots * dim > 1:
            raise KernelInputError(op, name, f"strides {tensor.stride()}; heads, slots and dims must be adjacent")
    listed = source_blocks if source_blocks is not None else target_blocks
    if listed is None or not len(listed):
        return
    bits = BITS[target.element_size()]
    length = heads * slots * dim
    size = min(MOVED_AT_ONCE, triton.next_power_of_2(length))
    move_kernel[(len(listed) * layers * parts, triton.cdiv(length, size))](
        source.view(bits),
        target.view(bits),
        listed if source_blocks is None else source_blocks.contiguous(),
        listed if target_blocks is None else target_blocks.contiguous(),
        *source.stride()[:3],
        *target.stride()[:3],
        length,
        PARTS=parts,
        RUNS=layers * parts,
        BE=size,
        FROM=source_blocks is not None,
        TO=target_blocks is not None,
        num_warps=4,
        num_stages=1,
    )


def _write_case(dim: int, heads: int, kind: int) -> AotCase:
    names = {PLAIN: "bf16", E4M3: "e4m3", INT8: "int8"}
    stored = {PLAIN: "*bf16", E4M3: "*u8", INT8: "*i8"}
    strides = ("first", "stride_nt", "stride_nc", "stride_nh", "stride_b", "stride_c", "stride_h", "stride_p")
    signature = {"new": "*bf16", "kv": stored[kind], "scales": "*fp32" if kind else "*i32", "write_slots": "*i32"}
    pointers = tuple(signature)
    signature.update(dict.fromkeys((*strides, "scale_begin"), "i32"))
    wide = triton.next_power_of_2(dim)
    constexprs = {
        "H": heads,
        "D": dim,
        "DP": wide,
        "P": 16,
        "BR": min(triton.next_power_of_2(2 * heads), 2048 // wide),
        "KIND": kind,
        "MOST": torch.finfo(torch.bfloat16).max if kind == PLAIN else 0.0,
    }
    return AotCase(f"write_{names[kind]}_{dim}", write_kernel, signature, constexprs, 4, 1, (*pointers, *strides))


def _move_case(name: str, source: bool, target: bool) -> AotCase:
    strides = ("stride_sb", "stride_sl", "stride_sc", "stride_tb", "stride_tl", "stride_tc", "length")
    pointers = {"source": "*i16", "target": "*i16", "source_blocks": "*i64", "target_blocks": "*i64"}
    signature = {**pointers, **dict.fromkeys(strides, "i32")}
    constexprs = {"PARTS": 2, "RUNS": 64, "BE": MOVED_AT_ONCE, "FROM": source, "TO": target}
    return AotCase(name, move_kernel, signature, constexprs, 4, 1, (*pointers, *strides))


AOT_CASES = (
    *(_write_case(dim, 8, kind) for dim in (64, 128) for kind in (PLAIN, E4M3, INT8)),
    _write_case(80, 8, PLAIN),
    _move_case("gather", True, False),
    _move_case("scatter", False, True),
    _move_case("copy", True, True),
)
