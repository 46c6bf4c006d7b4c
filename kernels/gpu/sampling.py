"""Sampling on the GPU: one program a row, thresholds by search over the bits of the values, no sort.

The k-th largest value is the largest number with at least k values above or at it, and top-p's threshold the least
with less than p of the mass above it: both are found by cutting an interval of float32 numbers, taken as whole numbers
in the same order, in four (an exact radix selection; Alabi et al. 2012, "Fast k-selection algorithms for graphics
processing units", with the row read again instead of moved). Masses are whole numbers, so no order of addition shows.
Noise is only computed for tiles that hold a token which can still win. Called through `kernels/ops.py`; knows only
tensors. Legend: S rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.philox import gumbel_noise
from penstock.kernels.gpu.tuning import config_for
from penstock.kernels.sampling_rules import LARGEST_GUMBEL, LEAST_TEMPERATURE, mass_reach, mass_scale

_LARGEST_GUMBEL = tl.constexpr(LARGEST_GUMBEL)
_LEAST_TEMPERATURE = tl.constexpr(LEAST_TEMPERATURE)


@triton.jit
def ordered(value):
    """Float32 as int64 in the order of the numbers; -0 is 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def number(key):
    """The float32 of an `ordered` key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_tile(row_ptr, start, width, temperature, TILE: tl.constexpr):
    """TILE logits over the temperature, correctly rounded; -inf beyond the row."""
    column = start + tl.arange(0, TILE)
    logits = tl.load(row_ptr + column, mask=column < width, other=-float("inf"))
    return tl.div_rn(logits, temperature)


@triton.jit
def largest(row_ptr, width, TILE: tl.constexpr):
    """(largest logit, its lowest index); NaN counts as larger than all and gives NaN."""
    best = tl.full((), -float("inf"), tl.float32)
    place = tl.full((), 0, tl.int32)
    spoiled = tl.full((), 0x7FFFFFFF, tl.int32)
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        logits = tl.load(row_ptr + column, mask=column < width, other=-float("inf"))
        spoiled = tl.minimum(spoiled, tl.min(tl.where(logits != logits, column, 0x7FFFFFFF), axis=0))
        clean = tl.where(logits != logits, -float("inf"), logits)
        here = tl.max(clean, axis=0)
        first = tl.min(tl.where(clean == here, column, 0x7FFFFFFF), axis=0)
        place = tl.where(here > best, first, place)
        best = tl.maximum(best, here)
    is_spoiled = spoiled < 0x7FFFFFFF
    return tl.where(is_spoiled, float("nan"), best), tl.where(is_spoiled, spoiled, place)


@triton.jit
def kth_key(row_ptr, width, temperature, k, low, high, TILE: tl.constexpr):
    """The largest key in [low, high] with at least `k` keys of the row at or above it; `low` must have."""
    while low < high:
        step = tl.maximum((high - low + 3) // 4, 1)
        first, second, third = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        at_first = tl.full((), 0, tl.int32)
        at_second = tl.full((), 0, tl.int32)
        at_third = tl.full((), 0, tl.int32)
        for start in range(0, width, TILE):
            inside = start + tl.arange(0, TILE) < width
            key = ordered(scaled_tile(row_ptr, start, width, temperature, TILE))
            at_first += tl.sum(((key >= first) & inside).to(tl.int32), axis=0)
            at_second += tl.sum(((key >= second) & inside).to(tl.int32), axis=0)
            at_third += tl.sum(((key >= third) & inside).to(tl.int32), axis=0)
        high = tl.where(
            at_first < k, first - 1, tl.where(at_second < k, second - 1, tl.where(at_third < k, third - 1, high))
        )
        low = tl.where(at_third >= k, third, tl.where(at_second >= k, second, tl.where(at_first >= k, first, low)))
    return low


@triton.jit
def mass_above(row_ptr, width, temperature, top, scale, first, second, third, end, TILE: tl.constexpr):
    """Units of mass of the keys above `first`, `second`, `third` (ascending), each up to and with `end`."""
    over_first = tl.full((), 0, tl.int64)
    over_second = tl.full((), 0, tl.int64)
    over_third = tl.full((), 0, tl.int64)
    for start in range(0, width, TILE):
        scaled = scaled_tile(row_ptr, start, width, temperature, TILE)
        key = ordered(scaled)
        wanted = (key > first) & (key <= end)
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            units = (tl.exp(scaled.to(tl.float64) - top) * scale + 0.5).to(tl.int64)
            over_first += tl.sum(tl.where(wanted, units, 0), axis=0)
            over_second += tl.sum(tl.where(wanted & (key > second), units, 0), axis=0)
            over_third += tl.sum(tl.where(wanted & (key > third), units, 0), axis=0)
    return over_first, over_second, over_third


@triton.jit
def nucleus_key(row_ptr, width, temperature, top, scale, share, low, high, TILE: tl.constexpr):
    """The least key in [low, high], `high` the top's, above which lies less than `share` of the mass from `low` up."""
    total, _, _ = mass_above(row_ptr, width, temperature, top, scale, low - 1, high, high, high, TILE)
    target = share * total.to(tl.float64)
    beyond = tl.full((), 0, tl.int64)  # mass above `high`, which is outside the interval
    while low < high:
        step = (high - low) // 4
        first, second, third = low + step, low + 2 * step, low + 3 * step
        a, b, c = mass_above(row_ptr, width, temperature, top, scale, first, second, third, high, TILE)
        a, b, c = a + beyond, b + beyond, c + beyond
        a_in, b_in, c_in = a.to(tl.float64) < target, b.to(tl.float64) < target, c.to(tl.float64) < target
        low = tl.where(a_in, low, tl.where(b_in, first + 1, tl.where(c_in, second + 1, third + 1)))
        beyond = tl.where(a_in, a, tl.where(b_in, b, tl.where(c_in, c, beyond)))
        high = tl.where(a_in, first, tl.where(b_in, second, tl.where(c_in, third, high)))
    return low


@triton.jit
def winner(row_ptr, width, temperature, floor, seed, choice, position, TILE: tl.constexpr):
    """The lowest index of the largest scaled logit plus noise among values at or above `floor`."""
    best = tl.full((), -float("inf"), tl.float64)
    place = tl.full((), 0, tl.int32)
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        scaled = scaled_tile(row_ptr, start, width, temperature, TILE)
        wanted = (scaled >= floor) & (column < width)
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            score = scaled.to(tl.float64) + gumbel_noise(seed, choice, position, column.to(tl.int64))
            score = tl.where(wanted, score, -float("inf"))
            here = tl.max(score, axis=0)
            first = tl.min(tl.where(score == here, column, 0x7FFFFFFF), axis=0)
            place = tl.where(here > best, first, place)
            best = tl.maximum(best, here)
    return place


@triton.jit
def sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_log_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    out_ptr,
    width,
    row_stride,
    scale,
    reach,
    TILE: tl.constexpr,
):
    """One row a program. `min_p_log` is the logarithm of min-p in float32, -inf for none."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    temperature = tl.load(temperature_ptr + row)
    best, token = largest(row_ptr, width, TILE)
    top = tl.div_rn(best, temperature)
    # A largest value that is infinite or not a number leaves nothing to draw from: such rows are greedy.
    usual = (temperature >= _LEAST_TEMPERATURE) & (top - top == 0)
    if usual:
        k, share = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        seed, choice, position = tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)
        wide_top = top.to(tl.float64)
        high = ordered(top)
        floor = tl.minimum(top, top + tl.load(min_p_log_ptr + row))
        if (k > 0) & (k < width):
            least = kth_key(row_ptr, width, temperature, k, ordered(tl.full((), -float("inf"), tl.float32)), high, TILE)
            floor = tl.maximum(floor, number(least))
        if share < 1:
            # Values without mass cannot be inside, so the search may begin above them.
            low = tl.maximum(ordered(floor), ordered((wide_top - reach).to(tl.float32)))
            least = nucleus_key(row_ptr, width, temperature, wide_top, scale, share, low, high, TILE)
            floor = tl.maximum(floor, number(least))
        reached = wide_top + gumbel_noise(seed, choice, position, token.to(tl.int64))
        # Half a unit in the last place of float32 is at most 2^-24 of the number: rounded down with room to spare.
        bound = reached - _LARGEST_GUMBEL
        bound = (bound - tl.abs(bound) * 1.2e-7 - 1e-30).to(tl.float32)
        token = winner(row_ptr, width, temperature, tl.maximum(floor, bound), seed, choice, position, TILE)
    tl.store(out_ptr + row, token.to(tl.int64))


def sample_tokens(
    logits_SV: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
) -> Tensor:
    """See `ops.sample_tokens`. Nothing waits for the device, and no size depends on the parameters."""
    rows, width = logits_SV.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits_SV.device)
    if rows == 0:
        return out
    logits = (logits_SV if logits_SV.stride(-1) == 1 else logits_SV.contiguous()).float()
    # In float64 and rounded, so that the threshold is the same on every device; the log of 0 is -inf.
    min_p_log = min_p.double().log().float()
    config = config_for("sample_tokens", {"rows": rows, "width": width}, default_config(width))
    sample_kernel[(rows,)](
        logits,
        temperature.contiguous(),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p_log,
        seed.contiguous(),
        choice.contiguous(),
        position.contiguous(),
        out,
        width,
        logits.stride(0),
        mass_scale(width),
        mass_reach(width),
        TILE=config["TILE"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out


def default_config(width: int) -> dict[str, int]:
    """Wide tiles: a row is read some twenty times by one program, from the L2, and latency is all there is to hide."""
    tile = min(4096, max(16, triton.next_power_of_2(width)))
    return {"TILE": tile, "num_warps": max(1, min(16, tile // 256)), "num_stages": 1}


def _case(name: str, width: int) -> AotCase:
    config = default_config(width)
    wide = ("top_k_ptr", "seed_ptr", "choice_ptr", "position_ptr", "out_ptr")
    signature = {
        **dict.fromkeys(("logits_ptr", "temperature_ptr", "min_p_log_ptr"), "*fp32"),
        **dict.fromkeys(wide, "*i64"),
        "top_p_ptr": "*fp64",
        **{"width": "i32", "row_stride": "i32", "scale": "fp32", "reach": "fp32"},
    }
    pointers = tuple(each for each, kind in signature.items() if kind.startswith("*"))
    return AotCase(
        name, sample_kernel, signature, {"TILE": config["TILE"]}, config["num_warps"], 1, (*pointers, "row_stride")
    )


AOT_CASES = (_case("vocabulary_large", 151936), _case("vocabulary_2048", 2048))
