"""Operations that a backend without a fused kernel of its own composes of its others.

Called by `kernels/dispatch.py` when it lists a backend. Knows tensors only. Legend as in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from penstock.kernels.ragged import AttentionPlan

RotateAndStore = Callable[[Tensor, Tensor | None, float, Tensor, Tensor, Tensor, int, AttentionPlan], Tensor]


def rotate_and_store_of(
    rms_norm: Callable[[Tensor, Tensor, float], Tensor],
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor],
    write_kv: Callable[[Tensor, int, Tensor, AttentionPlan], None],
) -> RotateAndStore:
    """`ops.rotate_and_store` by three operations of one backend."""

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
        kv_heads = kv_BLCHPD.shape[3]
        tokens, heads, dim = qkv_TAD.shape
        turned = heads - kv_heads
        qk = qkv_TAD[:, :turned]
        qk = qk if qk.element_size() == 8 else qk.float()
        if head_norms is not None:
            qk = rms_norm(qk, head_norms, eps)
        qkv_TAD[:, :turned] = rotary(qk, cos, sin)
        query_heads = heads - 2 * kv_heads
        write_kv(kv_BLCHPD, layer, qkv_TAD[:, query_heads:].reshape(tokens, 2, kv_heads, dim), plan)
        return qkv_TAD[:, :query_heads]

    return rotate_and_store
