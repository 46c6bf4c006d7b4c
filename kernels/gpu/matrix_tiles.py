"""What the matrix kernels share on one tile: products, e4m3 in integer arithmetic, the order of tiles.

Used inside the kernels of `gemm`, `quantized_linear`, `moe` and `lora`; holds no kernel of its own.
Legend: BM, BT, BK rows of the weight's tile, tokens, inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_SCALES = tl.constexpr(0)
ONE_SCALE = tl.constexpr(1)  # the weight has one, each token one
CHANNEL_SCALES = tl.constexpr(2)  # each output has one, each token one
BLOCK_SCALES = tl.constexpr(3)  # each 128 x 128 of the weight, each token and 128 inputs


@triton.jit
def dot(left, right, acc):
    """acc + left right; 16-bit operands on the tensor cores, float32 exactly as float32, int8 in int32."""
    if left.dtype == tl.int8:
        return tl.dot(left, right, acc, out_dtype=tl.int32)
    elif left.dtype == tl.float8e4nv:
        # The 8-bit accumulator keeps 14 bits or so: add up in float32 every 128 inputs.
        return tl.dot(left, right, acc, max_num_imprecise_acc=128)
    else:
        return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def decode_e4m3(codes, DTYPE: tl.constexpr):
    """The numbers of e4m3 codes held as uint8, exactly, without an 8-bit type or subnormal arithmetic."""
    bits = codes.to(tl.int32)
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(bits >= 0x80, -value, value).to(DTYPE)


@triton.jit
def encode_e4m3(value):
    """Float32 to e4m3 codes as uint8: to nearest even, saturated at 448, NaN as NaN; the same on every machine."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(value), 448.0)
    own = magnitude.to(tl.int32, bitcast=True)
    normal = ((own + 0x7FFFF + ((own >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, which is what the last bit of a number just above 2^14 counts.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(value != value, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def tile_of(pid, tiles_m, tiles_t, GROUP_T: tl.constexpr):
    """(output tile, token tile) of program `pid`: GROUP_T token tiles share each weight tile while it is in the L2."""
    width = GROUP_T * tiles_m
    first = pid // width * GROUP_T
    height = tl.minimum(tiles_t - first, GROUP_T)
    inside = pid % width
    return inside // height, first + inside % height


@triton.jit
def tile_scales(x_scales, w_scales, m, t, M, T, SCALES: tl.constexpr):
    """The factor of each element of a tile [BM, BT], or 1."""
    if SCALES != NO_SCALES and SCALES != BLOCK_SCALES:
        per_token = tl.load(x_scales + t, mask=t < T, other=0.0)
        if SCALES == ONE_SCALE:
            return tl.load(w_scales) * per_token[None, :]
        else:
            return tl.load(w_scales + m, mask=m < M, other=0.0)[:, None] * per_token[None, :]
    else:
        return 1.0
