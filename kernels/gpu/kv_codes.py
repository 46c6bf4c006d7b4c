"""8-bit keys and values inside Triton kernels: codes to numbers and numbers to codes.

Called by the kernels of `attention_kernels.py` and `kv_blocks.py`; knows single numbers, no layout. E4M3 (Micikevicius
et al. 2022, "FP8 formats for deep learning", section 3) is decoded and encoded by whole-number arithmetic on its bits:
exact, and the same on devices with and without the type and under the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN = 0  # the storage holds numbers
E4M3 = 1  # the storage holds E4M3 codes, seen as uint8
INT8 = 2  # the storage holds whole numbers -127 .. 127

# An E4M3 code's exponent and mantissa, moved into a half's bits, stand for the number divided by this: the exponents'
# biases are 7 and 15. Callers fold it into a scale that they multiply by anyway.
E4M3_UNIT = 256.0
E4M3_MOST = tl.constexpr(448.0)


@triton.jit
def decode(codes, KIND: tl.constexpr, TARGET: tl.constexpr):
    """The number of each code as TARGET, exactly; E4M3 divided by E4M3_UNIT. Plain numbers are left alone.

    The two E4M3 codes that stand for NaN come out as 480: `encode` never makes them.
    """
    if KIND == 1:
        wide = codes.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True).to(tl.float32).to(TARGET)
    elif KIND == 2:
        return codes.to(tl.float32).to(TARGET)
    else:
        return codes


@triton.jit
def encode(x, KIND: tl.constexpr):
    """The nearest code to each float32 number, ties to even; NaN to 0, numbers out of range to the largest."""
    x = tl.where(x == x, x, 0.0)
    if KIND == 1:
        x = tl.minimum(tl.maximum(x, -E4M3_MOST), E4M3_MOST)
        bits = x.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = bits & 0x7FFFFFFF
        # Normal numbers: round the mantissa to 3 bits by adding just under half of the last place, then move the
        # exponent's bias from 127 to 7. Below 2^-6 codes are multiples of 2^-9, the last place of 2^14.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        return (sign | tl.where(size < 0x3C800000, small, normal)).to(tl.uint8)
    else:
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
        # Adding 1.5 * 2^23 leaves no bits for a fraction; the addition itself rounds to even.
        return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def finite(x, MOST: tl.constexpr):
    """NaN to 0 and infinities to the largest number of the stored type, which is MOST."""
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -MOST), MOST)
