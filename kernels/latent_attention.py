"""Latent attention's part of the face of the kernels; `ops.py` offers it beside the others.

Kept apart for its length only. Knows tensors and devices; never requests or sequences.
Legend: T packed tokens, Hq query heads, D stored width (latent and rotated key), V width of the latent, B blocks,
L layers, P slots (tokens) of a block.
"""

from __future__ import annotations

from torch import Tensor

from penstock.kernels import attention_checks as checks
from penstock.kernels.dispatch import backend_for, checked
from penstock.kernels.ragged import AttentionPlan


def latent_attention(
    q_THD: Tensor, kv_BLCHPD: Tensor, layer: int, plan: AttentionPlan, scale: float, value_dim: int
) -> Tensor:
    """Causal attention over one stored row per token that all heads share (DeepSeek-V2, 2024, section 2.1.2).

    Semantics: for row i, new token j (t = offsets[i] + j) at position x = starts[i] + j, query head h, with
        k_p = kv[table[i, p // P], layer, 0, 0, p % P], p in 0 .. x:
        y[t, h] = sum_p softmax_p(scale * q[t, h] . k_p) k_p[:V]
        Queries are in the latent space: their products with the keys' up-projection taken, the rotated part behind.
    Shapes: q [T, Hq, D] of kv's dtype; kv [B, L, 1, 1, P, D], V = value_dim in 1 .. D; result [T, Hq, V]. Softmax in
    float32 at least. The new tokens' own rows must have been written, by `write_kv`.
    """
    checks.latent_queries("latent_attention", q_THD, kv_BLCHPD, layer, plan, value_dim, values=checked())
    return backend_for(kv_BLCHPD).latent_attention(q_THD, kv_BLCHPD, layer, plan, scale, value_dim)
