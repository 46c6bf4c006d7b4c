"""Attention over paged keys and values in Triton: decode items, tiles of queries, and the merge of partial states.

Launched by `attention.py` with the lists of an `attention_plan.py` plan; every program reads its item, its block
numbers and the count of valid items from device memory, so that a captured launch can be replayed with another plan.
Softmax is taken online (Milakov and Gimelshein 2018; Dao 2023, "FlashAttention-2", section 3.1) in base 2 with the
scale folded in; heads that share a kv head are rows of one tile, so that keys are read once for all of them
(Ye et al. 2025, "FlashInfer", section 3.2.2). Knows no rows or requests.
Legend: T tokens, Hq query heads, H kv heads, G = Hq / H, D head dim (DP: the power of two above it), P slots of a
block, BM rows (token, head) of a tile, BN keys of one turn of the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.gpu.kv_codes import decode

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
ITEM = tl.constexpr(8)  # numbers of one item, see attention_items.ITEM_FIELDS


@triton.jit
def _capped(scores, soft_cap):
    """scores / soft_cap -> cap(scores) * log2(e); tanh by its series where 1 - 2 / (e^2x + 1) cancels."""
    size = tl.abs(scores)
    square = scores * scores
    series = scores * (1.0 + square * (-0.33333334 + square * (0.13333334 - square * 0.053968254)))
    whole = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.1, series, tl.where(scores < 0, -whole, whole)) * (soft_cap * LOG2E)


@triton.jit
def _turn(
    acc, total, peak, q, table, n, first, end, query_at, key_base, value_base, stride_b, stride_p, qk_scale, soft_cap,
    window, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    KIND: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """One turn of the online softmax over keys n .. n + BN - 1.

    MASKED: keys from `end` on do not count, nor, WINDOWED, those before `first`; the nearest key between is read in
    their place, so that nothing is read that is not the row's own and no load needs a mask. CAUSAL: for a query at
    `query_at` no key behind it counts either, nor, WINDOWED, one that is `window` or more before it.
    """
    keys = n + tl.arange(0, BN)
    d = tl.arange(0, DP)
    near = keys
    if MASKED:
        near = tl.minimum(tl.maximum(keys, first), end - 1)
    blocks = tl.load(table + near // P)
    places = blocks.to(tl.int64) * stride_b + (near % P).to(tl.int64) * stride_p
    pointers = places[:, None] + d[None, :]
    if D != DP:
        k = tl.load(key_base + pointers, mask=(d < D)[None, :], other=0)
        v = tl.load(value_base + pointers, mask=(d < D)[None, :], other=0)
    else:
        k = tl.load(key_base + pointers)
        v = tl.load(value_base + pointers)
    scores = tl.dot(q, tl.trans(decode(k, KIND, q.dtype)), input_precision="ieee") * qk_scale
    if CAPPED:
        scores = _capped(scores, soft_cap)
    if MASKED:
        # One comparison an element: the bounds of a query are folded into its row first.
        upto = tl.minimum(query_at, end - 1) if CAUSAL else query_at * 0 + (end - 1)
        seen = keys[None, :] <= upto[:, None]
        if WINDOWED:
            seen = seen & (keys[None, :] >= tl.maximum(first, query_at - window + 1)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen no key yet keeps weight 0 throughout, not NaN.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(q.dtype), decode(v, KIND, q.dtype), acc * decay[:, None], input_precision="ieee")
    return acc, total, highest


@triton.jit
def finish(
    acc, total, peak, out_scale, out, lse, partial_o, partial_lse, partial, token, slot, head, real, stride_ot,
    stride_oh, HEADS, HAS_LSE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Write a tile's result: to `out` where `partial` is negative, else to the partial states from `partial` on."""
    some = total > 0
    acc = acc * (tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0) * out_scale)[:, None]
    # NaN totals compare false with everything and must not be taken for an empty row.
    acc = tl.where((total != total)[:, None], total[:, None], acc)
    state = tl.where(total == 0, float("-inf"), (peak + tl.log2(tl.where(some, total, 1.0))) * LN2)
    state = tl.where(total != total, total, state)
    d = tl.arange(0, DP)
    wide = real[:, None] & (d < D)[None, :]
    if partial < 0:
        at = token.to(tl.int64) * stride_ot + head * stride_oh
        tl.store(out + at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=wide)
        if HAS_LSE:
            tl.store(lse + token.to(tl.int64) * HEADS + head, state, mask=real)
    else:
        at = (partial + slot).to(tl.int64) * HEADS + head
        tl.store(partial_o + at[:, None] * D + d[None, :], acc, mask=wide)
        tl.store(partial_lse + at, state, mask=real)


@triton.jit(do_not_specialize=["scale_begin", "window"])
def decode_kernel(
    q, kv, scales, out, lse, partial_o, partial_lse, counts, items, tables, first_key, first_value,
    stride_b, stride_h, stride_p, stride_qt, stride_qh, stride_ot, stride_oh, scale_begin, qk_scale, soft_cap, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, HAS_LSE: tl.constexpr, KIND: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One token, the G heads of one kv head, one chunk of keys. Grid: items x H, heads innermost."""
    program = tl.program_id(0)
    number = program // H
    head = program % H
    if number >= tl.load(counts):
        return
    item = items + number * ITEM
    token = tl.load(item)
    table = tables + tl.load(item + 2)
    first = tl.load(item + 3)
    end = tl.load(item + 4)
    partial = tl.load(item + 5)
    at = tl.load(item + 6)
    row = tl.arange(0, BM)
    d = tl.arange(0, DP)
    real = row < G
    query_head = head * G + row
    q_tile = tl.load(
        q + token.to(tl.int64) * stride_qt + (query_head.to(tl.int64) * stride_qh)[:, None] + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    out_scale = 1.0
    if KIND != 0:
        qk_scale = qk_scale * tl.load(scales + scale_begin + head) * UNIT
        out_scale = tl.load(scales + scale_begin + H + head) * UNIT
    key_base = kv + first_key + head.to(tl.int64) * stride_h
    value_base = kv + first_value + head.to(tl.int64) * stride_h
    acc = tl.zeros([BM, DP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    query_at = tl.zeros([BM], tl.int32) + at
    begin = first
    if WINDOWED:
        first = tl.maximum(first, at - window + 1)
        begin = begin + tl.maximum(first - begin, 0) // BN * BN
        end = tl.where(first < end, end, begin)
    # Masks cost little here, where reading decides: one loop keeps the loads of its tail in flight as well.
    for n in tl.range(begin, end, BN):
        acc, total, peak = _turn(
            acc, total, peak, q_tile, table, n, first, end, query_at, key_base, value_base, stride_b, stride_p,
            qk_scale, soft_cap, window, True, False, WINDOWED, CAPPED, KIND, BN, P, D, DP,
        )  # fmt: skip
    tokens = tl.zeros([BM], tl.int32) + token
    finish(
        acc, total, peak, out_scale, out, lse, partial_o, partial_lse, partial, tokens, tokens * 0, query_head, real,
        stride_ot, stride_oh, H * G, HAS_LSE, D, DP,
    )  # fmt: skip
    return


@triton.jit(do_not_specialize=["scale_begin", "window"])
def tile_kernel(
    q, kv, scales, out, lse, partial_o, partial_lse, counts, items, token_list, positions, tables, first_key,
    first_value, stride_b, stride_h, stride_p, stride_qt, stride_qh, stride_ot, stride_oh, scale_begin, qk_scale,
    soft_cap, window, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, HAS_LSE: tl.constexpr,
    KIND: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """BM / G tokens, the G heads of one kv head, one chunk of keys. Grid: items x H, heads innermost."""
    program = tl.program_id(0)
    number = program // H
    head = program % H
    if number >= tl.load(counts + 1):
        return
    item = items + number * ITEM
    token_begin = tl.load(item)
    num_tokens = tl.load(item + 1)
    table = tables + tl.load(item + 2)
    first = tl.load(item + 3)
    end = tl.load(item + 4)
    partial = tl.load(item + 5)
    lowest = tl.load(item + 6)
    row = tl.arange(0, BM)
    d = tl.arange(0, DP)
    slot = row // G
    real = slot < num_tokens
    token = tl.load(token_list + token_begin + slot, mask=real, other=0)
    query_at = tl.load(positions + token, mask=real, other=0)
    query_head = head * G + row % G
    q_at = token.to(tl.int64) * stride_qt + query_head.to(tl.int64) * stride_qh
    q_tile = tl.load(q + q_at[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    out_scale = 1.0
    if KIND != 0:
        qk_scale = qk_scale * tl.load(scales + scale_begin + head) * UNIT
        out_scale = tl.load(scales + scale_begin + H + head) * UNIT
    key_base = kv + first_key + head.to(tl.int64) * stride_h
    value_base = kv + first_value + head.to(tl.int64) * stride_h
    acc = tl.zeros([BM, DP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    # Turns are counted from the chunk's first key. Up to `whole` every query sees all keys and no mask is needed; with
    # a window every turn is masked, which is cheaper than a third copy of the loop.
    begin = first
    if WINDOWED:
        first = tl.maximum(first, lowest - window + 1)
        begin = begin + tl.maximum(first - begin, 0) // BN * BN
        end = tl.where(first < end, end, begin)
        whole = begin
    else:
        whole = begin + tl.maximum(tl.minimum(end, lowest + 1) - begin, 0) // BN * BN
        for n in tl.range(begin, whole, BN):
            acc, total, peak = _turn(
                acc, total, peak, q_tile, table, n, first, end, query_at, key_base, value_base, stride_b, stride_p,
                qk_scale, soft_cap, window, False, False, False, CAPPED, KIND, BN, P, D, DP,
            )  # fmt: skip
    for n in tl.range(whole, end, BN):
        acc, total, peak = _turn(
            acc, total, peak, q_tile, table, n, first, end, query_at, key_base, value_base, stride_b, stride_p,
            qk_scale, soft_cap, window, True, True, WINDOWED, CAPPED, KIND, BN, P, D, DP,
        )  # fmt: skip
    finish(
        acc, total, peak, out_scale, out, lse, partial_o, partial_lse, partial, token, slot, query_head, real,
        stride_ot, stride_oh, H * G, HAS_LSE, D, DP,
    )  # fmt: skip
    return


@triton.jit(do_not_specialize=["num_tokens"])
def merge_kernel(
    out, lse, partial_o, partial_lse, counts, merge_tokens, merge_indptr, merge_slots, num_tokens, stride_ot, stride_oh,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, COUNTED: tl.constexpr,
    INDEXED: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Merge the partial states of one (token, head), BS at a time in the order of the list: deterministic.

    COUNTED: the number of merges stands in counts[2]; INDEXED: states and tokens are named by lists, otherwise they
    are the numbers of the list itself. Grid: merges x HEADS. An empty list gives (0, -inf).
    """
    program = tl.program_id(0)
    number = program // HEADS
    head = program % HEADS
    if COUNTED:  # noqa: SIM102  # a compile-time question: without it there is nothing to load
        if number >= tl.load(counts + 2):
            return
    token = number
    if INDEXED:
        token = tl.load(merge_tokens + number)
    if token >= num_tokens:
        return
    begin = tl.load(merge_indptr + number)
    end = tl.load(merge_indptr + number + 1)
    d = tl.arange(0, DP)
    acc = tl.zeros([DP], tl.float32)
    total = 0.0
    peak = float("-inf")
    for n in range(begin, end, BS):
        place = n + tl.arange(0, BS)
        real = place < end
        slot = place.to(tl.int64)
        if INDEXED:
            slot = tl.load(merge_slots + place, mask=real, other=0).to(tl.int64)
        at = slot * HEADS + head
        states = tl.load(partial_lse + at, mask=real, other=float("-inf")).to(tl.float32)
        parts = tl.load(
            partial_o + at[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        highest = tl.maximum(peak, tl.max(states, 0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2((states - shift) * LOG2E)
        decay = tl.exp2((peak - shift) * LOG2E)
        # A state of weight 0 may hold anything.
        acc = acc * decay + tl.sum(tl.where(weights[:, None] == 0, 0.0, weights[:, None] * parts), 0)
        total = total * decay + tl.sum(weights, 0)
        peak = highest
    some = total > 0
    acc = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
    at = token.to(tl.int64) * stride_ot + head * stride_oh
    tl.store(out + at + d, acc.to(out.dtype.element_ty), mask=d < D)
    if HAS_LSE:
        state = tl.where(total == 0, float("-inf"), peak + tl.log2(tl.where(some, total, 1.0)) * LN2)
        state = tl.where(total != total, total, state)
        tl.store(lse + token.to(tl.int64) * HEADS + head, state)
    return
