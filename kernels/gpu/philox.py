"""Philox4x32-10 and Gumbel noise on the GPU: the words are those of every other backend, bit for bit.

Called through `kernels/ops.py` and, as device functions, by `sampling.py`. The noise takes two logarithms in float64,
each within two units in the last place of the true one on every device (CUDA's and ROCm's stated bounds), so noise
differs between devices by less than 1e-14. Source as in `kernels/reference/philox.py`. Legend: n counters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.gpu.aot import AotCase

_BLOCK = 256


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Ten rounds over tensors of uint32; returns four of them."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def gumbel_noise(seed, choice, position, token):
    """`ops.gumbel` of int64 tensors or scalars, broadcast against `token`; float64."""
    zero = (token * 0).to(tl.uint32)
    k0, k1 = zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
    c0, c1 = zero + choice.to(tl.uint32), zero + position.to(tl.uint32)
    word, _, _, _ = philox_words(c0, c1, token.to(tl.uint32), zero, k0, k1)
    # (word + 1/2) / 2^32 is exact in float64.
    return -tl.log(-tl.log((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))


@triton.jit(do_not_specialize=["count"])
def philox_kernel(counter_ptr, key_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """BLOCK counters a program; all contiguous int64."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    c0, c1, c2, c3 = philox_words(
        tl.load(counter_ptr + 4 * index, mask=mask, other=0).to(tl.uint32),
        tl.load(counter_ptr + 4 * index + 1, mask=mask, other=0).to(tl.uint32),
        tl.load(counter_ptr + 4 * index + 2, mask=mask, other=0).to(tl.uint32),
        tl.load(counter_ptr + 4 * index + 3, mask=mask, other=0).to(tl.uint32),
        tl.load(key_ptr + 2 * index, mask=mask, other=0).to(tl.uint32),
        tl.load(key_ptr + 2 * index + 1, mask=mask, other=0).to(tl.uint32),
    )
    tl.store(out_ptr + 4 * index, c0.to(tl.int64), mask=mask)
    tl.store(out_ptr + 4 * index + 1, c1.to(tl.int64), mask=mask)
    tl.store(out_ptr + 4 * index + 2, c2.to(tl.int64), mask=mask)
    tl.store(out_ptr + 4 * index + 3, c3.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["count"])
def gumbel_kernel(seed_ptr, choice_ptr, position_ptr, token_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """BLOCK numbers a program; all contiguous, int64 in and float64 out."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    seed, choice = tl.load(seed_ptr + index, mask=mask, other=0), tl.load(choice_ptr + index, mask=mask, other=0)
    position, token = tl.load(position_ptr + index, mask=mask, other=0), tl.load(token_ptr + index, mask=mask, other=0)
    tl.store(out_ptr + index, gumbel_noise(seed, choice, position, token), mask=mask)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """See `ops.philox`."""
    expect.shape("philox", "counter", counter, None, 4)
    expect.shape("philox", "key", key, counter.shape[0], 2)
    for name, tensor in (("counter", counter), ("key", key)):
        expect.dtype("philox", name, tensor, torch.int64)
        expect.device("philox", name, tensor, counter)
    out = torch.empty(counter.shape, dtype=torch.int64, device=counter.device)
    if len(out):
        grid = (triton.cdiv(len(out), _BLOCK),)
        philox_kernel[grid](counter.contiguous(), key.contiguous(), out, len(out), BLOCK=_BLOCK, num_warps=4)
    return out


def gumbel(seed: Tensor, choice: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """See `ops.gumbel`."""
    columns = {"seed": seed, "choice": choice, "position": position, "token": token}
    for name, tensor in columns.items():
        expect.shape("gumbel", name, tensor, seed.shape[0] if seed.dim() else None)
        expect.dtype("gumbel", name, tensor, torch.int64)
        expect.device("gumbel", name, tensor, seed)
    out = torch.empty(seed.shape, dtype=torch.float64, device=seed.device)
    if len(out):
        grid = (triton.cdiv(len(out), _BLOCK),)
        dense = (column.contiguous() for column in columns.values())
        gumbel_kernel[grid](*dense, out, len(out), BLOCK=_BLOCK, num_warps=4)
    return out


_GUMBEL = dict.fromkeys(("seed_ptr", "choice_ptr", "position_ptr", "token_ptr"), "*i64")
AOT_CASES = (
    AotCase(
        "philox",
        philox_kernel,
        {"counter_ptr": "*i64", "key_ptr": "*i64", "out_ptr": "*i64", "count": "i32"},
        {"BLOCK": _BLOCK},
    ),
    AotCase("gumbel", gumbel_kernel, {**_GUMBEL, "out_ptr": "*fp64", "count": "i32"}, {"BLOCK": _BLOCK}),
)
