"""The shapes of the benchmark as keys of the tuning table: entries that name no numbers and claim no measurement.

Used by `tune_kernels.py --defaults` on machines without a GPU. An entry without numbers leaves the launch to the
kernel's own heuristic, whatever that becomes, and lets the log say that the shape is known and untuned.
"""

from __future__ import annotations

from collections.abc import Iterator

from .shapes import ModelShape, Plan, projections

BF16_BYTES = 2
FORMATS = ("gemm_fp8_tensor", "gemm_fp8_channel", "gemm_fp8_block", "gemm_int8_channel", "int4_gemm")


def untuned_keys(plan: Plan) -> Iterator[tuple[str, dict[str, int]]]:
    """(kernel, key) for every shape of the plan, some more than once."""
    for model in plan.models:
        yield from _attention(model, plan.slots)
        yield from _elementwise(model, plan)
        for tokens in plan.moe_tokens if model.experts else ():
            key = {"T": tokens, "E": model.experts, "top_k": model.chosen, "F": model.width, "K": model.hidden}
            yield "moe", key
        for outputs, inputs in projections(model).values():
            for tokens in plan.gemm_tokens:
                for kernel in ("linear", *FORMATS):
                    yield kernel, {"T": tokens, "M": outputs, "K": inputs}
            for _, _, rank in plan.lora:
                yield "lora", {"R": rank, "K": inputs, "M": outputs}


def _attention(model: ModelShape, slots: int) -> Iterator[tuple[str, dict[str, int]]]:
    stored = {"head_dim": model.dim, "page": slots, "bytes": BF16_BYTES}
    yield "attention_decode", {**stored, "group": model.heads // model.kv_heads}
    for rows in (16, 64, 128):
        yield "attention_tile", {**stored, "rows": rows}


def _elementwise(model: ModelShape, plan: Plan) -> Iterator[tuple[str, dict[str, int]]]:
    heads = model.heads + model.kv_heads
    for tokens in plan.tokens:
        yield "rms_norm", {"rows": tokens, "width": model.hidden}
        yield "rms_norm", {"rows": tokens * heads, "width": model.dim}
        yield "gated", {"tokens": tokens, "width": model.width}
        for kernel in ("rotary", "rotate_and_store"):
            yield kernel, {"tokens": tokens, "heads": heads, "dim": model.dim}
    for rows in plan.sampled_rows:
        yield "sample_tokens", {"rows": rows, "width": model.vocab}
