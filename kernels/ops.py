"""The one face of the kernels: every operation's meaning, shapes, dtypes, units and errors.

Called by `workers/model`, `workers/runner.py` and `workers/sampling.py`. Knows tensors and devices; never requests or
sequences. `dispatch.py` picks the implementation; `reference/` holds the definition of each, under the same name.

Legend: T packed tokens, N rows of a ragged batch, D head dim, Hq query heads, H kv heads (Hq a multiple of H),
B blocks, L layers, C = 2 (key, value), P slots (tokens) of a block, F feed-forward width, K inputs, M outputs,
n counters.
Floating dtypes are float32, bfloat16, float16, and float64 in the reference.
"""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import backend_for
from penstock.kernels.packing import PackedWeight
from penstock.kernels.ragged import AttentionPlan, RaggedBatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019).

    Semantics: y[..., d] = x[..., d] / sqrt(mean_d(x[..., d]^2) + eps) * weight[..., d]
    Shapes: x [..., D]; weight [D], or [Hq, D] for one weight per head of x [T, Hq, D], of x's dtype or float32 (then
    the product is taken in float32); result of x's dtype. Not in place.
    """
    return backend_for(x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual addition and the norm that follows it.

    Semantics: r = x + residual; returns (rms_norm(r, weight, eps), r)
    Shapes: x, residual [T, D] of one dtype; weight [D]. Not in place.
    """
    return backend_for(x).add_rms_norm(x, residual, weight, eps)


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split form (Su et al. 2021, as Llama stores its weights).

    Semantics: with h = D / 2, c = cos[t, j], s = sin[t, j]:
        y[t, :, j] = x[t, :, j] * c - x[t, :, j + h] * s;  y[t, :, j + h] = x[t, :, j + h] * c + x[t, :, j] * s
    Shapes: x [T, heads, D] with D even; cos, sin [T, D / 2], of the angle of token t's position. Not in place.
    """
    return backend_for(x_THD).rotary(x_THD, cos, sin)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Gated activation (SwiGLU, Shazeer 2020).

    Semantics: y[t, f] = silu(x[t, f]) * x[t, f + F], silu(z) = z / (1 + exp(-z))
    Shapes: gate_up [T, 2 F]; result [T, F]. Not in place.
    """
    return backend_for(gate_up).silu_and_mul(gate_up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """Gated activation with the tanh form of the Gaussian error unit (GEGLU, Shazeer 2020; Hendrycks and Gimpel 2016).

    Semantics: y[t, f] = gelu(x[t, f]) * x[t, f + F], gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
    Shapes: gate_up [T, 2 F]; result [T, F]. Not in place.
    """
    return backend_for(gate_up).gelu_and_mul(gate_up)


def pack_weight(weight_MK: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Put a weight into the order in which this machine multiplies fastest; done once, at load.

    Semantics: linear(x, pack_weight(w, b)) = x w^T + b
    Shapes: weight [M, K]; bias [M] or None. The result may share memory with, or replace, `weight`.
    """
    return backend_for(weight_MK).pack_weight(weight_MK, bias)


def linear(x_TK: Tensor, packed: PackedWeight) -> Tensor:
    """Matrix product with a packed weight; sums are kept in float32 at least.

    Semantics: y[t, m] = sum_k x[t, k] * w[m, k] + b[m]
    Shapes: x [T, K], T >= 1, of the weight's dtype; result [T, M].
    """
    return backend_for(x_TK).linear(x_TK, packed)


def plan_attention(kv_BLCHPD: Tensor, batch: RaggedBatch) -> AttentionPlan:
    """Work out once per step what `write_kv` and `paged_attention` need in every layer.

    Semantics: none of its own; a plan is valid for this storage and this batch, every layer, any contents.
    Shapes: kv [B, L, C, H, P, D] contiguous; every row has at least one new token, and its table names the blocks of
    positions 0 .. starts[i] + counts[i] - 1.
    """
    return backend_for(kv_BLCHPD).plan_attention(kv_BLCHPD, batch)


def write_kv(kv_BLCHPD: Tensor, layer: int, new_TCHD: Tensor, plan: AttentionPlan) -> None:
    """Store the new tokens' keys and values, in place.

    Semantics: for row i, new token j at p = starts[i] + j, t = offsets[i] + j:
        kv[table[i, p // P], layer, c, h, p % P, :] = finite(new[t, c, h, :])
    where finite() maps NaN to 0 and infinities to the largest number: a masked slot is multiplied by weight 0, and
    only a finite number makes that 0, so one sequence's overflow cannot reach another through a reused block.
    Shapes: kv [B, L, C, H, P, D]; new [T, C, H, D], same dtype.
    """
    backend_for(kv_BLCHPD).write_kv(kv_BLCHPD, layer, new_TCHD, plan)


def copy_blocks(kv_BLCHPD: Tensor, pairs: Tensor) -> None:
    """Copy whole blocks, all layers, in place; every source is read before any target is written.

    Semantics: kv[pairs[i, 1]] = kv[pairs[i, 0]]
    Shapes: kv [B, L, C, H, P, D]; pairs [n, 2] int64 of (source, target), targets distinct.
    """
    backend_for(kv_BLCHPD).copy_blocks(kv_BLCHPD, pairs)


def paged_attention(
    q_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention of every new token over its row's stored keys and values (Kwon et al. 2023, section 4).

    Semantics: for row i, new token j (t = offsets[i] + j) at position x = starts[i] + j, query head h, with g = Hq / H,
        k_p = kv[table[i, p // P], layer, 0, h // g, p % P], v_p likewise with 1, p in (x - w, x] and p >= 0, where
        w = window, or all where window is 0 (Beltagy et al. 2020, section 3.1):
        y[t, h] = sum_p softmax_p(cap(scale * q[t, h] . k_p)) v_p
        cap(s) = soft_cap * tanh(s / soft_cap), or s where soft_cap is 0 (Gemma 2, section 2)
    Shapes: q [T, Hq, D] of kv's dtype; kv [B, L, C, H, P, D]; result [T, Hq, D]. Softmax in float32 at least.
    The new tokens' own keys and values must have been written.
    """
    return backend_for(kv_BLCHPD).paged_attention(
        q_THD, kv_BLCHPD, layer, plan, scale, window=window, soft_cap=soft_cap
    )


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Counter-based random words, Philox4x32-10 (Salmon et al. 2011, section 3.3).

    Semantics: y[i, :] = philox4x32_10(counter[i, :], key[i, :])
    Shapes: counter [n, 4], key [n, 2], result [n, 4]; int64 holding 32-bit words 0 .. 2^32 - 1.
    """
    return backend_for(counter).philox(counter, key)


def gumbel(seed: Tensor, choice: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise for one (choice, position, token) under a seed; the same on every device and in any batch.

    Semantics: x = philox((choice, position, token, 0), (seed mod 2^32, seed div 2^32))[0]
        y = -log(-log((x + 1/2) / 2^32))
    Shapes: all [n]; seed int64 with the bits of an unsigned 64-bit number, the others int64 below 2^32; result
    [n] float64, within (-3.14, 22.88).
    """
    return backend_for(seed).gumbel(seed, choice, position, token)
