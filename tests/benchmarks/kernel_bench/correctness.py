"""Whether a timed result is right, and really a result: K00's bounds against float64, and guards against cheats.

The tolerance comes from the dtype that the operation declares, never from the candidate. What is refused: a lazy or
foreign tensor type, another shape or dtype, NaN or infinities that the truth does not have, zeros where the truth is
not zero, errors beyond the bound, and rounding to fewer bits than the dtype has. After SOL-ExecBench's checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Half a unit in the last place, relative.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
MANTISSA_BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


class RefusedError(AssertionError):
    """A candidate's result is not what it should be; the message says why."""


@dataclass(frozen=True, slots=True)
class Bound:
    """|found - truth| <= absolute + relative |truth| for at least `share` of the elements, none over `cap` times it."""

    absolute: float
    relative: float
    share: float = 1.0
    cap: float = 4.0


def attention_bound(largest_value: float, dtype: torch.dtype) -> Bound:
    """K00: 1.5 units of the weights' rounding times the largest |v|; 1e-5 of it in float32."""
    unit = 1e-5 if dtype is torch.float32 else 1.5 * ROUNDING[dtype]
    return Bound(unit * largest_value, 0.0)


def gemm_bound(inputs: int, largest_x: float, largest_w: float, dtype: torch.dtype) -> Bound:
    """K00: the result's rounding and K roundings of float32 sums."""
    return Bound(inputs * 2.0**-24 * largest_x * largest_w, ROUNDING[dtype])


def elementwise_bound(largest: float, dtype: torch.dtype) -> Bound:
    """The result's rounding and some of float32's on the way."""
    return Bound(1e-6 * largest, ROUNDING[dtype] + 2e-6)


def check(found: object, truth: Tensor, bound: Bound, dtype: torch.dtype) -> float:
    """The largest error over its bound. Raises RefusedError."""
    tensor = guard(found, tuple(truth.shape), dtype)
    exact, wide = truth.double(), tensor.double()
    if not torch.equal(torch.isnan(exact), torch.isnan(wide)):
        raise RefusedError(f"{int(torch.isnan(wide).sum())} NaN, the truth has {int(torch.isnan(exact).sum())}")
    if not torch.equal(torch.isinf(exact), torch.isinf(wide)):
        raise RefusedError(f"{int(torch.isinf(wide).sum())} infinities, the truth has {int(torch.isinf(exact).sum())}")
    finite = torch.isfinite(exact)
    exact, wide = exact[finite], wide[finite]
    if exact.numel() == 0:
        return 0.0
    if bool((wide == 0).all()) and bool((exact != 0).any()):
        raise RefusedError("all zeros, the truth is not")
    over = (wide - exact).abs() / (bound.absolute + bound.relative * exact.abs()).clamp(min=1e-300)
    worst, inside = float(over.max()), float((over <= 1).double().mean())
    if inside < bound.share or worst > (bound.cap if bound.share < 1 else 1):
        raise RefusedError(f"{1 - inside:.2%} of the elements beyond the bound, the worst {worst:.2f} times")
    return worst


def guard(found: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The result as a plain tensor of this shape and dtype. Raises RefusedError."""
    if type(found) is not Tensor:  # a subclass may compute later, outside the timed region
        raise RefusedError(f"a {type(found).__name__}, not a plain tensor")
    if tuple(found.shape) != shape:
        raise RefusedError(f"shape {tuple(found.shape)}, expected {shape}")
    if found.dtype != dtype:
        raise RefusedError(f"dtype {found.dtype}, expected {dtype}")
    if dtype in MANTISSA_BITS and is_downgraded(found):
        raise RefusedError(f"{dtype} with the low bits of every element zero: computed in fewer bits")
    return found


def is_downgraded(tensor: Tensor) -> bool:
    """True where 64 or more non-zero elements all have the last third of their mantissa bits zero."""
    bits = MANTISSA_BITS[tensor.dtype]
    whole = tensor[torch.isfinite(tensor) & (tensor != 0)].flatten()[:4096].contiguous()
    if whole.numel() < 64:
        return False
    raw = whole.view(torch.int32 if bits == 23 else torch.int16).to(torch.int64)
    low = (1 << max(2, bits // 3)) - 1
    return not bool((raw & low).any())


def exact_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Float64 attention of tokens [n, Hq, D] of one row over its keys and values [S, H, D], up to each position."""
    group = q.shape[1] // keys.shape[1]
    k = keys.double().repeat_interleave(group, dim=1)
    v = values.double().repeat_interleave(group, dim=1)
    scores = scale * torch.einsum("nhd,shd->nhs", q.double(), k)
    outside = torch.arange(len(keys), device=q.device)[None, :] > positions[:, None]
    weights = torch.softmax(scores.masked_fill(outside[:, None, :], -torch.inf), dim=-1)
    return torch.einsum("nhs,shd->nhd", weights, v)
