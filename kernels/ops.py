"""The one face of the kernels: every operation's meaning, shapes, dtypes, units and errors.

Called by `workers/model`, `workers/runner.py` and `workers/sampling.py`. Knows tensors and devices; never requests or
sequences. `dispatch.py` picks the implementation; `reference/` holds the definition of each, under the same name.

Legend: T packed tokens, N rows of a ragged batch, D head dim, Hq query heads, H kv heads (Hq a multiple of H),
B blocks, L layers, C = 2 (key, value), P slots (tokens) of a block, F feed-forward width, K inputs, M outputs,
E experts (k of a token), S adapter slots, R rank, n counters.
Floating dtypes are float32, bfloat16, float16, and float64 in the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import attention_checks as checks
from penstock.kernels import expect
from penstock.kernels.dispatch import backend_for, checked, choose
from penstock.kernels.latent_attention import latent_attention as latent_attention
from penstock.kernels.packing import LoraPlan, PackedExperts, PackedWeight, QuantFormat, QuantizedWeight
from penstock.kernels.ragged import AttentionLimits, AttentionPlan, AttentionWorkspace, RaggedBatch
from penstock.kernels.routing import check_ids, check_logits
from penstock.kernels.sampling_rules import check_sample_tokens


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


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al. 2021): half-split pairs as Llama stores its weights, or interleaved (GPT-J).

    Semantics: with R = 2 h rotated dimensions, c = cos[t, j], s = sin[t, j], and the pair (a, b) = (j, j + h), or
        (2 j, 2 j + 1) where interleaved: y[t, :, a] = x[t, :, a] * c - x[t, :, b] * s;
        y[t, :, b] = x[t, :, b] * c + x[t, :, a] * s; dimensions from R on are copied
    Shapes: x [T, heads, D]; cos, sin [T, h], 2 h <= D, of the angle of token t's position. Not in place.
    """
    return backend_for(x_THD).rotary(x_THD, cos, sin, interleaved=interleaved)


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


def gelu_erf_and_mul(gate_up: Tensor) -> Tensor:
    """Gated activation with the Gaussian error unit itself (Hendrycks and Gimpel 2016).

    Semantics: y[t, f] = gelu(x[t, f]) * x[t, f + F], gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))
    Shapes: gate_up [T, 2 F]; result [T, F]. Not in place.
    """
    return backend_for(gate_up).gelu_erf_and_mul(gate_up)


def pack_weight(weight_MK: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Put a weight into the order in which this machine multiplies fastest; done once, at load.

    Semantics: linear(x, pack_weight(w, b)) = x w^T + b
    Shapes: weight [M, K]; bias [M] or None. The result may share memory with, or replace, `weight`.
    """
    return backend_for(weight_MK).pack_weight(expect.weight("pack_weight", weight_MK, bias), bias)


def linear(x_TK: Tensor, packed: PackedWeight) -> Tensor:
    """Matrix product with a packed weight; sums are kept in float32 at least.

    Semantics: y[t, m] = sum_k x[t, k] * w[m, k] + b[m]
    Shapes: x [T, K], T >= 1, of the weight's dtype; result [T, M].
    """
    return backend_for(x_TK).linear(expect.product("linear", x_TK, packed), packed)


def quantize_weight(
    weight_MK: Tensor, format: QuantFormat, bias: Tensor | None = None, input_scale: float | None = None
) -> QuantizedWeight:
    """Turn a weight into codes and scales, once, at load; `packing.QuantFormat` names the formats and their layouts.

    Semantics: scale = max |w| / largest code over what shares it, code = w / scale to nearest even, saturated, in
        float32; fp8 is e4m3 (Micikevicius et al. 2022), largest code 448; int8 127; int4 7
    Shapes: weight [M, K], finite; bias [M] or None; input_scale, fp8_tensor and fp8_channel only, fixes the scale of
    the activations. int4_group needs K % 128 == 0, int8_channel K <= 131072. Raises KernelInputError.
    """
    return backend_for(weight_MK).quantize_weight(weight_MK, format, bias, input_scale)


def quantized_linear(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    """Matrix product with a quantised weight; sums in float32 at least (int8: exact in int32).

    Semantics: y[t, m] = sum_k q(x)[t, k] * code[m, k] * scale[m, k] + b[m], where q rounds a token to the format's
        codes by a scale of its own (fp8_block: one per 128 inputs; int4_group: q(x) = x), or by the fixed one
    Shapes: x [T, K]; result [T, M] of x's dtype. A token with a NaN, or an infinity and no fixed scale, gives NaN.
    """
    return backend_for(x_TK).quantized_linear(x_TK, weight)


def route_experts(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    groups: int = 0,
    top_groups: int = 0,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts (Shazeer et al. 2017; groups and bias as in DeepSeek-V3, 2024, section 2.1.2).

    Semantics: s = softmax or sigmoid of the logits; merit = logits, or s + selection_bias where given; the `top_groups`
        of `groups` equal runs of experts with the best merit (with a bias: sum of the best two) stay; ids are the top_k
        of the largest merit, largest first, ties to the lower id; weights s[id], over their sum where renormalize,
        times `scaling`
    Shapes: logits [T, E]; selection_bias [E]; ids int32 [T, k], weights float32 [T, k]. NaN logits: last, weights NaN.
    """
    if checked():
        check_logits(logits_TE)
    return backend_for(logits_TE).route_experts(
        logits_TE,
        top_k,
        scoring=scoring,
        renormalize=renormalize,
        selection_bias=selection_bias,
        groups=groups,
        top_groups=top_groups,
        scaling=scaling,
    )


def pack_experts(gate_up_EGK: Tensor, down_EKF: Tensor) -> PackedExperts:
    """Put experts' weights into the order in which this machine multiplies fastest; done once, at load.

    Semantics: none of its own; the result is what `fused_moe` takes
    Shapes: gate_up [E, 2 F, K], gate first; down [E, K, F]. The result may share memory with, or replace, them.
    """
    return backend_for(gate_up_EGK).pack_experts(gate_up_EGK, down_EKF)


def fused_moe(x_TK: Tensor, packed: PackedExperts, ids: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
    """Mixture of gated feed-forward experts without capacity or dropped tokens (Gale et al. 2023, MegaBlocks).

    Semantics: y[t] = sum_j weights[t, j] * down[e] (act(gate[e] x[t]) * (up[e] x[t])), e = ids[t, j], summed in order
        of j in float32; act is silu, or gelu in its tanh form; an id of -1 adds nothing
    Shapes: x [T, K] of the weights' dtype; ids int32 or int64 [T, k] in -1 .. E - 1; weights [T, k]; result [T, K].
    On a GPU ids out of range add nothing and are an error in checked mode; elsewhere always an error.
    """
    if checked():
        check_ids(ids, packed.num_experts)
    return backend_for(x_TK).fused_moe(x_TK, packed, ids, weights, activation)


def plan_lora(slots: Tensor, device: torch.device | None = None, per_token: bool = False) -> LoraPlan:
    """Sort a step's tokens by adapter, once per step, for `lora_add` in every layer.

    Semantics: none of its own; slots[t] is the adapter of token t, -1 for none
    Shapes: slots [T] int32 or int64, on the host lest it be waited for. `device` is that of the tokens; `per_token`
    suits steps of decoding in which most adapters differ (Chen et al. 2023, Punica, section 4: BGMV, else SGMV).
    """
    where = slots.device if device is None else device
    return choose(where.type, torch.int64).plan_lora(slots, device, per_token)


def lora_add(y_TM: Tensor, x_TK: Tensor, a_SRK: Tensor, b_SMR: Tensor, scales_S: Tensor, plan: LoraPlan) -> None:
    """Add each token's low-rank update (Hu et al. 2021), in place.

    Semantics: y[t] += scales[s] * b[s] (a[s] x[t]), s = slots[t] of the plan, where s >= 0; sums in float32 at least
    Shapes: y [T, M], x [T, K], a [S, R, K], b [S, M, R] of one dtype, last strides 1; scales [S] float32; R <= 256.
    """
    backend_for(x_TK).lora_add(y_TM, x_TK, a_SRK, b_SMR, scales_S, plan)


def attention_workspace(kv_BLCHPD: Tensor, limits: AttentionLimits) -> AttentionWorkspace:
    """Memory at fixed addresses for the plans of many steps, made once (Ye et al. 2025, "FlashInfer", section 3.3).

    Semantics: none of its own; where limits.padded, launches depend on the limits only and tokens from the batch's
    number on are padding: results 0, nothing stored. One plan is valid at a time.
    Shapes: kv [B, L, C, H, P, D]; limits.query_heads a multiple of H.
    """
    checks.storage("attention_workspace", kv_BLCHPD)
    return backend_for(kv_BLCHPD).attention_workspace(kv_BLCHPD, limits)


def plan_attention(kv_BLCHPD: Tensor, batch: RaggedBatch, workspace: AttentionWorkspace | None = None) -> AttentionPlan:
    """Work out once per step what `write_kv` and `paged_attention` need in every layer.

    Semantics: none of its own; a plan is valid for this storage and this batch, every layer, any contents, and in a
    workspace until its next plan.
    Shapes: kv [B, L, C, H, P, D]; every row has at least one new token, and its table names the blocks of positions
    0 .. starts[i] + counts[i] - 1. KernelInputError for inconsistent lists or a batch over the workspace's limits.
    """
    checks.storage("plan_attention", kv_BLCHPD)
    checks.batch("plan_attention", kv_BLCHPD, batch, values=checked())
    return backend_for(kv_BLCHPD).plan_attention(kv_BLCHPD, batch, workspace)


def write_kv(
    kv_BLCHPD: Tensor, layer: int, new_TCHD: Tensor, plan: AttentionPlan, kv_scales: Tensor | None = None
) -> None:
    """Store the new tokens' keys and values, in place.

    Semantics: for row i, new token j at p = starts[i] + j, t = offsets[i] + j:
        kv[table[i, p // P], layer, c, h, p % P, :] = finite(new[t, c, h, :])
    where finite() maps NaN to 0 and infinities to the largest number: a masked slot is multiplied by weight 0, and
    only a finite number makes that 0, so one sequence's overflow cannot reach another through a reused block.
    A storage of float8_e4m3fn or int8 takes the nearest code to new / kv_scales[layer, c, h], ties to even, saturated
    at 448 or 127, NaN as 0 (Micikevicius et al. 2022, section 3).
    Shapes: kv [B, L, C, H, P, D]; new [T, C, H, D] of its dtype, or any float beside kv_scales [L, C, H] float32.
    """
    checks.new_tokens(kv_BLCHPD, layer, new_TCHD, plan, kv_scales)
    backend_for(kv_BLCHPD).write_kv(kv_BLCHPD, layer, new_TCHD, plan, *(() if kv_scales is None else (kv_scales,)))


def rotate_and_store(
    qkv_TAD: Tensor,
    head_norms: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
) -> Tensor:
    """From the joint projection to attention: norm and rotation of query and key heads, keys and values stored.

    Semantics: with A = Hq + 2 H heads (queries, keys, values), all but the values:
        x = rotary(rms_norm(qkv[:, :Hq + H], head_norms, eps), cos, sin) in float32 at least, rounded to qkv's dtype;
        write_kv(kv, layer, (keys of x, values), plan); returns the queries of x
    Shapes: qkv [T, Hq + 2 H, D] of kv's dtype, overwritten; head_norms [Hq + H, D] float32 or None for no norm; cos,
    sin as for `rotary`; kv [B, L, C, H, P, D]; result [T, Hq, D], a view of qkv where it was contiguous.
    """
    return backend_for(kv_BLCHPD).rotate_and_store(qkv_TAD, head_norms, eps, cos, sin, kv_BLCHPD, layer, plan)


def copy_blocks(kv_BLCHPD: Tensor, pairs: Tensor) -> None:
    """Copy whole blocks, all layers, in place; every source is read before any target is written.

    Semantics: kv[pairs[i, 1]] = kv[pairs[i, 0]]
    Shapes: kv [B, L, C, H, P, D]; pairs [n, 2] int64 of (source, target), targets distinct.
    """
    checks.storage("copy_blocks", kv_BLCHPD)
    checks.numbers("copy_blocks", "pairs", kv_BLCHPD, pairs, 2, values=checked())
    backend_for(kv_BLCHPD).copy_blocks(kv_BLCHPD, pairs)


def gather_blocks(kv_BLCHPD: Tensor, blocks: Tensor, staging_nLChPD: Tensor, first_head: int = 0) -> None:
    """Collect blocks, all layers, some heads, in one contiguous tensor: what a transfer or a memory tier moves.

    Semantics: staging[i] = kv[blocks[i], :, :, first_head : first_head + h], bit by bit
    Shapes: kv [B, L, C, H, P, D]; blocks [n] int64; staging [n, L, C, h, P, D] contiguous, of kv's dtype, overwritten.
    """
    checks.moved("gather_blocks", kv_BLCHPD, blocks, staging_nLChPD, first_head, values=checked())
    backend_for(kv_BLCHPD).gather_blocks(kv_BLCHPD, blocks, staging_nLChPD, first_head)


def scatter_blocks(kv_BLCHPD: Tensor, blocks: Tensor, staging_nLChPD: Tensor, first_head: int = 0) -> None:
    """The inverse of `gather_blocks`, into kv in place.

    Semantics: kv[blocks[i], :, :, first_head : first_head + h] = staging[i], bit by bit; block numbers are distinct
    Shapes: those of `gather_blocks`.
    """
    checks.moved("scatter_blocks", kv_BLCHPD, blocks, staging_nLChPD, first_head, values=checked())
    backend_for(kv_BLCHPD).scatter_blocks(kv_BLCHPD, blocks, staging_nLChPD, first_head)


def paged_attention(
    q_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of every new token over its row's stored keys and values (Kwon et al. 2023, section 4).

    Semantics: for row i, new token j (t = offsets[i] + j) at position x = starts[i] + j, query head h, with g = Hq / H,
        k_p = kv[table[i, p // P], layer, 0, h // g, p % P], v_p likewise with 1, p in (x - w, x] and p >= 0, where
        w = window, or all where window is 0 (Beltagy et al. 2020, section 3.1):
        y[t, h] = sum_p softmax_p(cap(scale * q[t, h] . k_p)) v_p
        cap(s) = soft_cap * tanh(s / soft_cap), or s where soft_cap is 0 (Gemma 2, section 2)
    In a storage of codes, k_p and v_p are code * kv_scales[layer, 0 or 1, h // g].
    Shapes: q [T, Hq, D] of kv's dtype, or any float beside kv_scales [L, C, H] float32; kv [B, L, C, H, P, D]; result
    [T, Hq, D]. Softmax in float32 at least. The new tokens' own keys and values must have been written.
    """
    checks.queries("paged_attention", q_THD, kv_BLCHPD, layer, plan, window, kv_scales, values=checked())
    scales = {} if kv_scales is None else {"kv_scales": kv_scales}
    return backend_for(kv_BLCHPD).paged_attention(
        q_THD, kv_BLCHPD, layer, plan, scale, window=window, soft_cap=soft_cap, **scales
    )


def paged_attention_with_lse(
    q_THD: Tensor,
    kv_BLCHPD: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`paged_attention` and the natural logarithm of each softmax's denominator, for `merge_states`.

    Semantics: (y, s) with y of `paged_attention` and s[t, h] = log sum_p exp(cap(scale * q[t, h] . k_p))
    Shapes: those of `paged_attention`; s [T, Hq] float32 (float64 in the reference).
    """
    checks.queries("paged_attention_with_lse", q_THD, kv_BLCHPD, layer, plan, window, kv_scales, values=checked())
    return backend_for(kv_BLCHPD).paged_attention_with_lse(
        q_THD, kv_BLCHPD, layer, plan, scale, window=window, soft_cap=soft_cap, kv_scales=kv_scales
    )


def merge_states(o_SHD: Tensor, lse_SH: Tensor, merge_indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the results over each (Ye et al. 2025, section 2.2).

    Semantics: for merge m over the states i in merge_indptr[m] .. merge_indptr[m + 1] - 1:
        s[m, h] = log sum_i exp(lse[i, h]);  y[m, h] = sum_i exp(lse[i, h] - s[m, h]) o[i, h]
    An empty set, or states that are all -inf, give (0, -inf). Deterministic.
    Shapes: o [S, Hq, D]; lse [S, Hq] float32; merge_indptr [M + 1] int32 or int64, rising; results [M, Hq, D] of o's
    dtype and [M, Hq] float32.
    """
    checks.states(o_SHD, lse_SH, merge_indptr)
    return backend_for(o_SHD).merge_states(o_SHD, lse_SH, merge_indptr)


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
    """One token a row by the Gumbel-max method (Maddison, Tarlow, Minka 2014): a draw from the filtered softmax.

    Semantics: where temperature < 1e-5, or the largest x = logits / temperature is not finite: the lowest v of the
        largest logit, NaN counting as largest. Else argmax_v of x[v] + gumbel(seed, choice, position, v) over the v
        with x[v] >= floor, the lowest of equals; floor is the largest of the filters' in use, ties with it stay:
        min_p > 0: max x + log(min_p);  0 < top_k < V: the top_k-th largest x;  top_p < 1: the least x above which lies
        less than top_p of the mass that the other two keep (Holtzman et al. 2020), but at most max x.
        Masses are exp(x - max x) in float64, rounded to whole units of 2^-(62 - bits of V) of the largest.
    Shapes: logits [S, V] float32, V >= 1; temperature, min_p [S] float32; top_p [S] float64; top_k, choice, position
    and seed (an unsigned number's bits) [S] int64; result [S] int64. A row's token depends on that row only.
    """
    check_sample_tokens(logits_SV, (temperature, top_k, top_p, min_p, seed, choice, position))
    return backend_for(logits_SV).sample_tokens(logits_SV, temperature, top_k, top_p, min_p, seed, choice, position)
