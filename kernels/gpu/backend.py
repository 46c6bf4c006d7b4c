"""The Triton backend: every operation of `ops.py` by its kernel. Imported by `kernels/dispatch.py` when chosen."""

from __future__ import annotations

from penstock.kernels.dispatch import Backend
from penstock.kernels.gpu import (
    activation,
    attention,
    kv_blocks,
    latent_attention,
    linear,
    lora,
    moe,
    norm,
    philox,
    quantized_linear,
    rotary,
    sampling,
)
from penstock.kernels.gpu.rotate_and_store import rotate_and_store

GPU = Backend(
    name="gpu",
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    rotary=rotary.rotary,
    silu_and_mul=activation.silu_and_mul,
    gelu_and_mul=activation.gelu_and_mul,
    gelu_erf_and_mul=activation.gelu_erf_and_mul,
    pack_weight=linear.pack_weight,
    linear=linear.linear,
    quantize_weight=quantized_linear.quantize_weight,
    quantized_linear=quantized_linear.quantized_linear,
    route_experts=moe.route_experts,
    pack_experts=moe.pack_experts,
    fused_moe=moe.fused_moe,
    plan_lora=lora.plan_lora,
    lora_add=lora.lora_add,
    write_kv=kv_blocks.write_kv,
    copy_blocks=kv_blocks.copy_blocks,
    gather_blocks=kv_blocks.gather_blocks,
    scatter_blocks=kv_blocks.scatter_blocks,
    attention_workspace=attention.attention_workspace,
    plan_attention=attention.plan_attention,
    rotate_and_store=rotate_and_store,
    paged_attention=attention.paged_attention,
    paged_attention_with_lse=attention.paged_attention_with_lse,
    latent_attention=latent_attention.latent_attention,
    merge_states=attention.merge_states,
    philox=philox.philox,
    gumbel=philox.gumbel,
    sample_tokens=sampling.sample_tokens,
)
